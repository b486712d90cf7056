"""Several processes of one run decide alike: what one finds out, all go by.

A file system may show each process something else, and one process that falls back while the others
go on would leave them waiting for ever. With a single process nothing here costs anything.
"""

import pickle
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

T = TypeVar("T")


def by_first(action: Callable[[], T]) -> T:
    """What `action` returns or raises on the first process, on all of them; only it runs it."""
    if jax.process_count() == 1:
        return action()
    outcome: tuple[T | None, Exception | None] = (None, None)
    if jax.process_index() == 0:
        try:
            outcome = action(), None
        except Exception as error:
            outcome = None, error
    result, error = pickle.loads(_from_first(pickle.dumps(outcome)))
    if error is not None:
        raise error
    return result


def all_hold(truth: bool) -> bool:
    """Whether this holds on every process."""
    if jax.process_count() == 1:
        return truth
    return bool(np.all(multihost_utils.process_allgather(np.asarray(truth))))


def _from_first(message: bytes) -> bytes:
    """The first process's message; its length goes ahead, for arrays have a fixed size."""
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(message))))
    buffer = np.zeros(length, np.uint8)
    if jax.process_index() == 0:
        buffer[:] = np.frombuffer(message, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(buffer)).tobytes()
