"""How fast a run goes: time per step and images per second, pauses left out."""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

_RECENT = 100  # steps that the present rate is taken over


class _Span(NamedTuple):
    """From the end of one step to the end of the next, in seconds."""

    total: float
    waited: float


class Meter:
    """Turns the moments at which steps end into rates.

    They are means, not medians: a reader that stalls at every tenth step costs what it costs. The
    first step, which compiles, is not counted, nor is what happens inside `paused`.
    """

    def __init__(self, batch_size: int, clock: Callable[[], float] = time.perf_counter):
        self._batch_size, self._clock = batch_size, clock
        self._recent: deque[_Span] = deque(maxlen=_RECENT)
        self._steps, self._seconds = 0, 0.0
        self._last: float | None = None
        self._paused = self._waited = 0.0

    def stepped(self) -> dict[str, float]:
        """Note that a step has ended; `step_time`, `images_per_second`, `input_wait` of late.

        `input_wait` is the share of the time spent waiting for images. Empty after the first step.
        """
        now = self._clock()
        if self._last is not None:
            span = _Span(now - self._last - self._paused, self._waited)
            self._recent.append(span)
            self._steps += 1
            self._seconds += span.total
        self._last, self._paused, self._waited = now, 0.0, 0.0
        total = sum(span.total for span in self._recent)
        if not total:
            return {}
        return {
            "step_time": total / len(self._recent),
            "images_per_second": self._batch_size * len(self._recent) / total,
            "input_wait": sum(span.waited for span in self._recent) / total,
        }

    @property
    def images_per_second(self) -> float | None:
        """Of the whole run so far; None before its second step."""
        return self._batch_size * self._steps / self._seconds if self._seconds else None

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the wait for the next batch."""
        start = self._clock()
        yield
        self._waited += self._clock() - start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is no part of a step: evaluation, saving."""
        start = self._clock()
        yield
        self._paused += self._clock() - start


def duration(seconds: float) -> str:
    """A length of time in a few characters: "1.2s", "45s", "2m05s", "3h07m", "4d02h"."""
    whole = round(seconds)
    if whole < 10:
        return f"{seconds:.1f}s"
    for size, unit, part, below in (
        (86_400, "d", 3600, "h"),
        (3600, "h", 60, "m"),
        (60, "m", 1, "s"),
    ):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // part:02d}{below}"
    return f"{whole}s"
