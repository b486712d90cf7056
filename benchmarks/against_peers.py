"""nfflax beside DeepMind's code, timm and jimm: a train step and a forward pass, same run.

    python benchmarks/against_peers.py --timm --official ~/deepmind-research --jimm ~/jimm

Each contestant is a process of its own, in the environment of its peer. They take turns, one step
after another, so that other work on the machine meets all; numbers are medians over rounds, and
ratios are medians of ratios within a round. Peers that are not named are left out.
"""

import argparse
import functools
import importlib.util
import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from peers import page, plot
from peers.contestants import Contestant, contestants, keys
from peers.driver import Measured, Worker, measure, this_machine
from peers.job import Job, What
from peers.results import Row, rows
from peers.venvs import python_of
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import nfflax
from nfflax.insight.chips import CHIPS

TITLES = {"step": "One train step", "forward": "One forward pass"}
SOURCES = {"official": "nfnets/nfnet.py", "jimm": "jimm/models/nfnet.py"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, show, and write what is asked for. 2: an argument cannot be used."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    parser = _parser()
    args = parser.parse_args(given)
    if problem := _problem(args):
        parser.error(problem)
    about = {"arguments": given, "machine": this_machine(), "date": time.strftime("%F")}
    tables: dict[str, list[dict[str, Any]]] = {}
    for what in args.what:
        found = measure(
            _chosen(what, args),
            functools.partial(_start, what=what, args=args),
            rounds=args.rounds,
            together=args.device == "cpu",
            tell=lambda text: print(time.strftime("%T"), text, file=sys.stderr, flush=True),
        )
        table = rows(found, what=what, batch=args.batch, device=args.device)
        _show(f"{TITLES[what]}: {_setting(args)}", table)
        tables[what] = [asdict(each) for each in found]
        if args.json:
            args.json.write_text(json.dumps({**about, "tables": tables}, indent=1))
        if args.write:
            _write(args.write, what, table, found, args)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--timm", action="store_true", help="timm on PyTorch takes part")
    add("--official", type=Path, metavar="DIR", help="a checkout of deepmind-research takes part")
    add("--jimm", type=Path, metavar="DIR", help="a checkout of imgengineer/jimm takes part")
    add("--network", default="nfnet_f0", metavar="NAME", help="a preset (nfnet_f0)")
    add("--pixels", type=int, default=96, metavar="N", help="side of the images (96)")
    add("--batch", type=int, default=8, metavar="N", help="images (8)")
    add("--what", type=_whats, default=["step", "forward"], help="step,forward")
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: one after the other")
    add("--rounds", type=int, default=5, metavar="N", help="turns of each contestant (5)")
    add("--only", nargs="+", default=[], metavar="KEY", help=f"patterns of: {' '.join(keys())}")
    add("--venv", type=_venv, action="append", default=[], metavar="PEER=DIR", help="one at hand")
    add("--json", type=Path, metavar="FILE", help="write every turn")
    add("--write", type=Path, metavar="PAGE", help="fill the tables of docs/benchmarks.md")
    return parser


def _whats(text: str) -> list[What]:
    chosen = text.split(",")
    if unknown := [what for what in chosen if what not in TITLES]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is neither step nor forward")
    return chosen  # pyright: ignore[reportReturnType]


def _venv(text: str) -> tuple[str, Path]:
    peer, _, folder = text.partition("=")
    if peer not in (*SOURCES, "timm") or not (Path(folder) / "bin" / "python").exists():
        raise argparse.ArgumentTypeError(
            f"{text!r} is not official, jimm or timm = a venv's folder"
        )
    return peer, Path(folder).absolute()


def _problem(args: argparse.Namespace) -> str:
    for peer, file in SOURCES.items():
        folder = getattr(args, peer)
        if folder and not (folder / file).exists():
            return f"argument --{peer}: {folder} has no {file}"
    for name in ("pixels", "batch", "rounds"):
        if getattr(args, name) < 1:
            return f"argument --{name}: must be at least 1, not {getattr(args, name)}"
    for pattern in args.only:
        if not any(fnmatchcase(key, pattern) for key in keys()):
            return f"argument --only: {pattern!r} is none of {', '.join(keys())}"
    try:
        nfflax.load_spec(args.network)
        for what in args.what if args.write else ():
            page.check(args.write, what)
    except (nfflax.SpecError, page.PageError) as error:
        return str(error)
    if args.write and importlib.util.find_spec("matplotlib") is None:
        return "argument --write: draws with matplotlib: pip install nfflax[plot]"
    return ""


def _chosen(what: What, args: argparse.Namespace) -> list[Contestant]:
    absent = {peer for peer in (*SOURCES, "timm") if not getattr(args, peer)}
    return [each for each in contestants(what, args.only) if each.peer not in absent]


def _start(contestant: Contestant, what: What, args: argparse.Namespace):
    source = getattr(args, contestant.peer, None) if contestant.peer in SOURCES else None
    job = Job(
        what=what,
        network=args.network,
        pixels=args.pixels,
        batch=args.batch,
        dtype=args.dtype,
        device=args.device,
        source=str(source.absolute()) if source else "",
        options=contestant.options,
    )
    python = python_of(contestant.peer, args.device, dict(args.venv))
    return Worker.start(contestant, python, job)


def command(args: argparse.Namespace, what: What) -> str:
    """What fills a table, as anyone would call it: folders by their published names."""
    parts = ["python", "benchmarks/against_peers.py"]
    parts += ["--timm"] * args.timm
    parts += ["--official", "deepmind-research"] * bool(args.official)
    parts += ["--jimm", "jimm"] * bool(args.jimm)
    parts += ["--what", what]
    for name in ("network", "pixels", "batch", "dtype", "device", "rounds"):
        value = getattr(args, name)
        parts += [f"--{name}", str(value)] * (value != _parser().get_default(name))
    return shlex.join([*parts, *(["--only", *args.only] if args.only else [])])


def _setting(args: argparse.Namespace) -> str:
    return f"{args.network}, batch {args.batch}, {args.pixels} px, {args.dtype}"


def _show(title: str, table: Sequence[Row]) -> None:
    columns = "", "s", "CPU s", "times", "CPU times", "of matmul", "compile CPU s", "GB"
    shown = Table(*columns, title=title)
    for row in table:
        if row.failure:
            shown.add_row(row.label, escape(row.failure))
            continue
        shown.add_row(
            row.label,
            page.seconds(row.wall),
            page.seconds(row.cpu),
            page.times(row.wall_ratio),
            page.times(row.cpu_ratio),
            f"{row.share:.0%}" if row.share else "",
            f"{row.compile_cpu:.0f}",
            f"{row.memory / 1e9:.2f}",
        )
    Console().print(shown)


def _write(
    target: Path,
    what: What,
    table: Sequence[Row],
    found: Sequence[Measured],
    args: argparse.Namespace,
) -> None:
    ready = [each.ready for each in found if each.ready]
    device = ready[0].device if ready and args.device == "cuda" else ""
    peak = next((chip.flops for name, chip in CHIPS.items() if name in device.lower()), 0.0)
    all_versions = {name: v for each in ready for name, v in each.versions.items()}
    versions = ", ".join(f"{name} {number}" for name, number in sorted(all_versions.items()))
    about = (
        f"{_setting(args)}; medians of {args.rounds} rounds. {device or this_machine()}; "
        f"{versions}; {time.strftime('%F')}."
    )
    text = [
        f"```bash\n{command(args, what)}\n```",
        about,
        page.contest(table, device=args.device, peak=peak if args.dtype == "bfloat16" else 0.0),
    ]
    if not all(row.failure for row in table):
        picture = target.parent / "images" / f"bench_{what}.png"
        title = f"{TITLES[what]}, {_setting(args)}"
        plot.draw(table, picture, title=title, device=args.device)
        text.append(f"![{title}](images/{picture.name})")
    page.fill(target, what, "\n\n".join(text))


if __name__ == "__main__":
    sys.exit(main())
