"""`nfflax cost` prints what is counted, for people and for programs, and compares when asked."""

import json
import re

import pytest

from nfflax.insight.aot import Compiled
from nfflax.insight.cost import cost, inference_bytes
from nfflax.spec.load import load_spec
from nfflax.spec.plan import plan
from nfflax.spec.table import human


def test_the_table_has_every_segment_and_policy(run):
    ran = run("cost", "nfnet_f0", "--dtype", "float32")
    assert (ran.code, ran.err) == (0, "")
    assert max(map(len, ran.out.splitlines())) <= 110
    counted = {remat: cost("nfnet_f0", batch=32, remat=remat) for remat in ("none", "block")}
    rows = {re.split(r"\s{2,}", line)[0]: line.split() for line in ran.out.splitlines()}
    for none, block in zip(*(c.segments for c in counted.values()), strict=True):
        row = rows[none.name]
        assert row[-3] == f"{human(none.kept)}B"
        assert row[-1] == f"{human(block.kept)}B"
    assert rows["none"][2] == f"{human(counted['none'].peak)}B"
    forward = inference_bytes(plan("nfnet_f0"), batch=32)
    assert rows["inference"][1] == f"{human(forward)}B"
    assert "at 192×192, inference at 256×256" in ran.out  # noqa: RUF001


def test_json_is_exact_and_takes_changes(run):
    changes = ("--set", "stages.depth=[1,1,2,1]", "--set", "head.num_classes=10")
    size = ("--batch", "6", "--resolution", "64", "--remat", "conv")
    data = json.loads(run("cost", "nfnet_f0", *changes, *size, "--json").out)
    spec = load_spec("nfnet_f0", {"stages.depth": [1, 1, 2, 1], "head.num_classes": 10})
    counted = cost(spec, batch=6, resolution=64, dtype="bfloat16", remat="conv")
    assert list(data["train"]) == ["conv"]
    found = data["train"]["conv"]
    assert (found["kept"], found["peak"]) == (round(counted.kept), round(counted.peak))
    assert found["macs"] == round(counted.macs)
    assert [s["name"] for s in found["segments"]] == [s.name for s in counted.segments]
    assert data["state"]["total"] == counted.state.total == 12 * data["params"]
    assert data["resolution"] == {"train": 64, "test": 64}
    assert data["inference"]["macs"] == plan(spec, resolution=64).macs()
    assert "compiled" not in found


@pytest.fixture
def compiler(monkeypatch):
    """Programs that take as many bytes as the test says, in place of minutes of compilation."""
    answers = []

    def answer(*_, **__) -> Compiled:
        return Compiled("cpu", 900, 800, 700, answers.pop(0), 61.0)

    monkeypatch.setattr("nfflax.insight.aot.compile_train_step", answer)
    monkeypatch.setattr("nfflax.insight.aot.compile_inference", answer)
    return answers


def test_a_check_compares_and_says_why_it_differs(run, compiler):
    line = ("cost", "nfnet_micro", "--check", "--remat", "block")
    how = {"batch": 32, "dtype": "bfloat16"}
    step = round(cost("nfnet_micro", remat="block", on_cpu=True, **how).peak)
    forward = round(inference_bytes(plan("nfnet_micro"), **how))
    compiler += [step, forward]
    close = run(*line).out
    assert close.count(" 1.00 ") == 2
    assert "remat saves less here" in " ".join(close.split())
    assert "Compiled takes" not in close
    compiler += [2 * step, forward]
    assert "Compiled takes more than counted" in " ".join(run(*line).out.split())
    compiler += [step, forward // 2]
    assert "Compiled takes less than counted" in " ".join(run(*line).out.split())
    compiler += [step, 2 * forward]
    data = json.loads(run(*line, "--json").out)
    assert data["train"]["block"]["compiled"]["ratio"] == pytest.approx(1)
    assert data["inference"]["compiled"]["ratio"] == pytest.approx(0.5)
    assert data["inference"]["compiled"]["platform"] == "cpu"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nfnet_f00"], "did you mean: nfnet_f0\n"),
        (["nfnet_f0", "--set", "stages.dept=[1,1,2,1]"], "did you mean: stages.depth"),
        (["nfnet_f0", "--batch", "0"], "no whole number from 1"),
        (["nfnet_f0", "--resolution", "100000"], "no size up to 99999"),
        (["nfnet_f0", "--remat", "blocks"], "did you mean block?"),
        (["nfnet_f0", "--dtype", "float16"], "none of float32, bfloat16"),
    ],
)
def test_what_cannot_be_counted_is_an_error(run, words, message):
    ran = run("cost", *words)
    assert (ran.code, ran.out) == (2, "")
    assert message in ran.err


def test_a_network_without_classes_is_counted_but_not_compiled(run):
    headless = ("cost", "nfnet_micro", "--set", "head.num_classes=0")
    assert run(*headless).code == 0
    ran = run(*headless, "--check")
    assert ran.code == 2
    assert "leaves nothing to train" in ran.err
