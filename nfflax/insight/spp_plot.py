"""The signal propagation plot of networks: three curves over depth, as the paper draws them.

Needs matplotlib, the extra "plot".
"""

import itertools
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nfflax.insight.diagnosis import Report

# The colours of Okabe and Ito, which all can tell apart, but for yellow, too pale on white.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
_MARKERS = "osD^vPX"
_PANELS = {
    "avg_sq_mean": "average squared channel mean",
    "avg_var": "average channel variance",
    "res_avg_var": "variance at the branch's end",
}
_LINE = 110  # characters that the legend has room for, with 6 for each line drawn in it
_WIDE = 20  # times: values that differ by more go on a logarithmic axis
_FLOOR = 1e-4  # of the largest: what is below lies on the axis, and need not be told apart


def draw(reports: Mapping[str, Report], path: Path, title: str = "") -> None:
    """Draw the curves of networks, by label, into a PNG file; what is planned is dashed."""
    figure = Figure(figsize=(10.5, 3.9), dpi=100, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, panel) in zip(figure.subplots(1, 3), _PANELS.items(), strict=True):
        _draw_panel(axes, name, reports)
        axes.set_title(panel, loc="left", fontsize=11)
    handles, labels = figure.axes[1].get_legend_handles_labels()
    columns = max(1, min(len(labels), _LINE // (max(map(len, labels)) + 6)))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    if title:
        figure.suptitle(title, fontsize=12, x=0.01, ha="left")
    figure.savefig(path, format="png", metadata={"Software": None})


def _draw_panel(axes: Axes, name: str, reports: Mapping[str, Report]) -> None:
    looks = zip(itertools.cycle(_COLORS), itertools.cycle(_MARKERS), strict=False)
    for (label, report), (color, marker) in zip(reports.items(), looks, strict=False):
        values = np.where(np.isfinite(report.curves[name]), report.curves[name], np.nan)
        places = np.arange(len(values)) + (name == "res_avg_var")  # the stem is 0, and no branch
        axes.plot(places, values, color=color, marker=marker, markersize=3.5, label=label)
    for i, (places, planned) in enumerate(_planned(name, reports)):
        axes.plot(
            places,
            planned,
            color="#555555",
            linestyle="--",
            linewidth=1.2,
            zorder=1,
            label="planned" if i == 0 else None,
        )
    _scale(axes, [np.asarray(line.get_ydata(), float) for line in axes.lines])
    depths = {tuple(_depths(report)) for report in reports.values()}
    if len(depths) == 1:
        for end in np.cumsum(depths.pop())[:-1]:
            axes.axvline(end + 0.5, color="#dfe2e6", linewidth=1, zorder=0)
        axes.set_xlabel("block; lines part the stages", fontsize=10)
    else:
        axes.set_xlabel("block", fontsize=10)
    axes.locator_params(axis="x", integer=True)
    axes.grid(axis="y", color="#eceef0")
    axes.spines[["top", "right"]].set_visible(False)


def _planned(name: str, reports: Mapping[str, Report]) -> list[tuple[np.ndarray, np.ndarray]]:
    """The planned curves, each once. The squared mean has none: it should stay small."""
    curves: dict[bytes, tuple[np.ndarray, np.ndarray]] = {}
    for report in reports.values():
        if report.expected is not None and name != "avg_sq_mean":
            planned = report.expected if name == "avg_var" else np.ones(len(report.flow.blocks))
            places = np.arange(len(planned)) + (name == "res_avg_var")
            curves[planned.tobytes()] = places, planned
    return list(curves.values())


def _scale(axes: Axes, drawn: list[np.ndarray]) -> None:
    """A logarithmic axis where one is needed, else one from 0."""
    values = np.concatenate(drawn)
    values = values[np.isfinite(values) & (values > 0)]
    if values.size and values.max() > _WIDE * values.min():
        axes.set_yscale("log")
        axes.set_ylim(max(values.min(), values.max() * _FLOOR) / 2, values.max() * 2)
    else:
        axes.set_ylim(0, 1.1 * values.max() if values.size else 1)


def _depths(report: Report) -> list[int]:
    """Blocks in each stage."""
    stages = [block.plan.stage for block in report.flow.blocks]
    return [stages.count(stage) for stage in sorted(set(stages))]
