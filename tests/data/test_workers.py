"""Workers end cleanly: no thread, process or shared memory is left, whatever ended the stream."""

import multiprocessing
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from data_streams import SOURCE, STEPS, assert_equal, evaluate, jpegs, take

from nfflax.data import Data, DataError


@pytest.fixture(scope="module")
def reference() -> list[dict[str, np.ndarray]]:
    return take()


def shared_memory() -> set[str]:
    folder = Path("/dev/shm")
    return {path.name for path in folder.glob("psm_*")} if folder.exists() else set()


def settles(condition) -> bool:
    """Whether something becomes true soon: threads and memory are given back in the background."""
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def test_threads_end():
    before = threading.active_count()
    take(2, data=Data(workers=4))
    assert settles(lambda: threading.active_count() <= before)


def check_processes(expected, workers: int, step: int = 0) -> None:
    before = shared_memory()
    data = Data(workers=workers, worker_kind="process")
    assert_equal(take(len(expected), step=step, data=data), expected)
    assert settles(lambda: not multiprocessing.active_children())
    assert settles(lambda: shared_memory() <= before)


def test_processes_change_nothing_and_leave_nothing(reference):
    check_processes(reference[7:], workers=2, step=7)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 4])
def test_more_processes(reference, workers: int):
    check_processes(reference, workers)
    check_processes(reference[5:], workers, step=5)


@pytest.mark.slow
def test_a_bad_image_in_a_process_ends_the_run_cleanly():
    source, before = jpegs(9), shared_memory()
    source.files[4] = source.files[4][:-30]
    with pytest.raises(DataError, match=r"4\.jpeg"):
        take(STEPS, source, data=Data(workers=2, worker_kind="process"))
    assert settles(lambda: not multiprocessing.active_children())
    assert settles(lambda: shared_memory() <= before)


@pytest.mark.slow
def test_evaluation_in_processes():
    data = Data(workers=2, worker_kind="process")
    assert_equal(evaluate(SOURCE, data=data), evaluate(SOURCE))


KILLED = """
import os, signal, multiprocessing
import numpy as np
from nfflax.data import ArraySource, Data, TrainView, train_batches

if __name__ == "__main__":
    source = ArraySource(np.zeros((9, 4, 4), np.uint8), np.zeros(9, int))
    data = Data(workers=2, worker_kind="process")
    batches = train_batches(source, TrainView(4), batch_size=4, data=data)
    next(batches)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_processes_end_with_a_killed_parent(tmp_path):
    output = tmp_path / "pids"
    with output.open("w") as file:
        subprocess.run([sys.executable, "-c", KILLED], stdout=file, check=False, timeout=120)
    workers = [Path(f"/proc/{pid}") for pid in output.read_text().split()]
    assert len(workers) == 2
    assert settles(lambda: not any(worker.exists() for worker in workers))
