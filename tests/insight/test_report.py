"""The report on runs: what it says is what the folders hold, whatever state they are in."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trained import save, tiny_run

from nfflax.insight.report import write_report
from nfflax.insight.report_record import read_records
from nfflax.spec.plan import plan
from nfflax.train.errors import CheckpointError

VOID = {"meta", "br", "link", "img"}
EVIL = "<script>alert('x')</script>"


class Page(HTMLParser):
    """A page read: its elements, its text, and charts by their titles. Fails on unclosed tags."""

    def __init__(self, path: Path):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.charts: dict[str, dict[str, Any]] = {}
        self._open: list[str] = []
        self.source = path.read_text("utf-8")
        self.feed(self.source)
        self.close()
        assert self._open == []

    def handle_starttag(self, name: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((name, dict(attrs)))
        if name not in VOID:
            self._open.append(name)

    def handle_endtag(self, name: str) -> None:
        assert self._open.pop() == name

    def handle_data(self, data: str) -> None:
        name = self._open[-1] if self._open else ""
        self.texts.append((name, data))
        if name == "h3":
            figure = [attrs for element, attrs in self.elements if element == "figure"][-1]
            self.charts[data] = json.loads(figure["data-chart"] or "")

    def all(self, name: str) -> list[str]:
        """The texts of the elements of a kind."""
        return [text for element, text in self.texts if element == name]

    @property
    def text(self) -> str:
        return " ".join(text for name, text in self.texts if name not in ("style", "script"))


def train_line(step: int, **values: Any) -> dict[str, Any]:
    line = {"step": step, "kind": "train", "time": 1000.0 + step, "loss": 3 - step / 100}
    return line | {"top1": step / 200, "learning_rate": 0.1, "guard/skipped": 0} | values


def eval_line(step: int, top1: float, **values: Any) -> dict[str, Any]:
    line = {"step": step, "kind": "eval", "time": 1000.5 + step, "loss": 2 - top1, "top1": top1}
    return line | {"top5": 0.9, "examples": 360.0} | values


def write_run(folder: Path, *lines: dict[str, Any], events: Any = (), **changes: Any) -> Path:
    """A run's folder as training leaves it, but for checkpoints."""
    folder.mkdir()
    run = tiny_run(train__steps=100, **changes)
    (folder / "run.json").write_text(json.dumps(run.model_dump(mode="json")))
    (folder / "versions.json").write_text(json.dumps({"nfflax": "0.1.0"}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if events:
        (folder / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    return folder


def made(*folders: Path, spp: bool = False) -> Page:
    out = folders[0].parent / "out.html"
    write_report(folders, out, spp=spp)
    return Page(out)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that was resumed at step 40 and skipped a step."""
    start = {"event": "start", "device": "TPU v4", "devices": 8, "processes": 2}
    events = [
        start | {"step": 0, "time": 1000.0},
        {"event": "end", "step": 40, "time": 1040.0},
        start | {"step": 40, "time": 2000.0},
        {"event": "end", "step": 100, "time": 2060.0},
    ]
    parts = {"clipped": 0.2, "clipped/stem": 0.5, "clipped/stages.0": 0.1}
    lines = [train_line(s, **parts, **{"guard/skipped": int(s > 60)}) for s in range(10, 101, 10)]
    lines += [eval_line(s, s / 200, **{"ema/top1": a, "ema/loss": 1.0, "ema/top5": 0.95})
              for s, a in ((50, 0.75), (75, 0.7512), (100, 0.5))]  # fmt: skip
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return write_run(folder, *lines, events=events)


@pytest.fixture(scope="module")
def page(whole: Path) -> Page:
    return made(whole)


def test_the_head_says_how_the_run_stands(page: Page):
    assert page.all("h1")[0].strip() == "whole"
    assert "finished" in page.all("span")
    assert page.all("b")[:5] == ["75.12%", "50.00%", "1", "100", "1m40s"]  # the average's numbers
    text = page.text
    assert "8 × TPU v4, 2 processes" in text  # noqa: RUF001
    assert "step 40" in page.all("dd")
    assert "There is no checkpoint." in page.all("li")
    assert f"{plan(tiny_run().spec).params / 1e3:.1f}k parameters" in text


def test_the_curves_hold_the_numbers_of_the_file(page: Page):
    chart = page.charts["top-1 accuracy"]
    training, raw, average = chart["lines"]
    assert [line["label"] for line in chart["lines"]] == [
        "training", "evaluation, raw", "evaluation, average"]  # fmt: skip
    assert training["x"] == list(range(10, 101, 10))
    np.testing.assert_allclose(training["y"], np.arange(10, 101, 10) / 200)
    assert (raw["x"], raw["y"]) == ([50, 75, 100], [0.25, 0.375, 0.5])
    assert average["y"] == [0.75, 0.7512, 0.5]
    assert chart["epoch"] == pytest.approx(1437 / 32)
    parts = [line["label"] for line in page.charts["units clipped"]["lines"]]
    assert parts == ["whole network", "stem", "stages.0"]
    assert page.charts["skipped steps"]["lines"][0]["y"] == [0] * 6 + [1] * 4
    assert "largest gradient-to-weight ratio" not in page.charts  # nothing of it was logged


def test_every_picture_tells_itself_and_its_marks(page: Page):
    pictures = [attrs for name, attrs in page.elements if name == "svg" and "role" in attrs]
    ids = {attrs["id"] for _, attrs in page.elements if "id" in attrs}
    assert len(pictures) == len(page.charts) > 4
    for picture in pictures:
        assert set((picture["aria-labelledby"] or "").split()) <= ids
    assert all("resumed at 40. step skipped at 70." in text for text in page.all("desc"))


def test_lines_are_drawn_where_their_values_lie(page: Page):
    chart = page.charts["learning rate"]
    rate = next(attrs["d"] for name, attrs in page.elements if name == "path"
                and attrs["class"] == "line solid c0" and "L" in (attrs["d"] or ""))  # fmt: skip
    figure = page.source[page.source.index('<h3 id="curve-3-title">learning rate') :]
    drawn = re.search(r'class="area".*? d="M([\d. L]+)" class="line solid c0"', figure)
    assert drawn
    assert rate
    points = np.array([point.split() for point in drawn[1].split("L")], float)
    low, high = chart["y"]
    np.testing.assert_allclose(points[:, 0], np.arange(10, 101, 10) * 10)
    np.testing.assert_allclose(points[:, 1], 1000 * (1 - (0.1 - low) / (high - low)), atol=0.06)


def test_the_best_evaluation_is_marked_and_settings_are_compared(page: Page):
    marked = page.all("mark")
    assert marked[:3] == ["75", "1.67", "75.12%"]
    assert "train.batch_size" not in page.all("code")[:3]
    assert {"agc.clipping", "ema.decay", "stages.depth"} <= set(page.all("code"))
    assert "Where the run differs from digits" in page.all("span")


def test_the_page_needs_nothing_else_and_is_the_same_again(whole: Path, page: Page):
    assert not re.search(r"https?://|@import|url\(|src=", page.source.replace("arXiv:", ""))
    assert made(whole).source == page.source
    style = next(text for name, text in page.texts if name == "style")
    assert "prefers-color-scheme: dark" in style
    assert "@media print" in style


@pytest.mark.parametrize("spot", ["name", "key", "error", "source"])
def test_nothing_from_a_file_becomes_markup(tmp_path: Path, spot: str):
    folder = tmp_path / (EVIL.replace("/", "|") if spot == "name" else "run")
    line = train_line(10, **{f"clipped/{EVIL}": 0.5, "clipped": 0.1} if spot == "key" else {})
    events = [
        {"event": "start", "step": 0, "time": 1.0, "device": EVIL, "devices": 1, "processes": 1},
        {"event": "end", "step": 10, "time": 2.0, "error": f"Boom: {EVIL}"},
    ]
    source = {"data__source": EVIL} if spot == "source" else {}
    page = made(write_run(folder, line, events=events if spot == "error" else (), **source))
    assert [name for name, _ in page.elements].count("script") == 1
    assert "alert(" in page.text
    policy = next(a["content"] for n, a in page.elements if n == "meta" and "http-equiv" in a)
    assert "default-src 'none'" in (policy or "")
    assert "script-src 'sha256-" in (policy or "")


def test_several_runs_lie_over_each_other(whole: Path, tmp_path: Path):
    lines = [train_line(s) for s in (10, 20)] + [eval_line(20, 0.3)]
    other = write_run(tmp_path / "whole", *lines, agc__clipping=0.5)
    page = made(whole, other)
    chart = page.charts["top-1 accuracy, evaluation"]
    labels = [line["label"] for line in chart["lines"]]
    assert len(set(labels)) == 2
    assert all(label.endswith("/whole") for label in labels)
    assert chart["lines"][0]["y"] == [0.75, 0.7512, 0.5]  # of the average
    assert chart["lines"][1]["y"] == [0.3]  # this one keeps none
    assert page.all("mark")[0] == "75.12%"  # the best of both
    table = page.source[page.source.index("Keys in which the runs differ") :].partition("</table>")
    assert re.findall("<code>(.*?)</code>", table[0]) == ["agc.clipping", "0.16", "0.5"]


def test_damage_costs_only_what_is_damaged(tmp_path: Path):
    folder = write_run(tmp_path / "run", train_line(10), eval_line(10, 0.5))
    bad = b'{"step": 20, "kind": "train", "lo\n[1]\n\xff\xfe\n' + b"[" * 100_000 + b"\n"
    wrong = {"step": 30, "kind": "train", "loss": "low", "top1": 0.5, "guard/norm": None}
    wrong |= {"clipped": 1e308, "guard/skipped": math.inf, "time": math.nan, "clip_ratio": 1e-320}
    far = {"step": 10**400, "kind": "train", "loss": 1}
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(bad + json.dumps(wrong).encode() + b"\n" + json.dumps(far).encode() + b"\n")
        file.write(b'{"step": 40, "kind": "tr')
    (folder / "run.json").write_text("{")
    (folder / "spec.json").write_text("[]")
    (folder / "versions.json").write_bytes(b"\x00")
    (folder / "events.jsonl").write_bytes(b'{"event": "start"}\n\xff\n{"event": 3}\n[]\n')
    (record,) = read_records([folder])
    assert [line["step"] for line in record.lines["train"]] == [10, 30]
    assert "loss" not in record.lines["train"][1]
    assert (record.run, record.spec, record.stretches) == (None, None, ())
    page = made(folder, spp=True)
    notes = " ".join(page.all("li"))
    for said in ("metrics.jsonl: 6 lines are damaged", "run.json cannot be read",
                 "spec.json cannot be read", "versions.json cannot be read"):  # fmt: skip
        assert said in notes
    assert page.charts["top-1 accuracy"]["lines"][0]["y"] == [0.05, 0.5]
    assert page.charts["loss"]["epoch"] is None


@pytest.mark.parametrize(
    ("lines", "events", "state"),
    [
        ([], [], "not begun"),
        ([train_line(10)], [], "unfinished"),
        ([train_line(10)], ["start 0"], "unfinished"),
        ([train_line(10)], ["start 0", "end 10"], "stopped"),
        ([train_line(10)], ["start 0", "end 10", "start 10"], "unfinished"),
        ([train_line(100)], ["start 0", "end 100"], "finished"),
        ([train_line(10)], ["start 0", "end 20 DivergedError: the loss"], "diverged"),
        ([train_line(10)], ["start 0", "end 20 TrainError: disk"], "failed"),
    ],
)
def test_how_a_run_stands(tmp_path: Path, lines: Any, events: list[str], state: str):
    told = []
    for number_, text in enumerate(events):
        event, step, *error = text.split(" ", 2)
        told.append({"event": event, "step": int(step), "time": 1000.0 + number_})
        told[-1] |= {"error": error[0]} if error else {}
    folder = write_run(tmp_path / "run", *lines, events=told)
    (record,) = read_records([folder])
    assert record.state == state
    assert state in made(folder).all("span")


def test_a_folder_without_a_run_is_one_clear_error(tmp_path: Path, whole: Path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(CheckpointError) as caught:
        read_records([tmp_path / "photos", whole.with_name("whale"), whole])
    first, second = caught.value.problems
    assert "holds no run" in first.message
    assert first.file.endswith("photos")
    assert second.message == "does not exist"
    assert second.nearest == str(whole)
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_report([whole], tmp_path / "no" / "such" / "report.html", spp=False)


def test_signals_are_measured_at_the_start_and_the_end(tmp_path: Path):
    folder = tmp_path / "run"
    run = tiny_run()
    save(folder, run)
    (folder / "run.json").write_text(json.dumps(run.model_dump(mode="json")))
    page = made(folder, spp=True)
    blocks = len(plan(run.spec).blocks)
    for title, first in (("average variance", 0), ("variance of the residual branch", 1)):
        start, end = page.charts[title]["lines"]
        assert (start["label"], end["label"]) == ("start", "step 3")
        assert start["x"] == end["x"] == list(range(first, blocks + 1))
        assert all(math.isfinite(y) and y > 0 for y in start["y"] + end["y"])
        assert start["y"] != end["y"]
    assert 0.5 < page.charts["average variance"]["lines"][0]["y"][0] < 2


def test_a_run_from_other_weights_starts_with_its_oldest_checkpoint(tmp_path: Path):
    folder = tmp_path / "run"
    run = tiny_run(model__weights="runs/before")
    save(folder, run, steps=(1, 3))
    (folder / "run.json").write_text(json.dumps(run.model_dump(mode="json")))
    page = made(folder, spp=True)
    oldest, newest = page.charts["average variance"]["lines"]
    assert (oldest["label"], newest["label"]) == ("step 1", "step 3")
    assert oldest["y"] != newest["y"]
    assert "The run started from runs/before, not from random weights." in page.all("li")
