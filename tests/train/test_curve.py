"""The picture of a run: every series there is, its last number beside it, nothing left behind."""

import itertools
import math
import sys

import numpy as np
import pytest
from PIL import Image

from nfflax.train.curve import draw_curve

TRAIN, EVAL, EMA = (152, 162, 174), (59, 130, 196), (217, 72, 15)


def history_of(steps, *, average):
    """A run that learns, as its history."""
    entries = []
    for step in range(10, steps + 1, 10):
        wave, left = 0.1 * math.sin(step), math.exp(-3 * step / steps)
        train = {"loss": 1 + left + wave, "top1": 0.8 - 0.6 * left, "learning_rate": 0.2 * left}
        entries.append({"step": step, "kind": "train"} | train)
        if step % 50 == 0:
            found = {"loss": 0.1 + left, "top1": 0.98 - 0.8 * left}
            of_average = {"ema/loss": 0.09 + left, "ema/top1": 0.99 - 0.8 * left}
            entries.append({"step": step, "kind": "eval"} | found | (of_average if average else {}))
    return entries


@pytest.fixture
def figures(monkeypatch):
    """The figures that were drawn."""
    figure = pytest.importorskip("matplotlib.figure")
    drawn, save = [], figure.Figure.savefig

    def savefig(self, *args, **options):
        drawn.append(self)
        save(self, *args, **options)

    monkeypatch.setattr(figure.Figure, "savefig", savefig)
    return drawn


def labels_of(axes):
    """The labels at the ends of the lines: text and box."""
    return [(text.get_text(), text.get_window_extent()) for text in axes.texts]


def count(path, color):
    """Pixels of a colour."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    return int(np.sum(np.abs(pixels - color).sum(-1) < 12))


@pytest.mark.parametrize("average", [True, False])
def test_every_series_is_drawn_and_ends_in_its_number(average, tmp_path, figures):
    path = tmp_path / "curve.png"
    draw_curve(history_of(2000, average=average), path, "a $hort_ title")
    with Image.open(path) as image:
        assert (image.format, image.size) == ("PNG", (1620, 648))
    assert min(count(path, TRAIN), count(path, EVAL)) > 1000
    assert (count(path, EMA) > 1000) == average
    losses, accuracies = figures[0].axes[:2]
    left = math.exp(-3)
    expected = {f"{98 - 80 * left:.2f}% eval", f"{99 - 80 * left:.2f}% eval, EMA"}
    words = {text for text, _ in labels_of(accuracies)}
    assert words & expected == (expected if average else {f"{98 - 80 * left:.2f}% eval"})
    assert len(words) == 2 + average
    assert losses.get_title("right") == f"learning rate, up to {0.2 * math.exp(-0.015):.3g}"
    for axes in (losses, accuracies):
        boxes = sorted((box.y0, box.y1) for _, box in labels_of(axes))
        pairs = itertools.pairwise(boxes)
        assert all(lower[1] <= upper[0] + 2 for lower, upper in pairs)  # no label on another
        assert boxes[0][0] > 0
        assert boxes[-1][1] < figures[0].bbox.height


def test_a_bad_start_does_not_flatten_the_rest(tmp_path, figures):
    history = history_of(2000, average=True)
    history[0]["loss"] = 1e6
    history[1]["loss"] = math.nan
    draw_curve(history, tmp_path / "curve.png", "run")
    assert figures[0].axes[0].get_ylim()[1] < 3


@pytest.mark.parametrize(
    ("history", "labels"),
    [
        ([], 0),
        ([{"step": 0, "kind": "eval", "loss": 2.3, "top1": 0.1}], 1),
        ([{"step": 1, "kind": "train", "loss": math.nan, "top1": 0.1, "learning_rate": 0.0}], 1),
    ],
)
def test_a_run_that_has_hardly_begun(history, labels, tmp_path, figures):
    draw_curve(history, tmp_path / "curve.png", "run")
    assert len(labels_of(figures[0].axes[1])) == labels


def test_matplotlib_is_left_as_it_was(tmp_path, figures):
    matplotlib = pytest.importorskip("matplotlib")
    before, loaded = dict(matplotlib.rcParams), "matplotlib.pyplot" in sys.modules
    draw_curve(history_of(100, average=True), tmp_path / "curve.png", "run")
    assert dict(matplotlib.rcParams) == before
    assert ("matplotlib.pyplot" in sys.modules) == loaded
    assert len(figures) == 1


def test_without_matplotlib_the_error_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "nfflax\[plot\]"'):
        draw_curve([], tmp_path / "curve.png", "run")
    assert not list(tmp_path.iterdir())
