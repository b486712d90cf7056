"""Being told to stop: a signal is remembered, and heeded between two steps."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, NoReturn

PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: try again later
INTERRUPTED = 130  # what shells call a program that Ctrl-C ended


class StoppedError(Exception):
    """Told to stop in the middle of something that can be done again."""

    def __init__(self, code: int):
        super().__init__(code)
        self.code = code


@contextlib.contextmanager
def stops_at_once() -> Iterator[None]:
    """Around a whole command: SIGTERM ends it with the code that says "try again later".

    That is for when there is nothing to save: before `StopSignals` takes over, and after it.
    """

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        os._exit(PREEMPTED)  # an exception inside of an import of JAX's would abort the process

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class StopSignals:
    """Turns SIGTERM and Ctrl-C into a question that the loop asks. A second Ctrl-C ends at once.

    With several processes JAX agrees on the step that all of them stop at, whichever was told.
    """

    def __init__(self) -> None:
        self._code: int | None = None
        self._before: dict[int, Any] = {}
        import jax  # not above: `stops_at_once` must be there before what takes long to import

        self._agrees = jax.process_count() > 1

    def asked(self, step: int) -> int | None:
        """The exit code that was asked for; every process must ask at every step."""
        if self._agrees:
            from jax.experimental import multihost_utils

            agreed = multihost_utils.reached_preemption_sync_point(step)
            return (self._code or PREEMPTED) if agreed else None
        return self._code

    def raise_if_alone(self) -> None:
        """Raise StoppedError if told to stop, in a run of one process.

        Several would have to agree on how far they got.
        """
        if self._code is not None and not self._agrees:
            raise StoppedError(self._code)

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            # Where they agree, SIGTERM is JAX's to handle.
            ours = (signal.SIGINT,) if self._agrees else (signal.SIGTERM, signal.SIGINT)
            for number in ours:
                self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._code == INTERRUPTED:
                raise KeyboardInterrupt
            self._code = INTERRUPTED
            if self._agrees:
                os.kill(os.getpid(), signal.SIGTERM)  # how JAX tells the other processes
        else:
            self._code = PREEMPTED
