"""When a run was started, resumed and ended, and on what: events.jsonl.

metrics.jsonl must tell the same after any number of interruptions, so what tells of them stands
apart. Each process that trains adds a line when it starts and one when it ends;
a start without an end was killed, or is still at work.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from nfflax.train.errors import TrainError

EVENTS = "events.jsonl"

_LONGEST = 300  # characters that are kept of an error


@contextlib.contextmanager
def noted(workdir: Path, start: int, step: Callable[[], int]) -> Iterator[None]:
    """Around the work of one process, from step `start` on; `step` tells how far it has come."""
    devices = jax.devices()
    try:
        _add(
            workdir,
            event="start",
            step=start,
            device=devices[0].device_kind,
            devices=len(devices),
            processes=jax.process_count(),
        )
    except OSError as error:
        path = workdir / EVENTS
        raise TrainError(f"{path} cannot be written: {error.strerror or error}") from None
    error = None
    try:
        yield
    except BaseException as caught:
        error = f"{type(caught).__name__}: {caught}"[:_LONGEST]
        raise
    finally:
        with contextlib.suppress(OSError):  # a full disk has been told by what it stopped
            _add(workdir, event="end", step=step(), **({"error": error} if error else {}))


def read_events(path: str | Path) -> list[dict[str, Any]]:
    """The lines of an events.jsonl, without those that are damaged; none where there is no file."""
    try:
        lines = Path(path).read_bytes().splitlines()
    except FileNotFoundError:
        return []
    events = []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            event = json.loads(line)
            if isinstance(event, dict) and event.get("event") in ("start", "end"):
                events.append(event)
    return events


def _add(workdir: Path, **event: Any) -> None:
    line = json.dumps({"time": round(time.time(), 3)} | event)
    with open(workdir / EVENTS, "a", encoding="ascii") as file:
        file.write(line + "\n")
