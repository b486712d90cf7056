"""`nfflax report`: what runs have come to, as one HTML page."""

import argparse
import os
import sys
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nfflax.cli import Parser, print_json
from nfflax.cli.data_parts import reference, status

if TYPE_CHECKING:
    from nfflax.insight.report_record import Record

_EXAMPLES = """examples:
  nfflax report runs/digits
  nfflax report runs/first runs/second --out both.html
  nfflax report runs/digits --no-spp --json
"""


def add_arguments(parser: Parser) -> None:
    """Declare the arguments."""
    parser.description = "Write a report on runs: one HTML page that needs nothing else."
    parser.epilog = _EXAMPLES
    parser.set_defaults(run=_report)
    parser.add_argument(
        "folders", nargs="+", type=reference, metavar="WORKDIR", help="the folder of a run"
    )
    parser.add_argument(
        "--out",
        type=reference,
        metavar="FILE.html",
        help="where to write it (WORKDIR/report.html; of several runs, report.html)",
    )
    parser.add_argument(
        "--no-spp",
        action="store_false",
        dest="spp",
        help="leave out signal propagation, which takes some seconds per run",
    )
    parser.add_argument(
        "--open",
        choices=("yes", "no"),
        metavar="yes|no",
        help="show it in a browser (yes where the command is typed on a desktop)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")


def _report(args: argparse.Namespace) -> None:
    from nfflax.insight.report import REPORT, write_report

    several = len(args.folders) > 1
    out = Path(args.out or (REPORT if several else Path(args.folders[0], REPORT)))
    with status() as say:
        records = write_report(args.folders, out, spp=args.spp, say=say)
    if args.json:
        print_json({"report": str(out), "runs": [_data(record) for record in records]})
    else:
        for record in records:
            print(_line(record))
        print(f"\nreport  {out}")
    if args.open == "yes" or (args.open is None and not args.json and _has_desktop()):
        webbrowser.open(out.absolute().as_uri())


def _has_desktop() -> bool:
    """Whether a person is there, with a screen that a browser can open on."""
    screens = "DISPLAY", "WAYLAND_DISPLAY"
    is_graphical = sys.platform in ("darwin", "win32") or any(map(os.environ.get, screens))
    return is_graphical and sys.stdout.isatty() and "SSH_CONNECTION" not in os.environ


def _line(record: "Record") -> str:
    """A run in one line."""
    length = f"/{record.length:,}" if record.length else ""
    best, name = record.best, f"{record.average}top1"
    reached = f"  best top-1 {best[name]:.2%} at step {best['step']:,}" if best else ""
    return f"{record.label}  {record.state}  step {record.step:,}{length}{reached}"


def _data(record: "Record") -> dict[str, Any]:
    """The same for programs, and what else the page says of a run in a word."""
    from nfflax.train.history import json_number

    def plain(line: Any) -> dict[str, Any] | None:
        return line and {name: json_number(value) for name, value in line.items()}

    return {
        "workdir": str(record.folder),
        "label": record.label,
        "state": record.state,
        "step": record.step,
        "steps": record.length,
        "seconds": record.seconds,
        "resumed": record.resumed,
        "best": plain(record.best),
        "last": plain(record.last),
        "notes": list(record.notes),
    }
