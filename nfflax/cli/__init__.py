"""The `nfflax` command: finds the command asked for, runs it, and ends politely when it cannot.

A command is a module of this package with `add_arguments(parser)`, which sets `run`, a function of
the parsed arguments that may return an exit code. Only the module asked for is imported, so that
help costs nothing.
"""

import argparse
import importlib
import io
import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nfflax import __version__
from nfflax.spec.errors import NOT_GIVEN, Problem, SpecError, nearest

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

COMMANDS = {
    "convert": "write trained weights in another form, for other programs",
    "cost": "count what a network costs: parameters, multiply-adds, memory of training",
    "data": "look into a source of images, pack one, see and time what a run feeds",
    "eval": "evaluate a trained network on its own data or on others",
    "export": "write a trained network as a program that runs without nfflax",
    "plan": "show what a run needs on a pod that is not here, and how long it would take",
    "predict": "show what a trained network sees in images",
    "report": "show what runs have come to, as one HTML page",
    "spec": "list, show, check and compare the specs of networks",
    "spp": "measure how the signal passes through a network, and say what is wrong with it",
    "train": "train a network as a run file says, or show what that would do",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line, by default the program's own; returns the exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # an encoding without alpha prints a ? for it
        sys.stdout.reconfigure(errors="replace")
    try:
        try:
            return _run(sys.argv[1:] if argv is None else argv)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough, as in `nfflax spec list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130


class Parser(argparse.ArgumentParser):
    """Takes no abbreviations, suggests the nearest name, shows its help when nothing is asked."""

    def __init__(self, **options: Any):
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **options)
        self.set_defaults(run=self._no_command)

    def _no_command(self, _: argparse.Namespace) -> None:
        self.print_help(sys.stderr)
        self.exit(2)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            names = [str(choice) for choice in action.choices]
            near = nearest(str(value), names)
            hint = f"; did you mean {near}?" if near else ""
            message = f"{value!r} is none of {', '.join(names)}{hint}"
            raise argparse.ArgumentError(action, message)


def add_command(commands: Any, name: str, run: Any, summary: str, *, has_json: bool) -> Parser:
    """Declare a subcommand, with `--json` where it has something to tell programs."""
    added = commands.add_parser(
        name, help=summary, description=f"{summary[0].upper()}{summary[1:]}."
    )
    added.set_defaults(run=run)
    if has_json:
        added.add_argument("--json", action="store_true", help="print JSON, for programs")
    return added


def add_overrides(parser: argparse.ArgumentParser, example: str) -> None:
    """Declare `--set KEY=VALUE`, which `nfflax.spec.load.parse_override` reads."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="KEY=VALUE",
        help=f"change a key, e.g. {example}; may be repeated",
    )


def console(*, stderr: bool = False) -> "Console":
    """A rich console that prints text as it is and knows how wide a line may be."""
    from rich.console import Console

    from nfflax.spec.table import text_width

    return Console(stderr=stderr, width=text_width(), markup=False, emoji=False, highlight=False)


def display(renderable: "RenderableType") -> None:
    """Print something of rich's: in colour on a terminal, as plain text into a pipe or file."""
    from nfflax.spec.table import plain_text

    terminal = console()
    if terminal.is_terminal:
        terminal.print(renderable)
    else:
        print(plain_text(renderable), end="")


def new_table() -> "Table":
    """A table without a frame, as all commands print theirs."""
    from rich.box import SIMPLE
    from rich.table import Table

    air = {"show_edge": False, "pad_edge": False, "padding": (0, 1, 0, 0)}
    return Table(box=SIMPLE, **air, header_style="dim", border_style="dim")


def print_json(data: Any) -> None:
    """Print data for programs: exact numbers, ASCII only."""
    print(json.dumps(data, indent=2, allow_nan=False))


def show_problems(error: SpecError, *, as_json: bool) -> None:
    """Print what is wrong with what was given: to people on stderr, to programs on stdout."""
    if as_json:
        print_json({"problems": [_problem(problem) for problem in error.problems]})
        return
    from rich.text import Text

    text = Text.assemble(("error", "bold red"), f": {error}")
    text.highlight_regex(r"(?m)^    did you mean: .*$", "green")
    sys.stdout.flush()
    console(stderr=True).print(text, soft_wrap=True)


def _run(argv: Sequence[str]) -> int:
    args = _parser(argv).parse_args(argv)
    try:
        return args.run(args) or 0
    except SpecError as error:
        show_problems(error, as_json=getattr(args, "json", False))
        return 2


def _parser(argv: Sequence[str]) -> Parser:
    parser = Parser(
        prog="nfflax",
        description="Normalizer-free networks from short spec files.",
        epilog="`nfflax COMMAND --help` tells more about a command.",
    )
    parser.add_argument("--version", action="version", version=f"nfflax {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    chosen = next((word for word in argv if not word.startswith("-")), "")
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary)
        if name == chosen:
            importlib.import_module(f"nfflax.cli.{name}").add_arguments(command)
    return parser


def _problem(problem: Problem) -> dict[str, Any]:
    """A problem as JSON can hold it; a TOML value that it cannot, a date or NaN, becomes text."""
    data = {key: value for key, value in vars(problem).items() if value is not NOT_GIVEN}
    try:
        json.dumps(data, allow_nan=False)
    except (TypeError, ValueError):
        data["value"] = str(data["value"])
    return data
