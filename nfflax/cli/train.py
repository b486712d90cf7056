"""`nfflax train`: a run from its file to checkpoints, curves and the next thing to try."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from nfflax.cli import Parser, add_overrides, display, print_json
from nfflax.cli.data_parts import positive, reference, whole
from nfflax.cli.processes import add_processes, carry_out, is_first, say_error
from nfflax.spec.presets import shipped

if TYPE_CHECKING:
    from nfflax.spec.run import Run
    from nfflax.train.outcome import Result

_EXAMPLES = """examples:
  nfflax train digits
  nfflax train my_run.toml --set train.epochs=90 --workdir runs/short
  nfflax train my_run.toml --resume
  nfflax train my_run.toml --resume --coordinator host0:8476 --processes 2 --process 1
  nfflax train nfnet --dry-run
  nfflax train nfnet --set model.spec=nfnet_f1 --set model.set.head.num_classes=10 --dry-run
"""
_CODES = """exit codes:
    0  done
    1  the run cannot go on: it diverged, a checkpoint cannot be written, a process is gone
    2  the run, the data, the devices or the folder cannot be used as asked
   75  told to stop (SIGTERM): saved; --resume goes on
  130  Ctrl-C: saved; --resume goes on
"""


def add_arguments(parser: Parser) -> None:
    """Declare the arguments."""
    parser.description = "Train a network as a run file says, and leave all of it in one folder."
    parser.epilog = f"{_EXAMPLES}\n{_CODES}\npresets: {', '.join(shipped('runs'))}"
    parser.set_defaults(run=_train)
    parser.add_argument("source", metavar="RUN", help="a run preset's name, or a run file")
    add_overrides(parser, "train.batch_size=1024")
    parser.add_argument(
        "--workdir", type=reference, metavar="DIR", help="the run's folder (runs/NAME)"
    )
    begun = parser.add_mutually_exclusive_group()
    begun.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint, if there is one"
    )
    begun.add_argument(
        "--overwrite", action="store_true", help="remove the run that is in the folder, and start"
    )
    parser.add_argument(
        "--steps", type=positive, metavar="N", help="end at step N, with a checkpoint"
    )
    parser.add_argument(
        "--profile", type=_steps, metavar="A:B", default=range(0), help="record steps A to B"
    )
    parser.add_argument("--dry-run", action="store_true", help="show the plan, and do nothing")
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    add_processes(parser)


def _steps(text: str) -> range:
    """A range of steps, as an argument."""
    try:
        first, last = map(whole, text.split(":"))
        if first < last:
            return range(first, last)
    except (argparse.ArgumentTypeError, ValueError):
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is no range of steps such as 20:30")


def _train(args: argparse.Namespace) -> int:
    if not args.dry_run:
        from nfflax.train.stopping import stops_at_once

        with stops_at_once():
            return carry_out(args, lambda: _carry_out(_run(args), args))
    from nfflax.cli.train_plan import show

    show(_run(args), as_json=args.json)
    return 0


def _run(args: argparse.Namespace) -> "Run":
    from nfflax.spec.load import load_run, parse_override

    return load_run(args.source, dict(map(parse_override, args.overrides)))


def _carry_out(run: "Run", args: argparse.Namespace) -> int:
    from nfflax.optim.guard import DivergedError
    from nfflax.train.cache import use_compilation_cache
    from nfflax.train.errors import TrainError
    from nfflax.train.loop import train

    use_compilation_cache()
    workdir = Path(args.workdir or Path("runs", run.name))
    try:
        result = train(
            run,
            workdir,
            resume=args.resume,
            overwrite=args.overwrite,
            steps=args.steps,
            profile=args.profile,
            stream=sys.stderr,
        )
    except (TrainError, DivergedError) as error:
        say_error(error)
        return 1
    if is_first():
        _close(result, as_json=args.json)
    return result.stopped or 0


def _close(result: "Result", *, as_json: bool) -> None:
    """Draw the curves, and print what came out and what to try next."""
    from nfflax.train.curve import CURVE, draw_curve
    from nfflax.train.history import METRICS, read_history
    from nfflax.train.outcome import closing_data, closing_table

    notes = []
    try:
        history = read_history(result.workdir / METRICS)
        draw_curve(history, result.workdir / CURVE, str(result.workdir))
    except (ImportError, OSError) as error:
        notes.append(str(error))
    if as_json:
        print_json(closing_data(result))
        return
    display(closing_table(result))
    for note in notes:
        display(note)
    if result.step < result.steps:
        print("\nnext: the same command with --resume")
    else:
        print(f"\nnext: nfflax eval {result.workdir}\n      nfflax predict {result.workdir} IMAGE")
