"""`nfflax export`: a trained network as a program that runs without nfflax."""

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from nfflax.cli import Parser, console, display, print_json
from nfflax.cli.data_parts import positive, status
from nfflax.cli.eval import add_network
from nfflax.spec.errors import Problem, SpecError

if TYPE_CHECKING:
    from nfflax.train.inference import Loaded
    from nfflax.weights.exported import Exported

_EXAMPLES = """examples:
  nfflax export runs/digits digits_program
  nfflax export runs/digits digits.onnx
  nfflax export F0_haiku.npz f0 --platforms cpu,cuda --dtype bfloat16 --batch 1
"""


class _ExportError(SpecError):
    """A network that cannot be exported as asked."""

    subject: ClassVar[str] = "export"


def add_arguments(parser: Parser) -> None:
    """Declare the arguments."""
    parser.description = (
        "Write a network as a program that runs without nfflax: StableHLO in a folder, or ONNX.\n"
        "What is written is run on random images, and only kept if it agrees with the network."
    )
    parser.epilog = _EXAMPLES
    parser.set_defaults(run=_export)
    add_network(parser)
    parser.add_argument("place", type=Path, metavar="DST", help="a new folder, or FILE.onnx")
    parser.add_argument(
        "--format",
        choices=("stablehlo", "onnx"),
        help="what to write (onnx where DST ends in .onnx, else stablehlo)",
    )
    parser.add_argument(
        "--platforms",
        metavar="LIST",
        help="what StableHLO is lowered for, of cpu, cuda, rocm and tpu (cpu,cuda,tpu)",
    )
    parser.add_argument(
        "--resolution", type=positive, metavar="N", help="side of the images (the network's own)"
    )
    parser.add_argument(
        "--batch", type=positive, metavar="N", help="fix the number of images (any number)"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="to compute in"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")


def _export(args: argparse.Namespace) -> None:
    from nfflax.train.cache import use_compilation_cache
    from nfflax.train.inference import load_model
    from nfflax.weights.errors import WeightsError

    kind = args.format or ("onnx" if args.place.suffix == ".onnx" else "stablehlo")
    if kind == "onnx" and args.platforms:
        message = "says nothing about ONNX, whose runtimes choose for themselves"
        raise _ExportError([Problem("command line", "--platforms", message, args.platforms)])
    use_compilation_cache()
    with status() as say:
        try:
            export = _exporter(kind, args)
            say(f"loading {args.network}")
            loaded = load_model(args.network, spec=args.spec, dtype=args.dtype)
            written = export(loaded.model, class_names=loaded.class_names, say=say)
        except WeightsError as error:
            problems = [Problem(error.source, "", problem) for problem in error.problems]
            raise _ExportError(problems) from None
    if args.json:
        print_json(_data(loaded, written, args))
    else:
        _show(loaded, written, args)


def _exporter(kind: str, args: argparse.Namespace) -> Callable[..., "Exported"]:
    """What exports a network as asked; what stands against any network is said at once."""
    how = {"resolution": args.resolution, "batch": args.batch, "overwrite": args.overwrite}
    if kind == "onnx":
        from nfflax.weights import onnx_file

        onnx_file.require_ready(args.place, overwrite=args.overwrite)
        return functools.partial(onnx_file.export_onnx, path=args.place, **how)
    from nfflax.weights import export

    platforms = args.platforms.split(",") if args.platforms else export.PLATFORMS
    export.require_ready(args.place, platforms, overwrite=args.overwrite)
    return functools.partial(export.export, folder=args.place, platforms=platforms, **how)


def _data(loaded: "Loaded", written: "Exported", args: argparse.Namespace) -> dict[str, Any]:
    """What was written, for programs."""
    return {
        "network": args.network,
        "spec": loaded.model.spec.name,
        "path": str(written.path),
        "format": written.format,
        "bytes": written.bytes,
        "platforms": list(written.platforms),
        "input_shape": list(written.shape),
        "dtype": args.dtype,
        "difference": written.difference,
        "notes": list(loaded.notes),
    }


def _show(loaded: "Loaded", written: "Exported", args: argparse.Namespace) -> None:
    """The same for people."""
    from rich.table import Table
    from rich.text import Text

    for note in loaded.notes:
        console(stderr=True).print(f"note: {note}", soft_wrap=True)
    console().print(Text(str(written.path), "bold"), soft_wrap=True)
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    form = "ONNX" if written.format == "onnx" else f"StableHLO for {', '.join(written.platforms)}"
    table.add_row("network", f"{loaded.model.spec.name}, {args.dtype}")
    table.add_row("program", f"{form}, {written.bytes / 1e6:,.1f} MB")
    table.add_row("input", " x ".join(map(str, written.shape)))
    away = f"{written.difference:.1g} of the largest logit away from the network, on CPU"
    table.add_row("checked", away)
    display(table)
