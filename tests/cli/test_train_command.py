"""`nfflax train --dry-run` shows what a run would do, for people and for programs."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import nfflax
from nfflax.spec.load import load_run
from nfflax.spec.plan import plan

CHANGES = {
    "model.spec": "nfnet_micro",
    "train.batch_size": 1024,
    "train.examples": 51_200,
    "train.epochs": 30,
    "optimizer.freeze": ["stem"],
}
WORDS = [w for key, value in CHANGES.items() for w in ("--set", f"{key}={json.dumps(value)}")]
DRY = ("train", "nfnet", "--dry-run", *WORDS)


def test_the_plan_as_json_is_exact(run):
    ran = run(*DRY, "--json")
    assert (ran.code, ran.err) == (0, "")
    data = json.loads(ran.out)
    loaded, network = load_run("nfnet", CHANGES), plan("nfnet_micro")
    assert load_run(data["run"]) == loaded
    side = loaded.spec.resolution.train
    assert (data["params"], data["macs"]) == (network.params, network.macs(side))
    assert (data["steps"], data["epochs"], data["warmup"]) == (1500, 30, 250)
    assert data["peak_learning_rate"] == pytest.approx(0.4)
    assert data["warnings"] == []

    rates = {point["step"]: point["rate"] for point in data["learning_rate"]}
    assert list(rates) == sorted(rates)
    assert (min(rates), max(rates)) == (0, 1499)
    assert rates[0] == 0
    assert max(rates.values()) == pytest.approx(0.4, rel=1e-3)
    assert 0 < rates[1499] < 1e-5

    groups = data["groups"]
    assert sum(group["count"] for group in groups) == network.params
    paths = [path for group in groups for path in group["parameters"]]
    assert len(paths) == len(set(paths))
    for group in groups:
        is_frozen = any(path.startswith("stem.") for path in group["parameters"])
        assert group["learning_rate"] == (0 if is_frozen else 1)
    (classifier,) = (g for g in groups if "classifier.kernel" in g["parameters"])
    assert (classifier["decay"], classifier["clip"]) == (2e-5, None)


def test_the_page_fits_a_terminal(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    ran = run(*DRY)
    assert (ran.code, ran.err) == (0, "")
    lines = ran.out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith("nfnet  NFNet-F0 on ImageNet")
    facts = dict(re.findall(r"^(\w+) {2,}(\S.*)$", ran.out, re.MULTILINE))
    assert facts["model"].startswith("nfnet_micro · ")
    assert facts["model"].endswith(" · bfloat16")
    assert facts["batch"] == "1,024 images"
    assert facts["data"] == "imagenet (train) · crops of 8% to 100% · flips"
    assert facts["augment"].startswith("MixUp 0.2 and CutMix with fresh partners · ")
    assert facts["length"] == "1,500 steps · 30 epochs of 51,200 images"
    assert facts["rate"] == "0.4 = 0.1 × 1024 / 256"  # noqa: RUF001
    assert facts["schedule"] == "250 steps of warm-up from 0 · cosine to 0"
    assert facts["optimizer"] == "sgd · momentum 0.9, Nesterov · weight decay 2e-05"
    assert (facts["AGC"], facts["SAM"]) == ("0.01 · eps 0.001", "off")
    assert facts["EMA"] == "0.99999 with warm-up"
    assert "warning" not in facts
    (curve,) = re.findall(r"^ +([▁▂▃▄▅▆▇█]+)$", ran.out, re.MULTILINE)
    assert (len(curve), curve[0], curve[-1]) == (48, "▁", "▁")
    assert "█" in curve[7:10]  # after a sixth of the run
    descent = curve[curve.index("█") :]
    assert list(descent) == sorted(descent, reverse=True)
    table = lines[lines.index("") + 1 :]
    assert any(row.split()[-1] == "frozen" for row in table if row)
    assert any(row.startswith("classifier.kernel ") for row in table)


def test_other_settings_are_shown(run):
    settings = {
        "train.steps": 200,
        "train.accumulate": 4,
        "train.batch_size": 64,
        "optimizer.kind": "lars",
        "schedule.kind": "constant",
        "schedule.warmup_steps": 0,
        "schedule.warmup_epochs": 0,
        "schedule.reference_batch": 0,
        "agc.clipping": 0,
        "sam.rho": 0.05,
        "ema.decay": 0,
        "guard.spike": 0,
        "model.remat": "block",
    }
    words = [w for key, value in settings.items() for w in ("--set", f"{key}={value}")]
    out = run("train", "nfnet", "--dry-run", "--set", "model.spec=nfnet_micro", *words).out
    facts = dict(re.findall(r"^(\w+) {2,}(\S.*)$", out, re.MULTILINE))
    assert facts["model"].endswith("bfloat16 · remat block")
    assert facts["batch"] == "64 images in 4 microbatches"
    assert facts["length"].startswith("200 steps · 0.009991 epochs")
    assert (facts["rate"], facts["schedule"]) == ("0.1", "constant")
    assert facts["optimizer"].endswith("trust coefficient 0.001 · weight decay 2e-05")
    assert (facts["AGC"], facts["EMA"]) == ("off", "off")
    assert facts["SAM"] == "rho 0.05 · ascent on 20% of the batch"
    assert facts["guard"].startswith("skips a step whose gradient is not finite · ")
    assert facts["warning"].startswith("lars: ")


def test_the_groups_of_larger_recipes_are_shown_too(run):
    out = run(*DRY, "--set", "optimizer.layer_decay=0.5").out
    assert re.search(r"^stages\.\d: .* × 0\.5$", out, re.MULTILINE)  # noqa: RUF001


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nfnet"], 'data: source = "imagenet"\n    no such folder'),
        (["digits", "--set", "mesh.fsdp=3"], "run: mesh.fsdp = 3\n    fsdp 3 x"),
        (["digits", "--set", "mesh.devices=9"], "= 9\n    there are 8 cpu devices"),
        (["digits", "--set", "train.batch_size=36"], "    does not divide into 8 parts"),
        (["digits", "--set", "model.set.head.num_classes=9"], "is less than the 10 classes"),
        (["digits", "--set", "model.set.head.num_classes=0"], "leaves nothing to train"),
        (["digits", "--set", "model.weights=runs/none"], 'model.weights = "runs/none"'),
        (["digits", "--workdir", "taken"], "taken"),
    ],
)
def test_what_cannot_be_trained_leaves_no_folder(run, monkeypatch, tmp_path, words, said):
    monkeypatch.chdir(tmp_path)
    tmp_path.joinpath("taken").write_text("a file in the way")
    ran = run("train", *words)
    assert (ran.code, ran.out) == (2, "")
    assert said in ran.err
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nfnett"], "did you mean: nfnet\n"),
        (["nfnet", "--set", "train.lr=1"], "did you mean: schedule.learning_rate\n"),
        (["nfnet", "--set", "model.set.head.dropout=2"], "override: model.set.head.dropout = 2\n"),
    ],
)
def test_mistakes_end_with_code_2(run, words, said):
    ran = run("train", *words, "--dry-run")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("error: 1 problem in the spec\n")
    assert said in ran.err


def test_epochs_are_passes_over_the_source(run):
    """A run that does not say how many images it has is as long as its source makes it."""
    data = json.loads(run("train", "digits", "--dry-run", "--json").out)
    assert data["run"]["train"]["examples"] == 1437
    assert data["steps"] == 1437 * 24 // 32


def test_a_source_that_is_not_there_leaves_epochs_open(run, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    ran = run("train", "pretrain", "--dry-run")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("error: 2 problems in the data\nrun pretrain: train.examples = 0\n")
    assert 'data: source = "images"\n    no such folder' in ran.err


def test_mistakes_as_json(run):
    ran = run("train", "nfnet", "--dry-run", "--json", "--set", "optimizer.freeze=['stm']")
    assert (ran.code, ran.err) == (2, "")
    (problem,) = json.loads(ran.out)["problems"]
    assert (problem["key"], problem["nearest"]) == ("optimizer.freeze[0]", "stem")


def test_help_lists_the_presets_and_imports_nothing_heavy():
    code = """
import sys
from nfflax.cli import main
try:
    main(["train", "--help"])
finally:
    assert not {"jax", "flax", "numpy", "pydantic", "rich"} & set(sys.modules)
"""
    root = str(Path(nfflax.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "presets: digits, finetune, nf_regnet, nf_resnet, nfnet, nfnet_f1, " in done.stdout
