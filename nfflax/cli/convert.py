"""`nfflax convert`: the weights at any place, as a file or folder that other programs read."""

import argparse
from typing import TYPE_CHECKING, Any

from nfflax.cli import Parser, console, display, new_table, print_json
from nfflax.cli.data_parts import positive, reference, whole

if TYPE_CHECKING:
    from nfflax.train.convert import Conversion

_EXAMPLES = """what is written goes by its name:
  .safetensors   timm's names, or with --to nfflax ours
  .npz           DeepMind's pickle of a Haiku tree
  a folder       for Hugging Face: our names, or with --to timm timm's; --to checkpoint: as a run's

examples:
  nfflax convert F0_haiku.npz f0.safetensors --spec timm_dm_nfnet_f0
  nfflax convert timm_nfnet_l0 nets/l0 --num-classes 10 --in-channels 1
  nfflax convert runs/digits digits.safetensors --to nfflax
"""
_FORMS = ("nfflax", "timm", "deepmind", "checkpoint")


def add_arguments(parser: Parser) -> None:
    """Declare the arguments."""
    parser.description = (
        "Write trained weights in another form, and show what became of each array."
    )
    parser.epilog = _EXAMPLES
    parser.set_defaults(run=_convert)
    parser.add_argument(
        "source",
        type=reference,
        metavar="SRC",
        help="a run's folder or checkpoint, a file of weights, an address, hf://owner/repo,"
        " or a preset with published weights",
    )
    parser.add_argument("target", type=reference, metavar="DST", help="the file or folder to write")
    parser.add_argument("--to", choices=_FORMS, help="what to write, where DST leaves a choice")
    parser.add_argument(
        "--spec",
        type=reference,
        metavar="NAME|FILE",
        help="the network of weights that do not say it",
    )
    parser.add_argument(
        "--num-classes",
        type=whole,
        metavar="N",
        help="classes of a new classifier; 0: none",
    )
    parser.add_argument(
        "--in-channels", type=positive, metavar="N", help="channels of the images it is to take"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what DST is now")
    parser.add_argument("--dry-run", action="store_true", help="show it all and write nothing")
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")


def _convert(args: argparse.Namespace) -> None:
    from nfflax.train.convert import convert

    done = convert(
        args.source,
        args.target,
        to=args.to,
        spec=args.spec,
        num_classes=args.num_classes,
        in_channels=args.in_channels,
        overwrite=args.overwrite,
        dry_run=args.dry_run,
    )
    if args.json:
        print_json(_data(done, written=not args.dry_run))
    else:
        _show(done, written=not args.dry_run)


def _data(done: "Conversion", *, written: bool) -> dict[str, Any]:
    """What was done, for programs."""
    return {
        "source": done.source,
        "format": done.source_format,
        "sha256": done.sha256,
        "target": done.target,
        "to": done.form,
        "spec": done.spec.name,
        "num_classes": done.spec.head.num_classes,
        "in_channels": done.spec.stem.in_channels,
        "arrays": [vars(array) for array in done.moved],
        "numbers": done.numbers,
        "written": written,
        "notes": list(done.notes),
    }


def _show(done: "Conversion", *, written: bool) -> None:
    """The same for people."""
    for note in done.notes:
        console(stderr=True).print(f"note: {note}", soft_wrap=True)
    table = new_table()
    for header in (done.source_format, done.form):
        table.add_column(header, overflow="fold")
    table.add_column("shape", no_wrap=True)
    table.add_column("type", no_wrap=True)
    table.add_column("", style="green")
    for array in done.moved:
        shape = _change(_size(array.before), _size(array.after))
        kind = _change(array.dtype_before, array.dtype_after)
        table.add_row(array.source or "-", array.target or "-", shape, kind, array.done)
    display(table)
    console().print()
    count = sum(bool(array.target) for array in done.moved)
    if done.sha256:
        console().print(f"{done.source}: sha256 {done.sha256}", soft_wrap=True)
    verb = "written" if written else "not written: a dry run"
    total = f"{done.spec.name}, {count:,} arrays, {done.numbers:,} numbers"
    console().print(f"{done.target}: {total}, {verb}", soft_wrap=True)


def _size(shape: tuple[int, ...] | None) -> str:
    return "" if shape is None else "x".join(map(str, shape)) or "1"


def _change(before: str, after: str) -> str:
    if before and after and before != after:
        return f"{before} -> {after}"
    return before or after
