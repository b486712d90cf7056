"""The example programs run as they are started by hand, at a size that a test can wait for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
TINY = {
    "quickstart.py": [],
    "agc_batch_size.py": ["--seeds", "1", "--epochs", "1", "--batches", "128", "--out", "plot.png"],
}


def test_every_example_is_here():
    assert set(TINY) == {path.name for path in EXAMPLES.glob("*.py")}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Runs an example in a folder of its own; what it said, and the folder."""

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
