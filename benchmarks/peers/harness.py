"""A contestant's side of the conversation: get ready, then run and time steps when told to.

Lines of JSON on standard output, words on standard input: after `{"ready": ...}` each `go N` is
answered with `{"wall": ..., "cpu": ...}`, the seconds of N steps. Whatever libraries print goes to
standard error. While it waits the process sleeps.
"""

import contextlib
import ctypes
import functools
import gc
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from peers.job import Job, Ready

Result = TypeVar("Result")
Run = Callable[[int], None]
"""Runs so many steps, and returns when all is computed."""


@dataclass(frozen=True)
class Program:
    """What `serve` times."""

    compile: Callable[[], Run]
    params: int
    macs: float
    device: str
    versions: dict[str, str]
    device_memory: Callable[[], int] | None = None
    """The most bytes so far on a device with a memory of its own."""
    compiles: bool = True
    """Whether there is anything to compile, or `compile` only starts."""


def serve(prepare: Callable[[Job], Program]) -> None:
    """Do the job named on the command line until told to stop, or say why not."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(**said: object) -> None:
        print(json.dumps(said), file=answers)

    try:
        run, ready = _make_ready(prepare(Job.read(sys.argv[1])))
    except Exception as error:
        answer(error=f"{type(error).__name__}: {error}")
        raise
    answer(ready=asdict(ready))
    for line in sys.stdin:
        _, wall, cpu = timed(functools.partial(run, int(line.split()[1])))
        answer(wall=wall, cpu=cpu)


def _make_ready(program: Program) -> tuple[Run, Ready]:
    run, compile_wall, compile_cpu = timed(program.compile)
    _forget_memory()
    run(1)
    _, step_wall, _ = timed(lambda: run(1))
    return run, Ready(
        compile_wall=compile_wall if program.compiles else 0.0,
        compile_cpu=compile_cpu if program.compiles else 0.0,
        step_wall=step_wall,
        memory=program.device_memory() if program.device_memory else _peak_memory(),
        params=program.params,
        macs=program.macs,
        device=program.device,
        versions=program.versions,
    )


def timed(call: Callable[[], Result]) -> tuple[Result, float, float]:
    """What a call returns, its seconds by the clock and its CPU seconds."""
    wall, cpu = time.perf_counter(), _cpu_seconds()
    result = call()
    return result, time.perf_counter() - wall, _cpu_seconds() - cpu


def _cpu_seconds() -> float:
    """Of all threads and of ended child processes, so far."""
    spent = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in spent)


def _forget_memory() -> None:
    """Give back what compiling took, and start the record of the process's memory anew.

    Only Linux can; elsewhere the record includes compilation.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # man proc_pid_clear_refs: resets VmHWM


def _peak_memory() -> int:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    unit = 1 if sys.platform == "darwin" else 1 << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
