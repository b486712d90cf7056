"""Tables in Markdown, and their places in a page that is otherwise written by hand.

A place is between `<!-- NAME: ... -->` and `<!-- end of NAME -->`.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from peers.results import Row


class PageError(Exception):
    """A page that has no place for a table."""


def fill(page: Path, name: str, text: str) -> None:
    """Put text in the place of this name; what was there goes."""
    before, start, end = check(page, name)
    page.write_text(f"{before[:start]}\n\n{text}\n\n{before[end:]}", "utf-8")


def check(page: Path, name: str) -> tuple[str, int, int]:
    """The page's text, and where the place of this name begins and ends in it."""
    try:
        text = page.read_text("utf-8")
    except OSError as error:
        raise PageError(f"{page}: {error.strerror}") from None
    place = re.search(rf"<!-- {name}:[^\n]*-->(.*?)<!-- end of {name} -->", text, re.DOTALL)
    if place is None:
        raise PageError(f"{page}: no place '<!-- {name}: ... -->', '<!-- end of {name} -->'")
    return text, *place.span(1)


def contest(rows: Sequence[Row], *, device: str, peak: float) -> str:
    """The table of a contest. `peak`: the chip's operations per second, 0 where not known."""
    on_gpu = device == "cuda"
    columns = {
        "": lambda row: row.label,
        "images/s": lambda row: f"{row.images:,.1f}" if row.images < 1000 else f"{row.images:,.0f}",
        "s": lambda row: seconds(row.wall),
        "CPU s": lambda row: seconds(row.cpu),
        "times the first": lambda row: times(row.wall_ratio),
        "in CPU s": lambda row: times(row.cpu_ratio),
        "of a matrix product": lambda row: f"{row.share:.0%}" if row.share else "",
        "of the chip's peak": lambda row: f"{row.rate / peak:.0%}",
        "compile, s": lambda row: f"{row.compile_wall:.0f}" if row.compile_wall else "",
        "CPU s to compile": lambda row: f"{row.compile_cpu:.0f}" if row.compile_cpu else "",
        "memory": lambda row: f"{row.memory / 1e9:.2f} GB",
        "parameters": lambda row: f"{row.params / 1e6:.1f}M",
        "multiply-adds": lambda row: f"{row.macs / 1e9:.2f}G",
    }
    left_out = {"CPU s", "in CPU s", "CPU s to compile"} if on_gpu else {"images/s", "compile, s"}
    if not peak:
        left_out.add("of the chip's peak")
    shown = {name: cell for name, cell in columns.items() if name not in left_out}
    body = [[cell(row) for cell in shown.values()] for row in rows if not row.failure]
    notes = [f"- {row.label}: not measured: {row.failure}." for row in rows if row.failure]
    return "\n".join([table(list(shown), body), *([""] if notes else []), *notes])


def table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *body))


def seconds(value: float) -> str:
    """Three digits, with no more places than milliseconds have a use for."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def times(ratio: float) -> str:
    """Of the first row; nothing where there is none."""
    return f"{ratio:.2f}" if ratio else ""
