"""A line chart as inline SVG inside plain HTML.

The picture stretches with the page while text keeps its size: lines are drawn in a square of
1000 x 1000 units that fills its box, and all labels are HTML around it. The script of the page adds
values under the pointer from `data-chart`; without it the legend tells the last ones.
"""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np

from nfflax.insight.report_html import Html, joined, tag
from nfflax.insight.report_scale import Scale, fitted, number, thinned, tick_labels

COLORS = 8
"""How many colours the style sheet has; a line more than that begins anew with another dash."""

Form = Literal["solid", "dashed", "dotted", "faint"]

_SIDE = 1000  # units of the picture each way
_Y_TICKS, _X_TICKS = 5, 6
_DOTTED = 25  # points of a line that are also marked one by one
_LEAST = 1e-45  # of a logarithmic axis: float32's least
_TICK = 50  # units of the picture that a tick is high
_TOLD = 20  # places of marks that a description tells
_DIGITS = 6  # of a value that the script shows


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of a chart."""

    label: str
    """In the legend; empty for a line that only stands behind another of its colour."""
    x: np.ndarray
    y: np.ndarray
    color: int
    form: Form = "solid"


@dataclasses.dataclass(frozen=True)
class Ticks:
    """One row of labels below a chart."""

    unit: str
    at: Sequence[float]
    labels: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Marks:
    """Places along a chart where something happened: lines all the way up, or ticks at the foot."""

    word: str
    """In the legend; empty where they need no explanation."""
    at: Sequence[float]
    is_tick: bool = False


@dataclasses.dataclass(frozen=True)
class Across:
    """The horizontal axis: its range and the rows of labels below it."""

    low: float
    high: float
    rows: Sequence[Ticks]
    epoch: float | None = None
    """Steps in an epoch, where those are told too."""
    marks: Sequence[Marks] = ()


@dataclasses.dataclass(frozen=True)
class Chart:
    """What is drawn. Made into HTML by `draw`."""

    title: str
    about: str
    """What it shows, in a sentence: below the title, and for those who cannot see it."""
    lines: Sequence[Line]
    across: Across
    kind: Literal["", "share", "count"] = ""
    low: float | None = None
    high: float | None = None
    is_log: bool = False
    robust: Literal["", "low", "high"] = ""
    is_wide: bool = False


def steps_across(last: float, epoch: float | None, marks: Sequence[Marks]) -> Across:
    """The axis of steps from 0 to the last, and below it epochs where their length is known."""
    high = max(last, 1.0)
    ticks = Scale(0, high).ticks(_X_TICKS)
    rows = [Ticks("step", ticks, tick_labels(ticks))]
    if epoch:
        epochs = Scale(0, high / epoch).ticks(_X_TICKS)
        rows.append(Ticks("epoch", [tick * epoch for tick in epochs], tick_labels(epochs)))
    return Across(0, high, rows, epoch, marks)


def draw(charts: Iterable[Chart], key: str) -> Html:
    """A grid of charts; `key` sets their ids apart from those of other grids on the page."""
    drawn = (_figure(chart, f"{key}-{i}") for i, chart in enumerate(charts) if _shows(chart))
    return tag("div", joined(drawn), class_="charts")


def _shows(chart: Chart) -> bool:
    return any(np.isfinite(line.y).any() for line in chart.lines)


def _figure(chart: Chart, name: str) -> Html:
    """One chart with its title, legend, picture and labels."""
    lines = [
        dataclasses.replace(line, x=x, y=y)
        for line in chart.lines
        for x, y in [_points(line, chart.is_log)]
        if len(x)
    ]
    ends = {"low": chart.low, "high": chart.high, "is_log": chart.is_log, "robust": chart.robust}
    scale = fitted([line.y for line in lines], **ends)
    heading = f"{name}-title"
    return tag(
        "figure",
        tag("figcaption", tag("h3", chart.title, id=heading), tag("p", chart.about)),
        _legend(chart, lines),
        tag(
            "div",
            _heights(chart, scale),
            tag(
                "div",
                _picture(chart, lines, scale, name),
                tag("div", class_="cursor"),
                tag("div", class_="tip", role="status"),
                class_="area",
                tabindex=0,
                role="group",
                aria_labelledby=heading,
            ),
            [_row(row, chart.across) for row in chart.across.rows],
            class_="plot",
        ),
        class_="chart wide" if chart.is_wide else "chart",
        data_chart=_data(chart, lines, scale),
    )


def _points(line: Line, is_log: bool) -> tuple[np.ndarray, np.ndarray]:
    """The points that can be drawn."""
    y = np.where(line.y > _LEAST, line.y, np.nan) if is_log else line.y
    return thinned(line.x, y)


def _legend(chart: Chart, lines: Sequence[Line]) -> Html:
    """Every line's name and last value; in the wide charts, what the marks in all of them mean."""
    items = (
        tag(
            "li",
            _key("M1 5H23", _line_class(line)),
            line.label,
            " ",
            tag("b", number(line.y[-1], chart.kind)),
        )
        for line in lines
        if line.label
    )
    marks = (
        tag("li", _key("M4 0V10", _mark_class(marks), 8), marks.word)
        for marks in chart.across.marks
        if marks.word and chart.is_wide
    )
    return tag("ul", items, marks, class_="legend")


def _key(d: str, look: str, width: int = 24) -> Html:
    """A short piece of a line, for a legend."""
    stroke = tag("path", d=d, class_=look)
    size = {"viewBox": f"0 0 {width} 10", "width": width, "height": 10}
    return tag("svg", stroke, **size, class_="key", aria_hidden="true")


def _line_class(line: Line) -> str:
    return f"line {line.form} c{line.color % COLORS}"


def _mark_class(marks: Marks) -> str:
    return "tick" if marks.is_tick else "mark"


def _heights(chart: Chart, scale: Scale) -> Html:
    """The labels left of the picture. The longest is there twice, unseen, to give them room."""
    ticks = _ticks(chart, scale)
    labels = tick_labels(ticks, chart.kind if chart.kind == "share" else "")
    places = scale.place(np.array(ticks, np.float64))
    widest = max(labels, key=len, default="")
    return tag(
        "div",
        tag("span", widest, class_="room"),
        (
            tag("span", label, style=f"bottom:{100 * place:.2f}%")
            for label, place in zip(labels, places, strict=True)
        ),
        class_="heights",
        aria_hidden="true",
    )


def _ticks(chart: Chart, scale: Scale) -> list[float]:
    """Where the grid's lines lie; counts have no halves."""
    ticks = scale.ticks(_Y_TICKS)
    return [tick for tick in ticks if chart.kind != "count" or tick == round(tick)]


def _row(row: Ticks, across: Across) -> Html:
    """One row of labels below the picture."""
    places = Scale(across.low, across.high).place(np.array(row.at, np.float64))
    labels = (
        tag("span", label, style=f"left:{100 * place:.2f}%")
        for label, place in zip(row.labels, places, strict=True)
    )
    return tag("div", tag("em", row.unit), tag("div", labels), class_="row", aria_hidden="true")


def _picture(chart: Chart, lines: Sequence[Line], scale: Scale, name: str) -> Html:
    """The lines on their grid."""
    across = Scale(chart.across.low, chart.across.high)
    heights = scale.place(np.array(_ticks(chart, scale), np.float64))
    grid = "".join(f"M0 {_down(y)}H{_SIDE}" for y in heights)
    parts = [tag("path", d=grid, class_="grid")]
    for marks in chart.across.marks:
        top = _SIDE - _TICK if marks.is_tick else 0
        xs = _SIDE * across.place(np.array(marks.at, np.float64))
        d = "".join(f"M{x:.1f} {top}V{_SIDE}" for x in dict.fromkeys(xs.round(1).tolist()))
        parts.append(tag("path", d=d, class_=_mark_class(marks)))
    for line in lines:
        x, y = across.place(line.x), np.clip(scale.place(line.y), 0, 1)
        places = [f"{_SIDE * a:.1f} {_down(b)}" for a, b in zip(x, y, strict=True)]
        d = "M" + "L".join(places)
        parts.append(tag("path", d=d, class_=_line_class(line)))
        if len(places) <= _DOTTED:
            d = "".join(f"M{place}h0" for place in places)
            parts.append(tag("path", d=d, class_=f"dots c{line.color % COLORS}"))
    return tag(
        "svg",
        tag("title", chart.title, id=f"{name}-name"),
        tag("desc", _told(chart, lines), id=f"{name}-text"),
        parts,
        viewBox=f"0 0 {_SIDE} {_SIDE}",
        preserveAspectRatio="none",
        role="img",
        aria_labelledby=f"{name}-name {name}-text",
    )


def _down(place: float) -> str:
    return f"{_SIDE * (1 - place):.1f}"


def _told(chart: Chart, lines: Sequence[Line]) -> str:
    """The chart in words, for those who cannot see it."""
    told = [
        f"{line.label}: from {number(line.y[0], chart.kind)} to {number(line.y[-1], chart.kind)},"
        f" lowest {number(line.y.min(), chart.kind)}, highest {number(line.y.max(), chart.kind)}."
        for line in lines
        if line.label
    ]
    told += [
        f"{marks.word} at {', '.join(f'{x:,.0f}' for x in marks.at[:_TOLD])}."
        for marks in chart.across.marks
        if marks.word and marks.at
    ]
    return " ".join([chart.about, *told])


def _data(chart: Chart, lines: Sequence[Line], scale: Scale) -> str:
    """What the script needs to tell values: axes, and the points of the lines in the legend."""
    shown: list[dict[str, Any]] = [
        {
            "label": line.label,
            "color": line.color % COLORS,
            "x": line.x.tolist(),
            "y": [float(f"{value:.{_DIGITS}g}") for value in line.y.tolist()],
        }
        for line in lines
        if line.label
    ]
    across = chart.across
    data = {
        "x": [across.low, across.high],
        "y": [scale.low, scale.high],
        "log": scale.is_log,
        "kind": chart.kind,
        "unit": across.rows[0].unit,
        "epoch": across.epoch,
        "lines": shown,
    }
    return json.dumps(data, separators=(",", ":"), ensure_ascii=False)
