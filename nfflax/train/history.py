"""The metrics of a run, written down as it goes: metrics.jsonl, TensorBoard, Weights & Biases.

metrics.jsonl is the record: one JSON object per line, a line per logged step and per evaluation. It
tells no step twice: a resumed run cuts off what came after its checkpoint and writes it again.
"""

import contextlib
import importlib
import json
import math
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from nfflax.spec.errors import Problem, SpecError
from nfflax.spec.run import Run
from nfflax.train.errors import TrainError

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
WANDB = "wandb"
AVERAGE = "ema/"  # before the names of what the parameters' average reached

_FLUSH_SECONDS = 10  # how far TensorBoard may lag behind

_Writer = Callable[[int, str, Mapping[str, float]], None]


class History:
    """Writes a run's metrics into its folder. A context manager; in one process only.

    `start` is the step that the run goes on from: 0, or that of the checkpoint it resumes.
    """

    def __init__(self, workdir: Path, run: Run, *, start: int = 0):
        self.notes: list[str] = []
        """What a person should know: where metrics go besides, and where they do not."""
        self._every = run.log.every
        self._path = workdir / METRICS
        with contextlib.ExitStack() as stack:
            self._others = list(self._other_writers(workdir, run, start, stack))
            with _told(self._path):
                self._last = _cut(self._path, start)
            self._stack = stack.pop_all()

    def train(self, step: int, values: Mapping[str, float]) -> None:
        """Write down a training step, where it is one of those that `log.every` picks."""
        if step % self._every == 0:
            self.write(step, "train", values)

    def write(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """Write down the values of a step, "train" or "eval", unless that has been done.

        JSON knows neither NaN nor infinity: metrics.jsonl holds null for them.
        """
        if step <= self._last.get(kind, -1):
            return
        self._last[kind] = step
        head = {"step": step, "kind": kind, "time": round(time.time(), 3)}
        line = head | {name: json_number(value) for name, value in values.items()}
        with _told(self._path), open(self._path, "a", encoding="ascii") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
        for write in self._others:
            write(step, kind, values)

    def _other_writers(
        self, workdir: Path, run: Run, start: int, stack: contextlib.ExitStack
    ) -> Iterator[_Writer]:
        if run.log.wandb:
            yield self._wandb(workdir, run, stack)
        if run.log.tensorboard and (writer := self._tensorboard(workdir, start, stack)):
            yield writer

    def _tensorboard(
        self, workdir: Path, start: int, stack: contextlib.ExitStack
    ) -> _Writer | None:
        try:
            from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]
        except ModuleNotFoundError:
            hint = 'pip install "nfflax[tensorboard]"'
            self.notes.append(f"TensorBoard's files are not written: {hint}")
            return None
        except Exception as error:  # it is on by default: a broken protobuf must not stop a run
            self.notes.append(f"TensorBoard's files are not written: {error}")
            return None
        # purge_step hides what a killed run wrote beyond the checkpoint that this one goes on from
        board = SummaryWriter(
            str(workdir / TENSORBOARD), purge_step=start + 1, flush_secs=_FLUSH_SECONDS
        )
        stack.callback(board.close)

        def write(step: int, kind: str, values: Mapping[str, float]) -> None:
            for name, value in values.items():
                if math.isfinite(value):  # it complains of others, at every one
                    board.add_scalar(f"{kind}/{name}", value, step)

        return write

    def _wandb(self, workdir: Path, run: Run, stack: contextlib.ExitStack) -> _Writer:
        wandb = _import_wandb(run)
        with _refusals(wandb, run):
            tracked = wandb.init(
                project=run.log.wandb,
                name=run.name,
                id=_wandb_id(workdir),
                resume="allow",
                config=run.model_dump(mode="json"),
                dir=str(workdir),
                # It would copy every frame of a progress bar, and talk where we draw one.
                settings=wandb.Settings(console="off", silent=True),
            )
        stack.push(lambda kind, *_: tracked.finish(exit_code=0 if kind is None else 1))
        where = "offline, see `wandb sync`" if tracked.offline else tracked.url
        self.notes.append(f"Weights & Biases: {where}")
        # Its own count of steps only grows, which would drop what a resumed run tells again.
        tracked.define_metric("train/*", step_metric="step")
        tracked.define_metric("eval/*", step_metric="step")

        def write(step: int, kind: str, values: Mapping[str, float]) -> None:
            tagged = {f"{kind}/{name}": value for name, value in values.items()}
            tracked.log({"step": step} | tagged)

        return write

    def __enter__(self) -> "History":
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)


def ready_wandb(run: Run) -> None:
    """Log in where `log.wandb` asks for that, or say in an error what is missing.

    On a terminal it may ask for a key, so call it before a progress bar is there.
    """
    if run.log.wandb:
        wandb = _import_wandb(run)
        with _refusals(wandb, run):
            wandb.login()


def read_history(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, null as NaN. A last line that was cut short is left out."""
    entries = []
    with open(path, "rb") as file:
        for line in file:
            entry = _entry(line)
            if entry is not None:
                entries.append({k: math.nan if v is None else v for k, v in entry.items()})
    return entries


def best(values: Mapping[str, float], name: str) -> float:
    """The average's number where there is an average, which is then what the run is about."""
    return values.get(f"{AVERAGE}{name}", values[name])


def json_number(value: float) -> float | None:
    """A number as JSON can hold it: null for NaN and infinities."""
    number = value if isinstance(value, int) else float(value)
    return number if math.isfinite(number) else None


def _cut(path: Path, start: int) -> dict[str, int]:
    """End the file before the first line of a later step, or the first that is not whole.

    Returns the last step that is left of each kind.
    """
    last: dict[str, int] = {}
    length = 0
    path.touch()
    with open(path, "rb") as file:
        for line in file:
            entry = _entry(line)
            if entry is None or entry["step"] > start:
                break
            last[entry["kind"]] = entry["step"]
            length += len(line)
    os.truncate(path, length)
    return last


def _entry(line: bytes) -> dict[str, Any] | None:
    """A line of metrics.jsonl; None when it is not whole, as after a crash."""
    try:
        entry = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    is_whole = isinstance(entry, dict) and isinstance(entry.get("step"), int) and "kind" in entry
    return entry if is_whole else None


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """Says in one sentence what the operating system refuses."""
    try:
        yield
    except OSError as error:
        raise TrainError(f"{path} cannot be written: {error.strerror or error}") from None


def _wandb_id(workdir: Path) -> str:
    """The run's id at Weights & Biases, kept in its folder so that resuming goes on with it."""
    path = workdir / WANDB / "run_id"
    with _told(path):
        if path.exists() and (kept := path.read_text("ascii").strip()):
            return kept
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(made := uuid.uuid4().hex[:8], "ascii")
    return made


def _import_wandb(run: Run) -> Any:
    try:
        return importlib.import_module("wandb")
    except ModuleNotFoundError:
        message = "needs the package wandb, which is not installed"
        raise _wandb_error(run, message, 'pip install "nfflax[wandb]"') from None


@contextlib.contextmanager
def _refusals(wandb: Any, run: Run) -> Iterator[None]:
    """Turns what Weights & Biases refuses, for want of a key, say, into an error of the run."""
    try:
        yield
    except wandb.Error as error:
        message = f"Weights & Biases cannot be used: {error}"
        raise _wandb_error(run, message, "wandb login, or WANDB_MODE=offline") from None


def _wandb_error(run: Run, message: str, allowed: str) -> SpecError:
    return SpecError([Problem(f"run {run.name}", "log.wandb", message, run.log.wandb, allowed)])
