"""Which charts a run's metrics become; of several runs, the same charts with a line for each."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from nfflax.insight.report_chart import COLORS, Across, Chart, Form, Line, Marks, steps_across
from nfflax.insight.report_record import Record
from nfflax.train.curve import smooth
from nfflax.train.history import AVERAGE

Look = tuple[int, Form]

_GRAY = 5  # the colour of what is no part, no run and no evaluation
_FORMS: tuple[Form, ...] = ("solid", "dashed", "dotted")  # of lines whose colours begin anew
_PALE = "; pale: as logged, else a running mean"

_LEARNT: dict[str, tuple[str, str, dict[str, Any]]] = {
    "top1": (
        "top-1 accuracy",
        "Share of images whose likeliest class is right; in training, of batches as augmented.",
        {"kind": "share", "robust": "low", "is_wide": True},
    ),
    "loss": (
        "loss",
        "Cross entropy; in training with smoothed labels, where the run smooths them.",
        {"robust": "high", "is_wide": True},
    ),
    "top5": (
        "top-5 accuracy",
        "Share of images whose class is among the five likeliest.",
        {"kind": "share", "robust": "low"},
    ),
}
_LOGGED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "learning_rate": ("learning rate", "The rate at each step.", {"low": 0}),
    "guard/norm": (
        "gradient norm",
        f"Of the whole gradient before clipping{_PALE}.",
        {"is_log": True},
    ),
    "clipped": (
        "units clipped",
        f"Share of the units whose gradient was clipped{_PALE}.",
        {"kind": "share", "low": 0},
    ),
    "clip_ratio": (
        "largest gradient-to-weight ratio",
        f"Of the norms of a unit, before clipping{_PALE}.",
        {"is_log": True},
    ),
    "images_per_second": (
        "images per second",
        "Over the last 100 steps, without evaluating and saving.",
        {"kind": "count", "low": 0},
    ),
    "input_wait": (
        "input wait",
        f"Share of the time spent waiting for images{_PALE}.",
        {"kind": "share", "low": 0},
    ),
    "guard/skipped": (
        "skipped steps",
        "Steps that the divergence guard left out so far.",
        {"kind": "count", "low": 0},
    ),
}
_BY_PART = ("clipped", "clip_ratio")  # told for each part of the network too
_EXACT = ("learning_rate", "guard/skipped")  # free of noise: a mean would blur them


def curves(records: Sequence[Record]) -> Iterator[Chart]:
    """Every chart there could be; those without a point are not drawn."""
    across = _across(records)
    several = len(records) > 1
    for name, (title, about, style) in _LEARNT.items():
        if several:
            about = "Of the average of the weights, where the run keeps one."
        lines = _evaluated(records, name) if several else _learnt(records[0], name)
        yield Chart(f"{title}, evaluation" if several else title, about, lines, across, **style)
    if several:
        for name in ("top1", "loss"):
            title, _, style = _LEARNT[name]
            about = "Of batches as augmented; a running mean."
            chart = Chart(f"{title}, training", about, _of_each(records, name), across, **style)
            yield dataclasses.replace(chart, is_wide=False)
    for name, (title, about, style) in _LOGGED.items():
        if name == "guard/skipped" and not any(map(skips, records)):
            continue
        lines = _of_each(records, name) if several else _of_one(records[0], name)
        about = about.replace(_PALE, "; a running mean") if several else about
        yield Chart(title, about, lines, across, **style)


def skips(record: Record) -> list[int]:
    """The logged steps by which the guard had skipped more than before."""
    steps, counts = record.series("train", "guard/skipped")
    rises = np.diff(counts, prepend=0) > 0
    return [int(step) for step in steps[rises]]


def _across(records: Sequence[Record]) -> Across:
    """Steps, and epochs where all runs agree on their length."""
    epochs = {record.steps_per_epoch for record in records}
    marks = []
    if len(records) == 1:
        (record,) = records
        marks = [Marks("resumed", record.resumed), Marks("step skipped", skips(record), True)]
        marks = [mark for mark in marks if mark.at]
    last = max(record.step for record in records)
    return steps_across(last, epochs.pop() if len(epochs) == 1 else None, marks)


def _learnt(record: Record, name: str) -> list[Line]:
    """Of one run: in training, of the parameters, and of their average."""
    raw = "evaluation, raw" if record.average else "evaluation"
    return [
        *_noisy("training", record, name, (_GRAY, "solid")),
        Line(raw, *record.series("eval", name), 0),
        Line("evaluation, average", *record.series("eval", f"{AVERAGE}{name}"), 1),
    ]


def _evaluated(records: Sequence[Record], name: str) -> list[Line]:
    return [
        Line(record.label, *record.series("eval", f"{record.average}{name}"), *look)
        for record, look in zip(records, _looks(len(records)), strict=True)
    ]


def _of_each(records: Sequence[Record], name: str) -> list[Line]:
    """One line for every run."""
    lines = []
    for record, look in zip(records, _looks(len(records)), strict=True):
        steps, values = record.series("train", name)
        lines.append(Line(record.label, steps, _calm(name, values), *look))
    return lines


def _of_one(record: Record, name: str) -> list[Line]:
    """A number of one run and what belongs to it: its parts, or what it is held against."""
    if name in _EXACT:
        return [Line(_word(name), *record.series("train", name), 0)]
    if name not in _BY_PART:
        usual = record.series("train", "guard/typical_norm" if name == "guard/norm" else "")
        return [*_noisy(_word(name), record, name, (0, "solid")), Line("usual", *usual, 1)]
    parts = [key.partition("/")[2] for key in record.names("train", f"{name}/")]
    lines = list(_noisy("whole network", record, name, (_GRAY, "solid")))
    parts.sort(key=_depth)
    for part, look in zip(parts, _looks(len(parts), without=_GRAY), strict=True):
        steps, values = record.series("train", f"{name}/{part}")
        lines.append(Line(part, steps, smooth(values), *look))
    return lines


def _noisy(label: str, record: Record, name: str, look: Look) -> Iterator[Line]:
    """A number as it was logged, pale, and its running mean."""
    steps, values = record.series("train", name)
    yield Line("", steps, values, look[0], "faint")
    yield Line(label, steps, smooth(values), *look)


def _calm(name: str, values: np.ndarray) -> np.ndarray:
    return values if name in _EXACT else smooth(values)


def _depth(part: str) -> tuple[int, str]:
    """Sorts the parts of a network from the image to the classes."""
    starts = ("stem", "stages", "final", "classifier")
    found = [i for i, start in enumerate(starts) if part.startswith(start)]
    return (found[0] if found else len(starts), part)


def _looks(count: int, without: int | None = None) -> list[Look]:
    """So many colours and forms of lines, no two alike as long as there are enough."""
    rounds: list[Look] = [
        (color, form) for form in _FORMS for color in range(COLORS) if color != without
    ]
    return [rounds[i % len(rounds)] for i in range(count)]


def _word(name: str) -> str:
    """What a lone line is called."""
    words = {"learning_rate": "rate", "guard/norm": "norm", "guard/skipped": "skipped"}
    return words.get(name, name.replace("_", " "))
