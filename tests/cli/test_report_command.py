"""`nfflax report`: a page beside the run, a line or JSON for each run, clear refusals."""

import json
from pathlib import Path

import pytest
from trained import tiny_run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run's folder with one evaluation."""
    folder = tmp_path / "first"
    folder.mkdir()
    run = tiny_run(train__steps=20)
    (folder / "run.json").write_text(json.dumps(run.model_dump(mode="json")))
    found = {"step": 20, "kind": "eval", "top1": 0.5, "top5": 1.0, "loss": None, "time": 9.0}
    (folder / "metrics.jsonl").write_text(json.dumps(found) + "\n")
    return folder


@pytest.fixture(autouse=True)
def opened(monkeypatch):
    """The addresses that a browser was asked to open."""
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    return opened


def test_a_page_beside_the_run(run, folder, opened):
    ran = run("report", folder, "--no-spp")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.splitlines() == [
        "first  finished  step 20/20  best top-1 50.00% at step 20",
        "",
        f"report  {folder / 'report.html'}",
    ]
    assert (folder / "report.html").read_text("utf-8").startswith("<!doctype html>")
    assert opened == []  # nobody sits at a pipe


def test_several_runs_as_json(run, folder, tmp_path, opened):
    other = tmp_path / "second"
    other.mkdir()
    (other / "metrics.jsonl").touch()
    out = tmp_path / "both.html"
    ran = run("report", folder, other, "--out", out, "--no-spp", "--json", "--open", "yes")
    found = json.loads(ran.out)
    assert (ran.code, found["report"], opened) == (0, str(out), [out.as_uri()])
    first, second = found["runs"]
    assert (first["state"], first["best"]["top1"], first["best"]["loss"]) == ("finished", 0.5, None)
    assert (second["state"], second["best"], second["steps"]) == ("not begun", None, None)
    assert "There is no run.json." in second["notes"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["report"], "the following arguments are required: WORKDIR"),
        (["report", "."], "holds no run"),
        (["report", "frist"], "did you mean: first"),
        (["report", "first", "--no-spp", "--out", "first"], "cannot be written"),
        (["report", "first", "--open", "perhaps"], "'perhaps' is none of yes, no"),
    ],
)
def test_mistakes_end_with_code_2(run, folder, monkeypatch, words, said):
    monkeypatch.chdir(folder.parent)
    ran = run(*words)
    assert (ran.code, ran.out) == (2, "")
    assert said in ran.err
