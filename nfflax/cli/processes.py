"""What `nfflax train` and `nfflax eval` do as one of several processes of a run.

All of them run the same command. The first one talks; the others say what went wrong with them in
a line. They end together, each with its exit code, also where one of them has failed alone.
"""

import argparse
import contextlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator

from nfflax.cli import Parser, console, show_problems
from nfflax.cli.data_parts import positive, reference, whole
from nfflax.spec.errors import SpecError

_DEFAULTS = "found out where Slurm, Open MPI or Kubernetes start them, and on TPU pods"
# How the transports and the coordination service begin to say that the other side is gone.
_LOST = re.compile(r"Gloo|NCCL|UNAVAILABLE|Connection (closed|reset)|Socket closed|heartbeat")


def add_processes(parser: Parser) -> None:
    """Declare the arguments that tell a process of the others."""
    group = parser.add_argument_group("several processes", _DEFAULTS)
    group.add_argument(
        "--coordinator", type=reference, metavar="HOST:PORT", help="where process 0 is reached"
    )
    group.add_argument("--processes", type=positive, metavar="N", help="how many there are")
    group.add_argument("--process", type=whole, metavar="I", help="which one this is, from 0")


def carry_out(args: argparse.Namespace, work: Callable[[], int | None]) -> int:
    """The exit code of a command's work, done along with the other processes, if there are any."""
    from nfflax.train import distributed

    try:
        distributed.start(args.coordinator or "", args.processes or 0, args.process)
    except SpecError as error:
        show_problems(error, as_json=args.json)
        distributed.leave(2)
        return 2
    if not distributed.has_joined():
        return work() or 0
    with _own_stdout():
        try:
            code = work() or 0
        except BaseException as error:
            code = _explained(error, as_json=args.json)
    distributed.leave(code)
    return code


def is_first() -> bool:
    """Whether this is the process that talks."""
    return _number() == 0


def say_error(error: Exception) -> None:
    """Print an error that ends the command: a line in all processes but the first."""
    number = _number()
    text = f"process {number}: {_line(error)}" if number else str(error)
    console(stderr=True).print(f"error: {text}", soft_wrap=True)


def _explained(error: BaseException, *, as_json: bool) -> int:
    """Print what ended the work; the exit code for it."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code
    if isinstance(error, SpecError) and is_first():
        show_problems(error, as_json=as_json)
    elif isinstance(error, SpecError):
        say_error(error)
    elif _LOST.search(str(error)):
        text = f"error: process {_number()} has lost another process of this run: {_line(error)}"
        console(stderr=True).print(text, soft_wrap=True)
    else:
        traceback.print_exception(error)
    return 2 if isinstance(error, SpecError) else 1


@contextlib.contextmanager
def _own_stdout() -> Iterator[None]:
    """Keeps stdout for what this program prints: libraries that connect processes print there."""
    sys.stdout.flush()
    ours, theirs = os.dup(1), sys.stdout
    os.dup2(2, 1)
    try:
        with open(ours, "w", encoding=theirs.encoding, errors="replace") as sys.stdout:
            yield
    finally:
        sys.stdout = theirs


def _number() -> int:
    """This process's number; 0 where it is the only one."""
    from nfflax.train import distributed

    if not distributed.has_joined():
        return 0
    import jax

    return jax.process_index()


def _line(error: BaseException) -> str:
    """An error in one line."""
    if isinstance(error, SpecError) and error.problems:
        first, *more = error.problems
        rest = f", and {len(more)} more" if more else ""
        return f"{': '.join(filter(None, (first.file, first.key, first.message)))}{rest}"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
