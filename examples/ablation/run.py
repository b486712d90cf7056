"""An ablation as data: trains every row of a folder, several seeds each, and prints the table.

    python examples/ablation/run.py                           # all rows of rows/, three seeds
    python examples/ablation/run.py base relu --seeds 1       # a quick look at two of them
    python examples/ablation/run.py my_row.toml --set train.epochs=24

A row is a run file that extends another one and changes one thing: a new file in rows/ is a new
row. What is done is kept in runs/ablation, and only trained again where its row has changed. What
came of it is in README.md beside this file. Needs the extra "demo".
"""

import argparse
import json
import math
import statistics
import sys
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import nfflax
from nfflax.cli import Parser, add_overrides, show_problems
from nfflax.cli.data_parts import positive
from nfflax.data.feed import check_source, sized
from nfflax.data.sources import Source, open_source
from nfflax.spec.errors import Problem, nearest
from nfflax.spec.files import Origin, layers
from nfflax.spec.load import parse_override
from nfflax.spec.table import human
from nfflax.train import Program, make_mesh, make_program
from nfflax.train.evaluate import evaluate
from nfflax.train.history import AVERAGE, best

HERE = Path(__file__).resolve().parent
ROWS = HERE / "rows"
PAPERS = tomllib.loads((HERE / "papers.toml").read_text("utf-8"))


class Row(NamedTuple):
    """A row of the table: a run, and whom it descends from."""

    run: nfflax.Run
    line: tuple[str, ...]
    """Names of the row files that it extends, the most general first, and its own."""

    @property
    def name(self) -> str:
        return self.line[-1]

    @property
    def identity(self) -> dict[str, Any]:
        """All that its outcomes depend on."""
        return self.run.model_dump(mode="json", exclude={"name", "summary"})


class Outcome(NamedTuple):
    """What came of one seed of a row."""

    top1: float
    """Of the test images, between 0 and 1; by chance, if the run diverged."""
    diverged: bool
    step_seconds: float
    """Of its fastest step, which nothing else on the machine has slowed down; images are there."""


Outcomes = dict[str, list[Outcome]]  # by row, one for each seed


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    try:
        overrides = dict(map(parse_override, args.overrides))
        rows = read(args.rows, overrides)
        outcomes = carry_out(rows, args.seeds, args.work)
    except nfflax.SpecError as error:
        show_problems(error, as_json=False)
        return 2
    records = [record(row, outcomes[row.name]) for row in rows]
    Console().print(table(records))
    if args.json:
        args.json.write_text(json.dumps(records, indent=1) + "\n", "utf-8")
    return 0


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    what = "names from rows/, or row files of your own (default: all of rows/)"
    parser.add_argument("rows", nargs="*", metavar="ROW", default=[*shipped()], help=what)
    parser.add_argument("--seeds", type=positive, default=3, metavar="N", help="runs per row (3)")
    add_overrides(parser, "train.epochs=24")
    what = "where outcomes are kept (runs/ablation)"
    parser.add_argument("--work", type=Path, default="runs/ablation", metavar="DIR", help=what)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there as well")
    return parser.parse_args(argv)


def shipped() -> dict[str, Path]:
    """Name and file of every row in rows/."""
    return {path.stem: path for path in sorted(ROWS.glob("*.toml"))}


def read(names: Sequence[str], overrides: Mapping[str, Any] | None = None) -> list[Row]:
    """The rows of these names and files, each below what it extends. Overrides hold for all."""
    known, rows = shipped(), {}
    for name in names:
        if name not in known and not name.endswith(".toml"):
            allowed = f"a path that ends in .toml, or one of {', '.join(known)}"
            message, near = "no row is called this", nearest(name, known)
            raise nfflax.SpecError([Problem("ablation", "ROW", message, name, allowed, near)])
        path = known.get(name, Path(name))
        if path.stem in rows:
            message = "two rows are called this"
            raise nfflax.SpecError([Problem("ablation", "ROW", message, path.stem)])
        files = [Path(layer.origin.file) for layer in layers(nfflax.Run, path, Origin("ablation"))]
        line = tuple(file.stem for file in files if file.suffix == ".toml")
        rows[path.stem] = Row(nfflax.load_run(path, overrides), line)
    return sorted(rows.values(), key=lambda row: row.line)


def carry_out(rows: Sequence[Row], seeds: int, work: Path) -> Outcomes:
    """The outcomes of all rows: what is missing is trained, and kept as soon as it is there."""
    outcomes = {row.name: kept(row, work) for row in rows}
    runs = [ready(row.run) for row in rows]
    work.mkdir(parents=True, exist_ok=True)
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("", total=len(rows) * seeds)
        for row, run in zip(rows, runs, strict=True):
            found = outcomes[row.name]
            progress.update(bar, advance=min(len(found), seeds), description=row.name)
            for outcome in trained(run, range(len(found), seeds)):
                found.append(outcome)
                content = {"run": row.identity, "outcomes": found}
                (work / f"{row.name}.json").write_text(json.dumps(content) + "\n", "utf-8")
                progress.update(bar, advance=1)
    return {name: found[:seeds] for name, found in outcomes.items()}


def kept(row: Row, work: Path) -> list[Outcome]:
    """What is there already of a row, unless the row was another one then."""
    try:
        content = json.loads((work / f"{row.name}.json").read_text("utf-8"))
    except (FileNotFoundError, ValueError):  # none yet, or cut short by a full disk
        return []
    if content["run"] != row.identity:
        return []
    return [Outcome(*values) for values in content["outcomes"]]


def ready(run: nfflax.Run) -> nfflax.Run:
    """The run in full length, once its images are found to suit it."""
    source = open_source(run.data, run.data.train)
    run = sized(run, source)
    check_source(run, source)
    check_source(run, open_source(run.data, run.data.eval))
    return run


def trained(run: nfflax.Run, seeds: range) -> Iterator[Outcome]:
    """Train a row once for each seed, on one device.

    All share one compiled step, which costs more than the steps of a small run: where it is random,
    by dropout say, it draws alike for all of them. Initial weights and images are each seed's own.
    """
    if not seeds:
        return
    source, held_out = (open_source(run.data, split) for split in (run.data.train, run.data.eval))
    mesh = make_mesh(run.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        program = make_program(run, mesh)
        for seed in seeds:
            own = make_program(nfflax.load_run(run, {"train.seed": seed}), mesh)
            with own.feed(source, 0) as batches:
                state, seconds = fitted(program, own.init(), batches)
            chance = 1 / run.spec.head.num_classes
            top1 = accuracy(program, state, held_out) if state else chance
            yield Outcome(top1, diverged=state is None, step_seconds=seconds)


def fitted(program: Program, state: Any, batches: Iterator[Any]) -> tuple[Any, float]:
    """The trained state, or None where a gradient was no longer finite; the fastest step's time."""
    seconds = []
    for _ in range(program.run.steps):
        batch = program.put(next(batches), program.run.train.batch_size)
        start = time.perf_counter()
        state, metrics = program.train_step(state, batch)
        norm = float(metrics["guard/norm"])
        seconds.append(time.perf_counter() - start)
        if not math.isfinite(norm):
            return None, min(seconds)
    return state, min(seconds)


def accuracy(program: Program, state: Any, images: Source) -> float:
    """Share of right answers, of the parameters' average where the run keeps one."""
    weights = {"": state["params"]} | ({AVERAGE: state["ema"]} if "ema" in state else {})
    return best(evaluate(program, weights, state["stats"], images), "top1")


def record(row: Row, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """All that the table tells of a row, as JSON has it; shares in %."""
    plan, top1 = nfflax.plan(row.run.spec), [100 * outcome.top1 for outcome in outcomes]
    return {
        "row": row.name,
        "extends": row.line[:-1],
        "summary": row.run.summary,
        "top1": top1,
        "mean": statistics.mean(top1),
        "spread": statistics.pstdev(top1),
        "diverged": sum(outcome.diverged for outcome in outcomes),
        "paper": PAPERS.get(row.name),
        "params": plan.params,
        "macs": plan.macs(),
        "step_ms": 1000 * min(outcome.step_seconds for outcome in outcomes),
    }


def table(records: Sequence[dict[str, Any]]) -> Table:
    """The rows for people."""
    found = Table("row", "top-1 in %", "in the paper")
    for header in ("params", "MACs", "ms/step"):
        found.add_column(header, justify="right")
    for row in records:
        paper = f"{row['paper']['from']} → {row['paper']['to']}" if row["paper"] else ""
        top1 = f"{row['mean']:.1f} ± {row['spread']:.1f}"
        if row["diverged"]:
            top1 += f", {row['diverged']} of {len(row['top1'])} diverged"
        costs = human(row["params"]), human(row["macs"]), f"{row['step_ms']:.1f}"
        found.add_row("  " * len(row["extends"]) + row["row"], top1, paper, *costs)
    return found


if __name__ == "__main__":
    sys.exit(main())
