"""What the `nfflax data` commands share: types of arguments, and showing that work goes on."""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from nfflax.cli import console


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Remaining()
    with Progress(*columns, console=console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)


@contextmanager
def status() -> Iterator[Callable[[str], None]]:
    """A line that says what is being done, on a terminal, and nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    with console(stderr=True).status("starting") as line:
        yield line.update


def positive(text: str) -> int:
    """A whole number from 1, as an argument."""
    number = int(text) if text.isascii() and text.isdigit() and len(text) < 20 else 0
    if not 1 <= number <= 10**9:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1")
    return number


def whole(text: str) -> int:
    """A whole number from 0, as an argument."""
    try:
        return positive(text) if text != "0" else 0
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0") from None


def seconds(text: str) -> float:
    """A length of time, as an argument."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds up to 3600")
    return number


def reference(text: str) -> str:
    """A name or path, as an argument."""
    if not 1 <= len(text) <= 1000:
        raise argparse.ArgumentTypeError("must have 1 to 1000 characters")
    return text
