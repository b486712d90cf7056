"""Nothing is lost, whatever happens to the process: killed, told to stop, refused a full disk.

All of it through the command line, each time in a process of its own.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from trained import tiny_run

from nfflax.optim.roles import leaves_by_path
from nfflax.train.checkpoint import FOLDER, load_weights

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PATIENCE = 400  # seconds for one command
STEPS, EVERY, EVALUATED = 7, 3, 4
CHANGES = {
    "train__steps": STEPS,
    "eval__every_steps": EVALUATED,
    "eval__batch_size": 8,
    "checkpoint__every_steps": EVERY,
    "checkpoint__keep": 10,
    "log__every": 1,
    "log__tensorboard": False,
}
CLOCKS = {"time", "seconds", "step_time", "images_per_second", "input_wait"}
BLOCKS = 24  # of 512 bytes: more than metrics.jsonl needs, less than a checkpoint does


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


class Here(NamedTuple):
    """A place to run commands in, which share what they compile."""

    folder: Path

    def start(
        self, *words: str | Path, before: tuple[str, ...] = (), **variables: str
    ) -> subprocess.Popen[str]:
        """Start Python with these words, on one device."""
        environment = os.environ | {
            "XLA_FLAGS": "",
            "JAX_ENABLE_COMPILATION_CACHE": "true",
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONPATH": str(ROOT),
        }
        return subprocess.Popen(
            [*before, sys.executable, *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment | variables,
        )

    def train(self, run: Path, workdir: Path, *words: str, **how: Any) -> Ended:
        """Run `nfflax train`; how it ended."""
        return end(self.start("-m", "nfflax", "train", run, "--workdir", workdir, *words, **how))


def end(process: subprocess.Popen[str]) -> Ended:
    with process:
        try:
            out, err = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
    assert "Traceback" not in err
    return Ended(process.returncode, out, err)


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Here:
    return Here(tmp_path_factory.mktemp("kills"))


def run_file(here: Here, name: str, **changes: Any) -> Path:
    path = here.folder / f"{name}.json"
    run = tiny_run(**CHANGES | changes)
    path.write_text(json.dumps(run.model_dump(mode="json")))
    return path


@pytest.fixture(scope="module")
def tiny(here) -> Path:
    """The file of the run."""
    return run_file(here, "tiny")


@pytest.fixture(scope="module")
def whole(here, tiny) -> Path:
    """The folder of the run, made without interruption."""
    workdir = here.folder / "whole"
    ended = here.train(tiny, workdir)
    assert ended.code == 0, ended.err
    return workdir


def lines(workdir: Path) -> list[dict[str, Any]]:
    texts = (workdir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(text).items() if k not in CLOCKS} for text in texts]


def kept(workdir: Path) -> list[int]:
    """The steps of the checkpoints; what is left of failed saves is removed by the next start."""
    names = (path.name for path in (workdir / FOLDER).iterdir())
    return sorted(int(name) for name in names if "orbax-checkpoint-tmp" not in name)


def assert_same(one: Path, other: Path) -> None:
    assert lines(one) == lines(other)
    ours, theirs = (leaves_by_path(load_weights(path).params) for path in (one, other))
    assert ours.keys() == theirs.keys()
    for path, leaf in ours.items():
        np.testing.assert_array_equal(leaf, theirs[path])


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_killed_run_ends_as_if_nothing_had_been(here, tiny, whole, tmp_path):
    """In its first save, or just after; benchmarks/kill_and_resume.py kills at any moment."""
    workdir = tmp_path / "run"
    process = here.start("-m", "nfflax", "train", tiny, "--workdir", workdir)
    folder = workdir / FOLDER
    wait_until(lambda: process.poll() is not None or (folder.is_dir() and any(folder.iterdir())))
    process.kill()
    assert end(process).code == -signal.SIGKILL
    assert here.train(tiny, workdir, "--resume").code == 0
    assert_same(workdir, whole)


def test_an_evaluation_that_is_broken_off_is_made_later(here, tiny, whole, tmp_path):
    """SIGTERM does not wait for an evaluation: the state is saved at once."""
    workdir = tmp_path / "run"
    process = here.start("-m", "nfflax", "train", tiny, "--workdir", workdir)
    assert process.stderr
    told = []
    for line in process.stderr:
        told.append(line)
        if line.endswith("evaluating\n"):
            process.send_signal(signal.SIGTERM)
            break
    ended = end(process)
    assert ended.code == 75, "".join(told) + ended.err
    assert kept(workdir) == [EVERY, EVALUATED]
    assert [line["step"] for line in lines(workdir)] == [1, 2, 3, EVALUATED]
    assert here.train(tiny, workdir, "--resume").code == 0
    assert_same(workdir, whole)


def test_a_full_disk_costs_the_steps_since_the_last_checkpoint(here, tiny, whole, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    for step in kept(workdir):
        if step > EVERY:
            shutil.rmtree(workdir / FOLDER / str(step))
    limited = ("sh", "-c", f'ulimit -f {BLOCKS}; exec "$@"', "sh")
    no_writing = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1000"}  # or JAX complains as well
    ended = here.train(tiny, workdir, "--resume", before=limited, **no_writing)
    assert ended.code == 1
    (said,) = (line for line in ended.err.splitlines() if not re.match(r"\d:\d\d:\d\d  ", line))
    assert re.fullmatch(
        r"error: the checkpoint of step [46] could not be saved in .*: File too large\. "
        rf"The last good one is that of step {EVERY}\.",
        said,
    )
    assert kept(workdir) == [EVERY]
    ended = here.train(tiny, workdir, "--resume")
    assert (ended.code, kept(workdir)) == (0, kept(whole))
    assert_same(workdir, whole)


@pytest.mark.parametrize(
    ("run", "place", "words", "said"),
    [
        ("tiny", "whole", [], "holds a run already"),
        ("other", "whole", ["--resume"], "a resumed run cannot change it"),
        ("tiny", "tiny.json", ["--resume"], "is not a folder"),
        ("tiny", "tiny.json/run", [], "cannot be used: Not a directory"),
    ],
)
def test_folders_that_cannot_be_used_stay_as_they_are(here, whole, run, place, words, said):
    run_file(here, "other", schedule__learning_rate=0.3)
    before = contents(here.folder)
    ended = here.train(here.folder / f"{run}.json", here.folder / place, *words)
    assert (ended.code, ended.out) == (2, "")
    assert said in ended.err
    assert contents(here.folder) == before


def contents(folder: Path) -> dict[Path, bytes]:
    """Every file but those of compiled programs."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path: path.read_bytes() for path in files if "compiled" not in path.parts}
