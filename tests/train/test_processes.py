"""Runs of several processes through the command line: they learn what one process learns.

Eight devices in all: one process with eight, two with four each, four with two each.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trained import tiny_run

from nfflax.optim.roles import leaves_by_path
from nfflax.train.checkpoint import load_weights
from nfflax.train.history import METRICS, read_history

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
STEPS, HALF = 6, 3
LONG = {"train__steps": 100_000}  # does not end by itself
PATIENCE = 400  # seconds for one command
TOLERANCE = 1e-6
CHANGES = {
    "train__steps": STEPS,
    "schedule__learning_rate": 60.0,  # so large that wrong updates show
    "eval__batch_size": 56,  # the last of 360 images are an uneven batch
    "eval__every_epochs": 0,
    "checkpoint__every_steps": HALF,
    "checkpoint__keep": 5,
    "log__every": 1,
    "log__tensorboard": False,
    "mesh__fsdp": 2,
    "mesh__tensor": 2,
    "mesh__devices": 8,
}


@dataclasses.dataclass
class Ended:
    """How a process ended."""

    code: int
    out: str
    err: str


@dataclasses.dataclass
class Here:
    """A place to run commands in, which share what they compile."""

    folder: Path

    def run_file(self, **changes: object) -> Path:
        """A run of the tiny network, as a file."""
        run = tiny_run(**CHANGES | changes)
        path = self.folder / f"run{len(list(self.folder.glob('run*.json')))}.json"
        path.write_text(json.dumps(run.model_dump(mode="json")))
        return path

    def environment(self, processes: int) -> dict[str, str]:
        return os.environ | {
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={8 // processes}",
            "JAX_ENABLE_COMPILATION_CACHE": "true",
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONPATH": str(ROOT),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }

    def command(
        self,
        processes: int,
        *words: object,
        during: Callable[[list[subprocess.Popen[bytes]]], None] = lambda _: None,
    ) -> list[Ended]:
        """`nfflax WORDS` in so many processes, and what became of each."""
        own, where = [[]], f"127.0.0.1:{_free_port()}"
        if processes > 1:
            shared = ["--coordinator", where, "--processes", str(processes), "--process"]
            own = [[*shared, str(i)] for i in range(processes)]
        base = [sys.executable, "-m", "nfflax", *map(str, words)]
        return self.started([[*base, *rest] for rest in own], processes, during)

    def started(
        self,
        commands: list[list[str]],
        processes: int,
        during: Callable[[list[subprocess.Popen[bytes]]], None] = lambda _: None,
    ) -> list[Ended]:
        """What became of these commands, run at once. A pipe that fills up would stop them."""
        environment = self.environment(processes)
        with contextlib.ExitStack() as stack:
            running, printed = [], []
            for words in commands:
                files = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2)]
                one = subprocess.Popen(words, stdout=files[0], stderr=files[1], env=environment)
                stack.callback(one.wait)
                stack.callback(one.kill)
                running.append(one)
                printed.append(files)
            during(running)
            codes = [process.wait(PATIENCE) for process in running]
            for file in itertools.chain(*printed):
                file.seek(0)
            return [
                Ended(code, out.read(), err.read())
                for code, (out, err) in zip(codes, printed, strict=True)
            ]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def learnt(workdir: Path) -> tuple[dict[tuple[str, int], float], dict[Any, np.ndarray]]:
    """The losses of a run by kind and step, and its last checkpoint's parameters."""
    history = read_history(workdir / METRICS)
    losses = {(entry["kind"], entry["step"]): entry["loss"] for entry in history}
    assert len(losses) == len(history)  # no step is told twice
    return losses, leaves_by_path(load_weights(workdir).params)


def same_as(alone: Path, workdir: Path) -> None:
    (wanted, weights), (found, ours) = learnt(alone), learnt(workdir)
    assert found.pop(("eval", HALF))  # the first half ended with an evaluation of its own
    assert list(found) == list(wanted)
    worst = max(abs(found[key] - wanted[key]) for key in wanted)
    furthest = max(np.abs(ours[path] - weights[path]).max() for path in weights)
    print(f"{workdir.name}: losses differ by {worst:.1e}, parameters by {furthest:.1e}")
    assert worst < TOLERANCE
    assert furthest < TOLERANCE


def wait_for_step(workdir: Path, step: int) -> None:
    """Until a run has written down so many steps."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        path = workdir / METRICS
        if path.exists() and len(read_history(path)) >= step:
            return
        time.sleep(0.1)
    raise TimeoutError(f"{workdir} does not get to step {step}")


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Here:
    return Here(tmp_path_factory.mktemp("processes"))


@pytest.fixture(scope="module")
def alone(here) -> Path:
    """The run in one process, against which the others are held."""
    workdir = here.folder / "alone"
    (ended,) = here.command(1, "train", here.run_file(), "--workdir", workdir)
    assert ended.code == 0, ended.err
    losses, _ = learnt(workdir)
    moved = abs(losses["train", STEPS] - losses["train", 1])
    assert moved > 1000 * TOLERANCE  # so that a wrong update would show
    return workdir


@pytest.fixture(scope="module")
def half(here) -> Path:
    """The first half of the run, in two processes."""
    workdir = here.folder / "half"
    words = ("train", here.run_file(), "--workdir", workdir, "--steps", HALF, "--json")
    first, second = here.command(2, *words)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    told = json.loads(first.out)
    assert (told["step"], told["steps"]) == (HALF, STEPS)
    assert "compiling" in first.err
    assert second.out == ""
    assert "step" not in second.err
    return workdir


@pytest.mark.parametrize("processes", [1, 4])
def test_a_run_goes_on_in_another_number_of_processes(here, alone, half, processes):
    workdir = here.folder / f"on_{processes}"
    shutil.copytree(half, workdir)
    words = ("train", here.run_file(), "--workdir", workdir, "--resume")
    ended = here.command(processes, *words)
    assert [each.code for each in ended] == [0] * processes, ended
    assert f"going on from step {HALF}" in ended[0].err
    same_as(alone, workdir)


def test_two_processes_evaluate_what_one_does(here, alone):
    first, second = here.command(2, "eval", alone, "--json")
    assert (first.code, second.code) == (0, 0), first.err + second.err
    found = json.loads(first.out)
    assert found["images"] == 360
    history = read_history(alone / METRICS)
    assert found["loss"] == pytest.approx(history[-1]["ema/loss"], abs=TOLERANCE)
    assert second.out == ""


def test_sigterm_to_one_process_makes_all_of_them_save_and_stop(here):
    workdir, run = here.folder / "stopped", here.run_file(**LONG, checkpoint__every_steps=0)

    def tell_the_second(running):
        wait_for_step(workdir, 5)
        running[1].send_signal(signal.SIGTERM)

    ended = here.command(2, "train", run, "--workdir", workdir, during=tell_the_second)
    assert [each.code for each in ended] == [75, 75], ended
    (saved,) = (int(folder.name) for folder in (workdir / "checkpoints").iterdir())
    assert len(read_history(workdir / METRICS)) == saved  # no step was lost

    script = ROOT / "examples" / "launch" / "local.sh"
    words = map(str, (script, 2, run, "--workdir", workdir, "--resume", "--steps", saved + 2))
    (launched,) = here.started([list(words)], 2)
    assert launched.code == 0, launched.err
    assert f"going on from step {saved}" in launched.err
    steps = [entry["step"] for entry in read_history(workdir / METRICS) if entry["kind"] == "train"]
    assert steps == list(range(1, saved + 3))


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_is_killed_ends_the_others_soon(here, victim):
    workdir, run = here.folder / f"without_{victim}", here.run_file(**LONG)
    killed: list[float] = []

    def kill(running):
        wait_for_step(workdir, 2 * HALF)
        running[victim].kill()
        killed.append(time.monotonic())

    ended = here.command(2, "train", run, "--workdir", workdir, during=kill)
    assert time.monotonic() - killed[0] < 150  # JAX waits 100 s for a sign of life
    assert ended[victim].code == -signal.SIGKILL
    other = ended[1 - victim]
    if victim:
        assert other.code == 1, other.err
        assert "process 0 has lost another process of this run" in other.err
        assert "Traceback" not in other.err
    else:  # the coordinator: JAX may be first to notice, and aborts
        assert other.code in (1, -signal.SIGABRT), other.err
        assert "another" in other.err

    names = [folder.name for folder in (workdir / "checkpoints").iterdir()]
    kept = max(int(name) for name in names if name.isdecimal())
    words = ("train", run, "--workdir", workdir, "--resume", "--steps", kept + 1)
    (resumed,) = here.command(1, *words)
    assert resumed.code == 0, resumed.err
    assert "going on from step" in resumed.err


def test_an_error_that_all_hit_is_told_in_full_once(here):
    run = here.run_file(mesh__devices=16)
    first, second = here.command(2, "train", run, "--workdir", here.folder / "none")
    assert (first.code, second.code) == (2, 2)
    assert "8 cpu devices, 4 in each of 2 processes" in first.err
    assert "allowed: 8, or 0" in first.err
    (line,) = (line for line in second.err.splitlines() if "error" in line)
    assert line.startswith("error: process 1: run: mesh.devices: there are 8 cpu devices")
    assert "Traceback" not in first.err + second.err


def test_an_error_that_one_hits_alone_ends_all(here):
    where = f"127.0.0.1:{_free_port()}"
    shared = ["--workdir", here.folder / "alone_in_error", "--coordinator", where]
    words = [
        ["train", run, *shared, "--processes", 2, "--process", number]
        for number, run in enumerate((here.run_file(), here.folder / "nowhere.toml"))
    ]
    commands = [[sys.executable, "-m", "nfflax", *map(str, each)] for each in words]
    first, second = here.started(commands, 2)
    assert second.code == 2, second.err
    assert "error: process 1:" in second.err
    assert "nowhere.toml" in second.err
    assert first.code == 1, first.err
    assert "process 0 has lost another process of this run" in first.err


@pytest.mark.parametrize(
    ("process", "said"),
    [(0, "some of the 2 processes have not joined"), (1, "process 0 does not answer there")],
)
def test_a_process_that_waits_in_vain_says_so(here, process, said):
    impatient = (
        "import sys; from nfflax.cli import main; from nfflax.train import distributed;"
        "distributed.JOIN_SECONDS = 3; sys.exit(main(sys.argv[1:]))"
    )
    where = ["--coordinator", f"127.0.0.1:{_free_port()}"]
    words = ["train", here.run_file(), *where, "--processes", 2, "--process", process]
    (ended,) = here.started([[sys.executable, "-c", impatient, *map(str, words)]], 2)
    assert ended.code == 2, ended.err
    assert said in ended.err
    assert "Traceback" not in ended.err
    assert "fatal" not in ended.err  # nothing of how JAX aborts
