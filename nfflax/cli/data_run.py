"""`nfflax data preview` and `bench`: what a run would be shown, and how fast."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from nfflax.cli import Parser, add_overrides, console, display, new_table, print_json
from nfflax.cli.data_parts import positive, seconds, status, whole
from nfflax.spec.errors import Problem, SpecError

if TYPE_CHECKING:
    from nfflax.data.bench import Rates
    from nfflax.spec.run import Run

_PNG = b"\x89PNG\r\n\x1a\n"  # how every PNG file begins


class _ArgumentError(SpecError):
    """An argument that cannot be used."""

    subject: ClassVar[str] = "command line"


def add_preview(command: Callable[..., Parser]) -> None:
    """Declare `preview`."""
    added = command("preview", _preview, "draw what the network will see at a step of a run")
    _add_run(added)
    added.add_argument("--step", type=whole, default=0, metavar="N", help="which step (0)")
    added.add_argument(
        "--count", type=positive, default=32, metavar="N", help="how many images of it (32)"
    )
    added.add_argument(
        "--out", type=Path, metavar="FILE.png", help="where to draw it (RUN_stepN.png)"
    )


def add_bench(command: Callable[..., Parser]) -> None:
    """Declare `bench`."""
    added = command("bench", _bench, "time a run's images: reading, copying, augmenting")
    _add_run(added)
    added.add_argument(
        "--seconds", type=seconds, default=3.0, metavar="S", help="how long to time each part (3)"
    )


def _add_run(parser: Parser) -> None:
    parser.add_argument("source", metavar="RUN", help="a run preset's name, or a run file")
    add_overrides(parser, "data.source=my_images")


def _load(args: argparse.Namespace) -> "Run":
    from nfflax.spec.load import load_run, parse_override

    return load_run(args.source, dict(map(parse_override, args.overrides)))


def _preview(args: argparse.Namespace) -> None:
    run = _load(args)
    out = args.out or Path(f"{run.name}_step{args.step}.png")
    _check_target(out)
    from nfflax.data.preview import preview

    with status() as say:
        sheet = preview(run, step=args.step, count=args.count, say=say)
    try:
        sheet.save(out)
    except OSError as error:
        raise _refused(out, f"cannot be written: {error.strerror or error}") from None
    if args.json:
        print_json({"file": str(out), "width": sheet.width, "height": sheet.height})
    else:
        console().print(str(out), soft_wrap=True)


def _check_target(out: Path) -> None:
    """Find out before the work what would be in the way of the picture."""
    if out.suffix.lower() != ".png":
        raise _refused(out, "is not called .png")
    if not out.parent.is_dir():
        raise _refused(out, "is in a folder that is not there")
    try:
        if not out.exists():
            return
        with open(out, "rb") as file:
            is_picture = file.read(len(_PNG)) == _PNG
    except OSError as error:
        raise _refused(out, f"cannot be written: {error.strerror or error}") from None
    if not is_picture:
        raise _refused(out, "exists and is no picture, so it is not overwritten")


def _refused(out: Path, message: str) -> _ArgumentError:
    allowed = "a new file called .png, or an older picture"
    return _ArgumentError([Problem("--out", "", message, str(out), allowed)])


def _bench(args: argparse.Namespace) -> None:
    run = _load(args)
    from nfflax.data.bench import bench

    with status() as say:
        rates = bench(run, seconds=args.seconds, say=say)
    if args.json:
        derived = {"limit": rates.limit, "images_per_second": rates.images_per_second}
        print_json({"run": run.name} | vars(rates) | derived)
        return
    table = new_table()
    table.add_column("part", style="bold", no_wrap=True)
    table.add_column("what it does")
    for header in ("images/s", "MB/s", "s/step"):
        table.add_column(header, justify="right", no_wrap=True)
    for part, what in _parts(run, rates):
        rate = getattr(rates, part)
        megabytes = rate * rates.bytes_per_image / 1e6
        cells = f"{rate:,.0f}", f"{megabytes:,.1f}", f"{run.train.batch_size / rate:.3g}"
        table.add_row(part, what, *cells, style="yellow" if part == rates.limit else "")
    display(table)
    console().print("", *_words(run, rates), sep="\n")


def _parts(run: "Run", rates: "Rates") -> list[tuple[str, str]]:
    """What each part does, in this run."""
    kind, workers = run.data.worker_kind, run.data.workers
    by = f"a {kind} per core" if workers is None else f"{kind} workers: {workers}"
    partners = ", and a partner for each" * run.augment.draws_partners
    count = f"{rates.devices} {rates.platform} device{'s' * (rates.devices > 1)}"
    return [
        ("host", f"reads, decodes, crops{partners} · {by}"),
        ("transfer", f"copies uint8 images to {count}"),
        ("device", f"{run.augment.in_words}, {run.model.dtype}"),
    ]


def _words(run: "Run", rates: "Rates") -> list[str]:
    """Which part limits, and what helps."""
    pace = f"{rates.images_per_second:,.0f} images/s"
    said = {
        "host": f"The host limits: a network that trains faster than {pace} waits for images.",
        "transfer": f"Copying limits: a network that trains faster than {pace} waits for images.",
        "device": f"Augmentation limits: no network trains faster than {pace}, whatever its size.",
    }
    lines = [said[rates.limit]]
    if rates.limit == "host":
        helps = ["more cores", "smaller image files"]
        helps += ['augment.partners = "batch" (half as many)'] * run.augment.draws_partners
        lines.append(f"What helps: {', '.join(helps)}.")
    if rates.platform == "cpu":
        lines.append("Here the device is the CPU: host and device share its cores in training.")
    return lines
