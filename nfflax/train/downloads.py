"""Weights brought to this machine before they are opened, with a bar where a person waits for them.

In a run of several processes one downloads, and the others find what it has kept: on a disk that
they do not share, each fetches its own.
"""

import contextlib
import os
import sys
from collections.abc import Iterator

from nfflax.train.agree import by_first
from nfflax.weights.download import Progress
from nfflax.weights.places import Fetched, fetch


def fetched(place: str | os.PathLike[str]) -> Fetched:
    """What is at a place (weights/places.py), on this machine; raises WeightsError."""
    found = by_first(lambda: _with_bar(place))
    return found if found.path.exists() else fetch(place)


def _with_bar(place: str | os.PathLike[str]) -> Fetched:
    with _bar(os.fspath(place)) as progress:
        return fetch(place, progress=progress)


@contextlib.contextmanager
def _bar(place: str) -> Iterator[Progress]:
    """A bar on a terminal from the first bytes on, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda _done, _all: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task(f"downloading {place}", total=None)

    def progress(done: int, total: int) -> None:
        bar.start()
        bar.update(task, completed=done, total=total or None)

    try:
        yield progress
    finally:
        bar.stop()
