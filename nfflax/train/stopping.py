"""Being told to stop: a signal is remembered, and heeded between two steps."""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import jax

PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: try again later
INTERRUPTED = 130  # what shells call a program that Ctrl-C ended


class StopSignals:
    """Turns SIGTERM and Ctrl-C into a question that the loop asks. A second Ctrl-C ends at once.

    With several processes JAX agrees on the step that all of them stop at, whichever was told.
    """

    def __init__(self) -> None:
        self._code: int | None = None
        self._before: dict[int, Any] = {}
        self._agrees = jax.process_count() > 1

    def asked(self, step: int) -> int | None:
        """The exit code that was asked for; every process must ask at every step."""
        if self._agrees:
            from jax.experimental import multihost_utils

            agreed = multihost_utils.reached_preemption_sync_point(step)
            return (self._code or PREEMPTED) if agreed else None
        return self._code

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            # Where they agree, SIGTERM is JAX's to handle.
            ours = (signal.SIGINT,) if self._agrees else (signal.SIGTERM, signal.SIGINT)
            for number in ours:
                self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
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
