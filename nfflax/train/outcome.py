"""What a run came to: as data, as a table that closes it, and as JSON for programs."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from nfflax.spec.table import human
from nfflax.train.checkpoint import FOLDER
from nfflax.train.curve import CURVE
from nfflax.train.history import AVERAGE, METRICS, json_number
from nfflax.train.meter import duration


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run, or the part of it that was carried out, came to."""

    workdir: Path
    step: int
    """Updates made in all."""
    steps: int
    """Length of the whole run."""
    seconds: float
    """Time this process took, compilation included."""
    images_per_second: float | None
    """While training; None before the second step."""
    parameters: int
    evaluation: Mapping[str, float]
    """The last one: loss, top1, top5, and the average's under `ema/`. Empty without any."""
    stopped: int | None = None
    """The exit code of having been told to stop (`nfflax.train.stopping`), or None."""

    @property
    def files(self) -> dict[str, Path]:
        """What the run has left: checkpoints, metrics, curve."""
        names = {"checkpoints": FOLDER, "metrics": METRICS, "curve": CURVE}
        paths = {what: self.workdir / name for what, name in names.items()}
        return {what: path for what, path in paths.items() if path.exists()}


def closing_table(result: Result) -> Table:
    """The result for people."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, fact in _facts(result):
        table.add_row(name, fact)
    return table


def closing_data(result: Result) -> dict[str, Any]:
    """The result for programs."""
    data = dataclasses.asdict(result)
    rate = result.images_per_second
    return data | {
        "workdir": str(result.workdir),
        "images_per_second": None if rate is None else json_number(rate),
        "evaluation": {name: json_number(value) for name, value in result.evaluation.items()},
        "files": {what: str(path) for what, path in result.files.items()},
    }


def _facts(result: Result) -> Iterator[tuple[str, str]]:
    """What there is to tell, by name."""
    found, is_over = result.evaluation, result.step >= result.steps
    if f"{AVERAGE}top1" in found:
        yield "eval, EMA", _scores(found, AVERAGE)
        yield "eval, raw", _scores(found, "")
    elif found:
        yield "eval", _scores(found, "")
    rest = "" if is_over else f" of {result.steps:,} · --resume goes on from here"
    yield "steps", f"{result.step:,}{rest}"
    rate = result.images_per_second
    pace = f" · {rate:,.{0 if rate >= 10 else 1}f} images/s" if rate else ""
    yield "time", f"{duration(result.seconds)}{pace}"
    yield "parameters", human(result.parameters, 2)
    for what, path in result.files.items():
        yield what, str(path)


def _scores(found: Mapping[str, float], prefix: str) -> str:
    """The accuracies and the loss of one set of weights."""
    top1, top5, loss = (found[f"{prefix}{name}"] for name in ("top1", "top5", "loss"))
    return f"top-1 {top1:.2%} · top-5 {top5:.2%} · loss {loss:.4g}"
