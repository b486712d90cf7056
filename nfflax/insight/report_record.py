"""What a run's folder says of the run, read so that damage costs only what is damaged."""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from nfflax.spec.errors import Problem, SpecError, nearest
from nfflax.spec.load import load_run, load_spec
from nfflax.spec.run import Run
from nfflax.spec.schema import Spec
from nfflax.train.checkpoint import FOLDER as CHECKPOINTS
from nfflax.train.errors import CheckpointError
from nfflax.train.events import EVENTS, read_events
from nfflax.train.history import AVERAGE, METRICS, read_history
from nfflax.train.workdir import RUN, SPEC, VERSIONS

Series = tuple[np.ndarray, np.ndarray]
"""Steps, ascending, and the values at them; NaN where a value was not finite."""

_FAR = 1 << 53  # steps beyond are no steps: floats cannot tell them apart
_FLOAT32_MAX = float(np.finfo(np.float32).max)
_LATE = 1e11  # times beyond are no times: the year 5138


@dataclasses.dataclass(frozen=True)
class Stretch:
    """What one process did of a run, from its start to its end."""

    start: int
    end: int | None
    """The step that it ended at; None where it was killed, or is still at work."""
    began: float
    """In seconds since 1970."""
    ended: float | None
    error: str
    """What ended it, if that was an error."""
    devices: str
    """Such as "8 x TPU v4, 2 processes"; empty where it was not written down."""


@dataclasses.dataclass(frozen=True)
class Record:
    """A run's folder, read."""

    folder: Path
    label: str
    """What the report calls the run; no other run on the page is called so."""
    run: Run | None
    spec: Spec | None
    versions: Mapping[str, str]
    lines: Mapping[str, list[dict[str, Any]]]
    """The lines of metrics.jsonl by kind, "train" and "eval"."""
    stretches: tuple[Stretch, ...]
    checkpoints: tuple[int, ...]
    """The steps that checkpoints are kept of."""
    notes: tuple[str, ...]
    """What is missing or damaged."""

    @property
    def step(self) -> int:
        """The last one that the folder tells of."""
        told = [self.lines[kind][-1]["step"] for kind in self.lines if self.lines[kind]]
        ends = [stretch.end for stretch in self.stretches[-1:] if stretch.end is not None]
        return max([0, *told, *ends, *self.checkpoints[-1:]])

    @property
    def length(self) -> int | None:
        """Steps of the whole run; None where they are not known."""
        return self.run.train.length if self.run else None

    @property
    def steps_per_epoch(self) -> float | None:
        """Steps in one pass over the images; None where that is not known."""
        return self.run.train.steps_per_epoch if self.run else None

    @property
    def state(self) -> str:
        """How the run stands, in a word or two."""
        last = self.stretches[-1] if self.stretches else None
        if last and last.error:
            return "diverged" if last.error.startswith("DivergedError") else "failed"
        if self.length and self.step >= self.length:
            return "finished"
        if last and last.end is not None:
            return "stopped"
        return "unfinished" if self.step or last else "not begun"

    @property
    def resumed(self) -> list[int]:
        """The steps at which later processes took the run up."""
        return [stretch.start for stretch in self.stretches[1:]]

    @property
    def average(self) -> str:
        """What stands before the names of the weights' numbers that the run is about."""
        return AVERAGE if any(f"{AVERAGE}top1" in line for line in self.lines["eval"]) else ""

    @property
    def best(self) -> Mapping[str, Any] | None:
        """The evaluation with the highest top-1 accuracy, the first of equals."""
        name = f"{self.average}top1"
        found = [line for line in self.lines["eval"] if math.isfinite(line.get(name, math.nan))]
        return max(found, key=lambda line: line[name], default=None)

    @property
    def last(self) -> Mapping[str, Any] | None:
        """The last evaluation."""
        return self.lines["eval"][-1] if self.lines["eval"] else None

    def series(self, kind: str, name: str) -> Series:
        """One number of the "train" or "eval" lines over the steps; empty where there is none."""
        found = [(line["step"], line[name]) for line in self.lines[kind] if name in line]
        pairs = np.array(found, np.float64).reshape(-1, 2)
        return pairs[:, 0], pairs[:, 1]

    def names(self, kind: str, start: str) -> list[str]:
        """The numbers of the lines of a kind whose names begin so, in order."""
        return sorted(
            {name for line in self.lines[kind] for name in line if name.startswith(start)}
        )

    @property
    def seconds(self) -> float | None:
        """Time at work, all stretches together, as far as it was written down."""
        times = self._times
        if not self.stretches:
            return max(times) - min(times) if len(times) > 1 else None
        total, begins = 0.0, [stretch.began for stretch in self.stretches]
        for stretch, next_begin in zip(self.stretches, [*begins[1:], math.inf], strict=True):
            within = [time for time in times if stretch.began <= time < next_begin]
            total += max(0.0, (stretch.ended or max(within, default=stretch.began)) - stretch.began)
        return total

    @property
    def began(self) -> float | None:
        """When the run first started, in seconds since 1970."""
        times = [*(stretch.began for stretch in self.stretches[:1]), *self._times]
        return min(times, default=None)

    @property
    def _times(self) -> list[float]:
        """When lines were written."""
        return [
            line["time"]
            for lines in self.lines.values()
            for line in lines
            if _is_time(line.get("time"))
        ]


def read_records(folders: list[Path]) -> list[Record]:
    """Read every folder; raises CheckpointError, with all of them, if some hold no run."""
    problems = [problem for folder in folders for problem in _problems(folder)]
    if problems:
        raise CheckpointError(problems)
    return [_read(folder, label) for folder, label in zip(folders, _labels(folders), strict=True)]


def _problems(folder: Path) -> list[Problem]:
    """Why a path is no run's folder; empty where it is one."""
    if not folder.is_dir():
        there = [path.name for path in folder.parent.iterdir()] if folder.parent.is_dir() else []
        message = "is no folder" if folder.exists() else "does not exist"
        near = nearest(folder.name, there)
        near = str(folder.parent / near) if near and not folder.exists() else ""
        return [Problem(str(folder), "", message, allowed="a run's folder", nearest=near)]
    if any((folder / name).exists() for name in (RUN, METRICS, CHECKPOINTS)):
        return []
    message = f"holds no run: there is no {RUN}, no {METRICS} and no {CHECKPOINTS}"
    runs = sorted(path.parent.name for path in folder.glob(f"*/{RUN}"))
    inside = f"{folder}/{runs[0]}" if runs else ""
    return [Problem(str(folder), "", message, allowed="a run's folder", nearest=inside)]


def _labels(folders: list[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    parts = [folder.absolute().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(part[-length:]) for part in parts]
        if len(set(labels)) == len(labels):
            return labels
    return [f"{folder.name} ({number})" for number, folder in enumerate(folders, 1)]


def _read(folder: Path, label: str) -> Record:
    notes: list[str] = []
    run = _told(folder / RUN, load_run, notes)
    spec = run.spec if run else _told(folder / SPEC, load_spec, notes)
    versions = _told(folder / VERSIONS, _versions, notes) or {}
    lines = _told(folder / METRICS, functools.partial(_lines, notes=notes), notes)
    if lines and not lines["eval"]:
        notes.append("There has been no evaluation yet.")
    events = _told(folder / EVENTS, read_events, []) or []
    checkpoints = _checkpoints(folder)
    if not checkpoints:
        notes.append("There is no checkpoint.")
    lines = lines or {"train": [], "eval": []}
    stretches = tuple(_stretches(events))
    return Record(folder, label, run, spec, versions, lines, stretches, checkpoints, tuple(notes))


def _told(path: Path, read: Callable[[Path], Any], notes: list[str]) -> Any:
    """What `read` makes of a file; None, and a note, where it cannot be read."""
    if not path.exists():
        notes.append(f"There is no {path.name}.")
        return None
    try:
        return read(path)
    except SpecError as error:
        reason = error.problems[0].message
    except OSError as error:
        reason = error.strerror
    except (ValueError, RecursionError):
        reason = "it is damaged"
    notes.append(f"{path.name} cannot be read: {reason}.")
    return None


def _versions(path: Path) -> dict[str, str]:
    versions = json.loads(path.read_text("utf-8"))
    if not isinstance(versions, dict):
        raise ValueError("no table")
    return {str(name): str(version) for name, version in versions.items()}


def _lines(path: Path, notes: list[str]) -> dict[str, list[dict[str, Any]]]:
    """The lines of metrics.jsonl by kind: those with a step, and of them what is a number."""
    entries = read_history(path)
    kept: dict[str, dict[int, dict[str, Any]]] = {"train": {}, "eval": {}}
    damaged = sum(1 for line in path.read_bytes().splitlines() if line.strip()) - len(entries)
    for entry in entries:
        kind, step = entry["kind"], entry["step"]
        if kind not in ("train", "eval") or not _is_step(step):
            damaged += 1
            continue
        numbers = {key: _plain(value) for key, value in entry.items() if _is_number(value)}
        kept[kind][step] = numbers | {"step": step}
    if damaged:
        are = "1 line is" if damaged == 1 else f"{damaged:,} lines are"
        notes.append(f"{METRICS}: {are} damaged and left out.")
    return {kind: [by_step[step] for step in sorted(by_step)] for kind, by_step in kept.items()}


def _is_step(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _FAR


def _is_time(value: Any) -> TypeGuard[float]:
    """Whether this could be a moment, in seconds since 1970."""
    return isinstance(value, int | float) and 0 <= value < _LATE


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _plain(value: float) -> float:
    """The number where float32 could hold it, and NaN where it could not."""
    return float(value) if abs(value) <= _FLOAT32_MAX else math.nan


def _stretches(events: list[dict[str, Any]]) -> list[Stretch]:
    """The events two by two."""
    found: list[Stretch] = []
    for event in events:
        step, time = event.get("step"), event.get("time")
        if not _is_step(step) or not _is_time(time):
            continue
        if event["event"] == "start":
            found.append(Stretch(step, None, time, None, "", _devices(event)))
        elif found and found[-1].end is None:
            error = str(event.get("error", ""))
            found[-1] = dataclasses.replace(found[-1], end=step, ended=time, error=error)
    return found


def _devices(event: Mapping[str, Any]) -> str:
    count, processes = event.get("devices"), event.get("processes")
    if not isinstance(count, int) or not isinstance(processes, int):
        return ""
    several = f", {processes} processes" if processes > 1 else ""
    return f"{count} × {event.get('device')}{several}"  # noqa: RUF001 - the sign is meant


def _checkpoints(folder: Path) -> tuple[int, ...]:
    place = folder / CHECKPOINTS
    names = [path.name for path in place.iterdir() if path.is_dir()] if place.is_dir() else []
    return tuple(sorted(int(name) for name in names if name.isdecimal() and len(name) < 16))
