"""The curves of a run as a picture: loss and accuracy in training and evaluation."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from nfflax.train.history import AVERAGE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CURVE = "curve.png"

_SIZE, _DPI = (9.0, 3.6), 180  # inches: text stays readable in a README's column
_INK, _FAINT, _GRID, _RATE = "#222222", "#8a8f98", "#e9eaec", "#f1f3f5"
_WINDOWS = 50  # training is noisy: its line is a running mean over 1/50 of the points to each side
_FEW = 25  # points that are also marked one by one
_LABEL_GAP = 0.075  # between two labels at the end of the lines, as a share of the height


class _Line(NamedTuple):
    """One metric over the steps: kind and name in the history, and how it is drawn."""

    kind: str
    name: str
    label: str
    color: str
    width: float


def draw_curve(history: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Draw what `read_history` returned, as a PNG. Needs matplotlib (extra "plot")."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        hint = 'pip install "nfflax[plot]"'
        raise ImportError(f"the curve is not drawn, for want of matplotlib: {hint}") from None
    figure = Figure(figsize=_SIZE, dpi=_DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)  # pyplot would keep the figure, and choose a backend for everyone
    style: dict[str, Any] = {"color": _INK, "fontsize": 12, "fontweight": "bold"}
    figure.suptitle(title, x=0.012, ha="left", parse_math=False, **style)
    losses, accuracies = figure.subplots(1, 2, gridspec_kw={"wspace": 0.08})
    _draw_rate(losses, history)
    _draw_lines(losses, history, "loss", "{:.3f}", scale=1)
    _draw_lines(accuracies, history, "top1", "{:.2f}%", scale=100)
    losses.set_title("loss", loc="left", color=_INK, fontsize=10)
    accuracies.set_title("top-1 accuracy in %", loc="left", color=_INK, fontsize=10)
    for axes in (losses, accuracies):
        axes.set_xlim(0, 1.01 * max([1, *(entry["step"] for entry in history)]))
    figure.savefig(path, format="png", metadata={"Software": None})


def _draw_lines(
    axes: "Axes", history: Sequence[dict[str, Any]], name: str, number: str, scale: float
) -> None:
    """Every series of a metric, each with its last value at its end."""
    lines = (
        _Line("train", name, "train", "#98a2ae", 1.6),
        _Line("eval", name, "eval", "#3b82c4", 1.6),
        _Line("eval", f"{AVERAGE}{name}", "eval, EMA", "#d9480f", 2.0),
    )
    ends, drawn = [], []
    for line in lines:
        steps, values = _series(history, line)
        values = values * scale
        if not np.isfinite(values).any():
            continue
        shown = smooth(values) if line.kind == "train" else values
        if line.kind == "train":
            axes.plot(steps, values, color=line.color, linewidth=0.6, alpha=0.35)
        few = {"marker": "o", "markersize": 3} if len(steps) <= _FEW else {}
        axes.plot(steps, shown, color=line.color, linewidth=line.width, **few)
        drawn.append(values[np.isfinite(values)])
        last = shown[np.isfinite(shown)][-1]
        ends.append((last, f"{number.format(last)} {line.label}", line.color))
    _dress(axes)
    if drawn:
        rises = name == "top1"
        _set_range(axes, drawn, rises=rises)
        _label_ends(axes, ends, rises=rises)


def _dress(axes: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    axes.set_xlabel("steps", color=_FAINT, fontsize=9, loc="left")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.tick_params(length=0, labelsize=9, labelcolor=_FAINT)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)


def _set_range(axes: "Axes", drawn: Sequence[np.ndarray], *, rises: bool) -> None:
    """Show where the lines are most of the time: a bad start must not flatten all the rest."""

    def level(values: np.ndarray, share: float) -> float:
        return np.quantile(values, share if len(values) > _FEW else round(share), method="nearest")

    low = min(level(values, 0.04 if rises else 0) for values in drawn)
    high = max(level(values, 1 if rises else 0.97) for values in drawn)
    air = 0.06 * (high - low) or 0.5
    axes.set_ylim(low - air, high + air)


def _label_ends(axes: "Axes", ends: list[tuple[float, str, str]], *, rises: bool) -> None:
    """A label right of every line's end. The best has its place; others make room for it."""
    low, high = axes.get_ylim()
    headline = ends[-1]  # the average, where there is one
    taken = -_LABEL_GAP
    for end in sorted(ends, reverse=rises):
        value, text, color = end
        height = min(max((value - low) / (high - low), 0.0), 1.0)
        below_best = 1 - height if rises else height
        taken = max(below_best, taken + _LABEL_GAP)
        axes.annotate(
            text,
            (1.0, 1 - taken if rises else taken),
            xycoords="axes fraction",
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=color,
            fontsize=9.5,
            fontweight="bold" if end is headline else "normal",
        )


def _draw_rate(axes: "Axes", history: Sequence[dict[str, Any]]) -> None:
    """The learning rate as a pale hill behind a panel, without an axis of its own."""
    steps, values = _series(history, _Line("train", "learning_rate", "", _RATE, 0))
    if not np.isfinite(values).any():
        return
    highest = np.nanmax(values)
    hill = axes.twinx()
    hill.fill_between(steps, values, color=_RATE, linewidth=0)
    hill.set_ylim(0, 1.25 * highest or 1)
    hill.axis("off")
    words = f"learning rate, up to {highest:.3g}"
    axes.set_title(words, loc="right", color=_FAINT, fontsize=8.5)
    axes.set_zorder(hill.get_zorder() + 1)
    axes.patch.set_visible(False)


def _series(history: Sequence[dict[str, Any]], line: _Line) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a metric."""
    found = [
        (e["step"], e[line.name]) for e in history if e["kind"] == line.kind and line.name in e
    ]
    pairs = np.array(found, np.float64).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def smooth(values: np.ndarray) -> np.ndarray:
    """A running mean of the finite values, over windows that are cut off at both ends."""
    reach = len(values) // _WINDOWS
    finite = np.isfinite(values)
    sums = np.cumsum(np.concatenate([[0.0], np.where(finite, values, 0.0)]))
    counts = np.cumsum(np.concatenate([[0], finite]))
    here = np.arange(len(values))
    first, end = np.maximum(here - reach, 0), np.minimum(here + reach + 1, len(values))
    count = counts[end] - counts[first]
    return np.where(count, (sums[end] - sums[first]) / np.maximum(count, 1), np.nan)
