"""What a run came to, for people and for programs."""

import json
import math

import pytest

from nfflax.spec.table import plain_text
from nfflax.train.outcome import Result, closing_data, closing_table

EVAL = {"loss": 0.25, "top1": 0.9833, "top5": 0.999, "examples": 360, "seconds": 1.0}
AVERAGE = {"ema/loss": math.nan, "ema/top1": 0.9861, "ema/top5": 1.0}


@pytest.fixture
def result(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    return Result(
        workdir=tmp_path,
        step=1680,
        steps=1680,
        seconds=92.4,
        images_per_second=2134.4,
        parameters=213_400,
        evaluation=EVAL | AVERAGE,
    )


def rows_of(result, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    lines = plain_text(closing_table(result)).splitlines()
    return [[part.strip() for part in line.split("  ", 1)] for line in lines]


def test_a_finished_run(result, monkeypatch):
    assert rows_of(result, monkeypatch) == [
        ["eval, EMA", "top-1 98.61% · top-5 100.00% · loss nan"],
        ["eval, raw", "top-1 98.33% · top-5 99.90% · loss 0.25"],
        ["steps", "1,680"],
        ["time", "1m32s · 2,134 images/s"],
        ["parameters", "213.40k"],
        ["metrics", str(result.workdir / "metrics.jsonl")],
    ]


def test_a_run_that_was_stopped_before_its_second_step(tmp_path, monkeypatch):
    result = Result(tmp_path, 1, 1680, 2.5, None, 10, evaluation={}, stopped=75)
    assert rows_of(result, monkeypatch) == [
        ["steps", "1 of 1,680 · --resume goes on from here"],
        ["time", "2.5s"],
        ["parameters", "10"],
    ]
    assert closing_data(result)["images_per_second"] is None
    assert closing_data(result)["stopped"] == 75


def test_programs_get_the_same_as_json(result):
    data = json.loads(json.dumps(closing_data(result), allow_nan=False))
    assert data == {
        "workdir": str(result.workdir),
        "step": 1680,
        "steps": 1680,
        "seconds": 92.4,
        "images_per_second": 2134.4,
        "parameters": 213_400,
        "evaluation": EVAL | AVERAGE | {"ema/loss": None},
        "stopped": None,
        "files": {"metrics": str(result.workdir / "metrics.jsonl")},
    }
