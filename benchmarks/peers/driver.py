"""This side of the conversation: contestants as processes, and rounds in which they take turns.

Only one computes at a time. In every round each takes its turn, so that other work on the machine,
and its clock, meet all of them alike; what is compared are turns of the same round.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nfflax
from peers.contestants import Contestant
from peers.job import Job, Ready
from peers.venvs import HERE, VenvError

FOLDER = Path(__file__).resolve().parents[1]
PATHS = FOLDER, Path(nfflax.__file__).parents[1]  # where our own programs find these files, and us
PATIENCE = 900.0  # seconds for anything that a contestant is asked to do
TURN = 1.0  # seconds that a turn takes at least, so that clocks are fine enough
MOST_STEPS = 50


class ContestantError(Exception):
    """A contestant that gave up, and what it said."""


@dataclass(frozen=True)
class Turn:
    """Seconds of one step, the mean over a turn."""

    wall: float
    cpu: float


@dataclass
class Measured:
    """What became of a contestant: turns in the order of the rounds, or the reason for none."""

    contestant: Contestant
    ready: Ready | None = None
    turns: list[Turn] = field(default_factory=list)
    failure: str = ""


class Worker:
    """A contestant's process. It lives as long as the `with` it is opened in."""

    def __init__(self, process: subprocess.Popen[str], log: Path):
        self._process = process
        self._log = log

    @classmethod
    @contextmanager
    def start(cls, contestant: Contestant, python: Path, job: Job) -> Iterator["Worker"]:
        """Start it; it begins to get ready at once."""
        paths = PATHS if contestant.peer in HERE else [FOLDER]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "PYTHONDONTWRITEBYTECODE": "1",  # a peer's source folder stays as it is
            "JAX_PLATFORMS": job.device,
            "JAX_ENABLE_COMPILATION_CACHE": "false",
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
            "TORCHINDUCTOR_COMPILE_THREADS": "1",  # in children that the CPU time counts
        }
        command = [str(python), "-m", f"peers.run_{contestant.peer}", job.write()]
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder, "log")
            with log.open("w") as errors:
                process = subprocess.Popen(
                    command,
                    env=environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                    bufsize=1,
                )
            with process:
                try:
                    yield cls(process, log)
                finally:
                    process.kill()

    def ready(self) -> Ready:
        """Wait until it is."""
        return Ready(**self._answer()["ready"])

    def go(self, steps: int) -> Turn:
        """Let it run so many steps."""
        assert self._process.stdin
        try:
            self._process.stdin.write(f"go {steps}\n")
        except OSError:
            raise ContestantError(self._end()) from None
        seconds = self._answer()
        return Turn(seconds["wall"] / steps, seconds["cpu"] / steps)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        timer = threading.Timer(PATIENCE, self._process.kill)
        timer.start()
        try:
            line = self._process.stdout.readline()
        finally:
            timer.cancel()
        if not line:
            raise ContestantError(self._end())
        said = json.loads(line)
        if "error" in said:
            raise ContestantError(said["error"])
        return said

    def _end(self) -> str:
        code = self._process.wait()
        said = [line for line in self._log.read_text().splitlines() if line.strip()][-1:]
        return f"ended with code {code}: {''.join(said)}"


def measure(
    chosen: Sequence[Contestant],
    start: Callable[[Contestant], Any],
    *,
    rounds: int,
    together: bool,
    tell: Callable[[str], None],
) -> list[Measured]:
    """What each contestant takes, in the given order; `start` gives a `Worker` to be entered.

    Not `together`: one after the other, where a device's memory holds no more than one.
    """
    groups = [chosen] if together else [[each] for each in chosen]
    return [found for group in groups for found in _rounds(group, start, rounds, tell)]


def _rounds(
    group: Sequence[Contestant],
    start: Callable[[Contestant], Any],
    rounds: int,
    tell: Callable[[str], None],
) -> list[Measured]:
    all_found = [Measured(each) for each in group]
    with ExitStack() as stack:
        workers: dict[str, tuple[Worker, int]] = {}
        for found in all_found:
            tell(f"{found.contestant.label}: gets ready")
            try:
                worker = stack.enter_context(start(found.contestant))
                found.ready = worker.ready()
                steps = min(MOST_STEPS, round(TURN / found.ready.step_wall) or 1)
                workers[found.contestant.key] = worker, steps
            except (ContestantError, VenvError) as error:
                found.failure = str(error)
        for number in range(1, rounds + 1):
            tell(f"round {number} of {rounds}")
            for found in all_found:
                if found.failure:
                    continue
                worker, steps = workers[found.contestant.key]
                try:
                    found.turns.append(worker.go(steps))
                except ContestantError as error:
                    found.failure = str(error)
    return all_found


def this_machine() -> str:
    """The processor and the number of its cores that programs may use."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    name = "CPU"
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
    return f"{cores} cores of {name}"
