"""A contest as bars: how long a step takes, quickest first."""

from collections.abc import Sequence
from pathlib import Path

from peers.page import seconds
from peers.results import Row

OURS, THEIRS = "#0072b2", "#d55e00"  # of Okabe and Ito, which all can tell apart
FLOOR = "#555555"


def bars(rows: Sequence[Row], *, device: str) -> list[tuple[str, float, str]]:
    """(label, seconds, colour) from the quickest to the slowest: CPU seconds, on a GPU the clock's.

    Those without a time are left out.
    """
    timed = [
        (row.label.replace("`", ""), row.wall if device == "cuda" else row.cpu, _color(row))
        for row in rows
        if not row.failure
    ]
    return sorted(timed, key=lambda bar: bar[1])


def _color(row: Row) -> str:
    return OURS if row.label.startswith("nfflax") else THEIRS


def draw(rows: Sequence[Row], path: Path, *, title: str, device: str) -> None:
    """Draw the bars into a PNG file; the line is what one large matrix product would take."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = bars(rows, device=device)
    labels, values, colors = zip(*drawn, strict=True)
    figure = Figure((8.4, 0.9 + 0.32 * len(drawn)), 100, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    found = axes.barh(labels, values, color=colors, height=0.7)
    axes.bar_label(found, [seconds(value) for value in values], padding=3, fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.1, y=0.02)
    axes.spines[["top", "right"]].set_visible(False)
    unit = "seconds" if device == "cuda" else "CPU seconds"
    axes.set_title(title, loc="left", fontsize=11)
    first = next((row for row in rows if row.share), None)
    if first:
        floor = first.share * (first.wall if device == "cuda" else first.cpu)
        axes.axvline(floor, color=FLOOR, linestyle="--", linewidth=1.2)
        unit += "; dashed: the same operations in one matrix product"
    axes.set_xlabel(unit)
    figure.savefig(path, format="png", metadata={"Software": None})
