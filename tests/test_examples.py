"""The example programs run as they are started by hand, at a size that a test can wait for."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import trained

import nfflax

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
WEIGHTS = ["--weights", "../tiny"]  # of a run beside the folder that an example runs in
TINY = {
    "quickstart.py": [],
    "signal_faults.py": ["--network", "nfnet_tiny", "--resolution", "32", "--out", "plot.png"],
    "finetune.py": ["--epochs", "1", "--images", "32", "--steps", "2"],
    "linear_probe.py": [*WEIGHTS, "--images", "64"],
    "backbone_segmentation.py": [*WEIGHTS, "--levels", "1", "2", "--steps", "2"],
    "in_a_linen_project.py": [*WEIGHTS, "--steps", "2"],
    "agc_batch_size.py": ["--seeds", "1", "--epochs", "1", "--batches", "128", "--out", "plot.png"],
}


def test_every_example_is_here():
    assert set(TINY) == {path.name for path in EXAMPLES.glob("*.py")}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Runs an example in a folder of its own; what it said, and the folder."""
    trained.save(tmp_path_factory.mktemp("tiny", numbered=False), trained.tiny_run())

    def run(name: str) -> tuple[str, Path]:
        folder = tmp_path_factory.mktemp("example")
        # One device, as a reader has, and not the eight of the tests.
        environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
        command = [sys.executable, str(EXAMPLES / name), *TINY[name]]
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return done.stdout, folder

    return run


@pytest.mark.slow
def test_quickstart(ran):
    said, _ = ran("quickstart.py")
    assert "nfnet_tiny" in said
    assert "signal propagation" in said


@pytest.mark.slow
def test_signal_faults(ran):
    pytest.importorskip("matplotlib")
    said, folder = ran("signal_faults.py")
    assert "as planned: nfnet_tiny: the signal is sound" in said
    assert re.search(r"^no weight standardisation: .* not standardised in (\d+) of \1 ", said, re.M)
    assert re.search("^beta is not reset: .*: beta is never reset", said, re.M)
    assert re.search("^no beta: .*: beta is not applied", said, re.M)
    assert folder.joinpath("plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_agc_batch_size(ran):
    for extra in ("matplotlib", "sklearn"):
        pytest.importorskip(extra)
    said, folder = ran("agc_batch_size.py")
    assert "NF with AGC, batch size 128: " in said
    assert folder.joinpath("plot.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads(folder.joinpath("plot.json").read_text("utf-8"))
    assert [run["batch_size"] for run in record["runs"]] == [128] * 3
    assert {run["network"] for run in record["runs"]} == set(record["networks"])
    assert all(0 <= run["top1"] <= 1 for run in record["runs"])
    assert all(run["top1"] == 0.1 for run in record["runs"] if run["diverged"])


@pytest.mark.slow
def test_finetune(ran):
    pytest.importorskip("sklearn")
    said, folder = ran("finetune.py")
    shares = re.findall(r"^from (trained weights|scratch): (.*)% of 500 test images", said, re.M)
    assert [start for start, _ in shares] == ["trained weights", "scratch"]
    assert all(0 <= float(share) <= 100 for _, share in shares)
    loaded = nfflax.train.load_model(folder / "runs" / "low_digits")
    assert loaded.class_names == ("0", "1", "2", "3", "4")


@pytest.mark.slow
def test_linear_probe(ran):
    pytest.importorskip("sklearn")
    said, _ = ran("linear_probe.py")
    rows = re.findall(r"^│ (\d) +│ (\S+) +│ +(\d+) +│ +(\d+) ", said, re.M)
    infos = nfflax.plan(trained.TINY).feature_info
    assert [
        (int(level), name, int(channels), int(stride)) for level, name, channels, stride in rows
    ] == [(info.level, info.name, info.channels, info.stride) for info in infos]


@pytest.mark.slow
def test_backbone_segmentation(ran):
    for extra in ("matplotlib", "sklearn"):
        pytest.importorskip(extra)
    said, folder = ran("backbone_segmentation.py")
    found = re.search(r"^mean IoU (.*)% on 64 scenes", said, re.M)
    assert found
    assert 0 < float(found[1]) < 100
    assert folder.joinpath("segmentation.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_in_a_linen_project(ran):
    pytest.importorskip("sklearn")
    said, _ = ran("in_a_linen_project.py")
    found = re.search(r"^([\d,]+) weights train, ([\d,]+) are frozen", said, re.M)
    assert found
    trainable, frozen = (int(number.replace(",", "")) for number in found.groups())
    spec = nfflax.load_spec(trained.TINY, {"head.num_classes": 9})  # one for each sum
    assert trainable + frozen == nfflax.plan(spec).params
    assert trainable > 0
    assert frozen > 0
