"""Whether a run that is killed and resumed ends as one that was left alone, to the bit.

    python benchmarks/kill_and_resume.py --kills 30 --terms 10

A tiny network is trained through the command line: once from start to end, then in a folder where
the process is killed at random moments, again and again, and resumed with `--resume`. Some moments
are aimed at what is short: a save, an evaluation, compiling. Checked: metrics.jsonl but for its
clocks, every array of the last checkpoint, what a kill costs and, for SIGTERM, that nothing is lost
and that the exit code is 75. The exit code is 1 where something differs.
"""

import argparse
import collections
import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from nfflax.optim.roles import dotted, leaves_by_path
from nfflax.train.checkpoint import FOLDER
from nfflax.train.history import METRICS
from nfflax.train.snapshot import read_arrays, read_record
from nfflax.train.stopping import PREEMPTED

ROOT = Path(__file__).parents[1]
EVERY = 3  # steps between two checkpoints
PATIENCE = 600  # seconds for one process
CLOCKS = {"time", "seconds", "step_time", "images_per_second", "input_wait"}

# Everything that a resumed run must take up again: momentum, an average, mixing, dropout,
# stochastic depth, a learning rate that changes, an epoch that ends inside a batch.
NETWORK = {
    "extends": "nfnet",
    "name": "tiny",
    "stem": {"width": [16], "stride": 1},
    "stages": {"depth": [3], "width": [32], "stride": [1], "group_width": 8},
    "head": {"num_classes": 10, "dropout": 0.2},
    "regularization": {"stochastic_depth": 0.2},
    "resolution": {"train": 8, "test": 8},
}
RUN = {
    "name": "tiny",
    "model": {"spec": NETWORK, "dtype": "float32"},
    "train": {"batch_size": 16, "examples": 60},
    "data": {"source": "digits", "flip": False, "workers": 1},
    "augment": {"layers": 0, "mixup": 0.2, "cutmix": True},
    "schedule": {"warmup_steps": 2, "learning_rate": 2.0},
    "agc": {"clipping": 0.1},
    "ema": {"decay": 0.9},
    "eval": {"every_steps": 8, "batch_size": 120},
    "checkpoint": {"every_steps": EVERY, "keep": 2},
    "log": {"every": 1, "tensorboard": False},
}
KILL_AIMS = ("save", "anywhere", "evaluation", "anywhere", "save", "compile", "anywhere", "start")
TERM_AIMS = ("import", "save", "evaluation", "anywhere", "compile", "start", "anywhere")


@dataclasses.dataclass
class Stop:
    """A process that was told to stop, or killed."""

    where: str
    """What it was doing."""
    lost: int
    """Steps that were written down and have to be made again."""
    beyond: int = 0
    """Steps that were written down after it was told."""


class Life:
    """One process that carries on with a run."""

    def __init__(self, run: Path, workdir: Path, steps: int):
        self.workdir, self.steps, self.log = workdir, steps, workdir.with_suffix(".log")
        self.found = newest(workdir)
        words = ["-m", "nfflax", "train", run, "--workdir", workdir, "--resume"]
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "",
            "JAX_ENABLE_COMPILATION_CACHE": "true",
            "JAX_COMPILATION_CACHE_DIR": str(run.with_name("compiled")),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONPATH": str(ROOT),
        }
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, *map(str, words)],
                stdout=subprocess.DEVNULL,
                stderr=log,
                env=environment,
            )

    @property
    def said(self) -> str:
        return self.log.read_text("ascii", "replace")

    def doing(self) -> str:
        """What it is at, or was at when it was killed."""
        if not self.said:
            return "import"
        if "compiling" not in self.said:
            return "start"
        if newest(self.workdir) == self.steps:
            return "exit"
        saving = ", saving" if unfinished(self.workdir) else ""
        if self.said.endswith("evaluating\n"):
            return f"evaluation{saving}"
        if last_step(train_lines(self.workdir)) > self.found:
            return f"step{saving}"
        return "compile"

    def reach(self, aim: str, span: float, chance: random.Random) -> bool:
        """Wait for a random moment of this kind; False where the process ends before.

        `span` is about how long it may train before.
        """
        if aim == "import":
            return self._at(self._heeds_sigterm, chance.uniform(0, 2))
        if aim == "start":
            return self._at(lambda: "checking gradients" in self.said, chance.uniform(0, 1))
        if aim == "exit":
            return self._at(lambda: newest(self.workdir) == self.steps, chance.uniform(0, 1))
        if not self._at(lambda: "compiling" in self.said, 0):
            return False
        if aim == "compile":
            return self._at(lambda: True, chance.uniform(0, 1))
        metrics = self.workdir / METRICS
        before = metrics.stat().st_size
        has_begun = self._at(lambda: metrics.stat().st_size > before, chance.uniform(0, span))
        if aim == "anywhere" or not has_begun:
            return has_begun
        if aim == "save":
            return self._at(lambda: bool(unfinished(self.workdir)), chance.uniform(0, 0.15))
        told = self.said.count("evaluating")
        return self._at(lambda: self.said.count("evaluating") > told, chance.uniform(0, 0.15))

    def _at(self, condition: Callable[[], bool], delay: float) -> bool:
        """Some time after a condition begins to hold; False where the process ends before."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                return False
            time.sleep(0.002)
        time.sleep(delay)
        return self.process.poll() is None

    def _heeds_sigterm(self) -> bool:
        """Whether Python has come so far as to have a handler; true where that cannot be known."""
        status = Path(f"/proc/{self.process.pid}/status")
        caught = re.search(r"SigCgt:\s*(\w+)", status.read_text()) if status.exists() else None
        return caught is None or bool(int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)

    def end(self) -> int:
        """Wait for it; the exit code."""
        try:
            return self.process.wait(PATIENCE)
        finally:
            self.process.kill()

    def complaints(self) -> Iterable[str]:
        """What no process of a run should say, whenever it is killed."""
        for word in ("Traceback", "error:", "warning:", "damaged"):
            if word in self.said:
                yield f"it said:\n{self.said}"
                return
        resumed = re.search(r"going on from step (\d+)", self.said)
        if resumed and int(resumed[1]) != self.found:
            yield f"it went on from step {resumed[1]}, not from {self.found}"


def kill(life: Life, chance: random.Random) -> tuple[Stop, list[str]]:
    """End it in an instant."""
    life.process.kill()
    life.end()
    lost = last_step(train_lines(life.workdir)) - newest(life.workdir)
    stop = Stop(life.doing(), lost)
    # A save is under way until the next one is due, so up to two intervals are not on disk.
    wrong = [f"a kill has cost {lost} steps"] if lost > 2 * EVERY else []
    return stop, wrong


def term(life: Life, chance: random.Random) -> tuple[Stop, list[str]]:
    """Tell it to stop, once or twice."""
    where, when = life.doing(), time.time()
    life.process.terminate()
    if chance.random() < 0.4:
        time.sleep(chance.uniform(0, 0.2))
        life.process.terminate()
    code = life.end()
    lines = train_lines(life.workdir)
    stop = Stop(where, last_step(lines) - newest(life.workdir))
    stop.beyond = last_step(lines) - last_step(line for line in lines if line["time"] <= when)
    wrong = []
    if code != PREEMPTED and not (code == 0 and newest(life.workdir) == life.steps):
        wrong.append(f"SIGTERM during {where} ended with code {code}:\n{life.said}")
    if stop.lost:
        wrong.append(f"SIGTERM during {where} has cost {stop.lost} steps")
    # The step that the devices are at, and one that the host has begun.
    if stop.beyond > 2:
        wrong.append(f"after SIGTERM {stop.beyond} steps were made")
    return stop, wrong


class Trial:
    """Runs that are stopped in one way, and compared with the one that was not."""

    def __init__(self, run: Path, reference: Path, steps: int, seed: int):
        self.run, self.reference, self.steps = run, reference, steps
        self.chance = random.Random(seed)
        lines = train_lines(reference)
        self.pace = (lines[-1]["time"] - lines[0]["time"]) / (len(lines) - 1)  # seconds per step

    def carry_out(
        self, name: str, stop: Callable[..., tuple[Stop, list[str]]], aims: list[str]
    ) -> tuple[list[Stop], list[str], int]:
        """The stops, what went wrong, and how many runs were ended by them."""
        stops, wrong, number = [], [], 1
        workdir = self.run.with_name(f"{name}-{number}")
        while True:
            life = Life(self.run, workdir, self.steps)
            left = len(aims) - len(stops)
            # Each stop has its share of the steps that remain, so they are spread over the run.
            share = 2 * (self.steps - life.found) / max(left, 1)
            span = (share + 2 * EVERY) * self.pace
            if left and life.reach(aims[len(stops)], span, self.chance):
                made, problems = stop(life, self.chance)
                stops.append(made)
                wrong += problems
            else:
                if code := life.end():
                    return stops, [*wrong, f"exit code {code}:\n{life.said}"], number
                wrong += differences(self.reference, workdir, self.steps)
                if not left:
                    return stops, wrong, number
                number += 1  # it was done too early: once more
                workdir = self.run.with_name(f"{name}-{number}")
            wrong += life.complaints()


def differences(reference: Path, workdir: Path, steps: int) -> list[str]:
    """The first difference of each kind between two finished runs."""
    found = []
    for number, (one, other) in enumerate(zip_lines(reference, workdir), start=1):
        if one != other:
            found.append(f"{workdir.name}: line {number} of {METRICS}: {one} and {other}")
            break
    if [line["step"] for line in train_lines(workdir)] != [*range(1, steps + 1)]:
        found.append(f"{workdir.name}: {METRICS} does not tell every step once")
    one, other = (last_checkpoint(folder, steps) for folder in (reference, workdir))
    unlike = [name for name in one.keys() | other.keys() if one.get(name) != other.get(name)]
    if unlike:
        found.append(f"{workdir.name}: {len(unlike)} arrays differ, as {min(unlike)}")
    leftovers = [*workdir.glob("*.tmp"), *unfinished(workdir)]
    return found + [f"{path} is left over" for path in leftovers]


def zip_lines(one: Path, other: Path) -> Iterable[tuple[Any, Any]]:
    """The lines of two metrics.jsonl, without clocks; None where one has ended."""

    def lines(workdir: Path) -> list[dict[str, Any]]:
        texts = (workdir / METRICS).read_text("ascii").splitlines()
        return [{k: v for k, v in json.loads(t).items() if k not in CLOCKS} for t in texts]

    both = lines(one), lines(other)
    longest = max(map(len, both))
    return zip(*(found + [None] * (longest - len(found)) for found in both), strict=True)


def last_checkpoint(workdir: Path, step: int) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every array of a checkpoint, as dtype, shape and bytes."""
    folder = workdir / FOLDER / str(step)
    record = read_record(folder)
    found = leaves_by_path(read_arrays(folder, record, record.abstract))
    arrays = {dotted(path): np.asarray(leaf) for path, leaf in found.items()}
    return {name: (str(x.dtype), x.shape, x.tobytes()) for name, x in arrays.items()}


def train_lines(workdir: Path) -> list[dict[str, Any]]:
    """The training steps in metrics.jsonl; a last line that a kill cut short is left out."""
    path = workdir / METRICS
    if not path.exists():
        return []
    lines = [json.loads(x) for x in path.read_text("ascii").splitlines(True) if x.endswith("\n")]
    return [line for line in lines if line["kind"] == "train"]


def last_step(lines: Iterable[dict[str, Any]]) -> int:
    return max((line["step"] for line in lines), default=0)


def newest(workdir: Path) -> int:
    """The step of the newest checkpoint, 0 for none."""
    return max((int(p.name) for p in (workdir / FOLDER).glob("*") if p.name.isdecimal()), default=0)


def unfinished(workdir: Path) -> list[Path]:
    return [*(workdir / FOLDER).glob("*.orbax-checkpoint-tmp*")]


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill a run, resume it, compare.")
    parser.add_argument("--kills", type=int, default=30, help="how often it is killed")
    parser.add_argument("--terms", type=int, default=10, help="how often it is told to stop")
    parser.add_argument("--steps", type=int, default=120, help="how long the run is")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()

    console = Console(soft_wrap=True)
    with tempfile.TemporaryDirectory() as place:
        run, reference = Path(place, "run.json"), Path(place, "reference")
        train = RUN["train"] | {"steps": args.steps}
        run.write_text(json.dumps(RUN | {"train": train}), "utf-8")
        life = Life(run, reference, args.steps)
        if life.end():
            console.print(life.said)
            return 1
        trial = Trial(run, reference, args.steps, args.seed)
        wrong = differences(reference, reference, args.steps)
        for name, stop, cycle, count in (
            ("SIGKILL", kill, KILL_AIMS, args.kills),
            ("SIGTERM", term, TERM_AIMS, args.terms),
        ):
            aims = [cycle[i % len(cycle)] for i in range(count)]
            if stop is kill and count > len(cycle):
                aims[-1] = "exit"
            stops, problems, runs = trial.carry_out(name, stop, aims)
            wrong += problems
            show(console, name, stops, runs)
        for problem in wrong:
            console.print(problem, markup=False)
        console.print("all runs are equal" if not wrong else f"{len(wrong)} problems")
    return 1 if wrong else 0


def show(console: Console, name: str, stops: list[Stop], runs: int) -> None:
    """Where the stops fell, and what they cost."""
    table = Table(title=f"{len(stops)} {name}, runs: {runs}")
    table.add_column("during")
    for header in ("times", "steps lost", "steps finished after"):
        table.add_column(header, justify="right")
    groups: dict[str, list[Stop]] = collections.defaultdict(list)
    for stop in stops:
        groups[stop.where].append(stop)
    for where, there in groups.items():
        numbers = ([stop.lost for stop in there], [stop.beyond for stop in there])
        table.add_row(where, str(len(there)), *(f"{min(x)} to {max(x)}" for x in numbers))
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
