"""A run's report: one HTML page that needs nothing else, drawn from what the run's folder holds.

    write_report(["runs/first", "runs/second"], "both.html")

The page is a function of the folders: made twice, it is the same.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from nfflax.insight.report_chart import draw
from nfflax.insight.report_curves import curves
from nfflax.insight.report_html import Html, page, tag
from nfflax.insight.report_record import Record, read_records
from nfflax.insight.report_signals import charts, measured
from nfflax.insight.report_tables import (
    disagreements,
    evaluations,
    heading,
    network,
    notes,
    overview,
    settings,
    state,
)
from nfflax.insight.spp import input_of
from nfflax.spec.errors import Problem
from nfflax.train.errors import CheckpointError

REPORT = "report.html"


def write_report(
    folders: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    spp: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> list[Record]:
    """Write the report on one run, or on several side by side; returns what was read of them.

    `spp` measures the signal propagation of each run's first and last network, which takes some
    seconds per run. `say` is told what is being done. Raises CheckpointError where a folder holds
    no run, or the page cannot be written.
    """
    records = read_records([Path(folder) for folder in folders])
    text = report(records, spp=spp, say=say)
    path = Path(out)
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        temporary.write_bytes(text.encode("utf-8", "replace"))
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        message = f"cannot be written: {error.strerror or error}"
        raise CheckpointError([Problem(str(path), "", message)]) from None
    return records


def report(
    records: Sequence[Record], *, spp: bool = True, say: Callable[[str], None] = lambda _: None
) -> str:
    """The page on these runs."""
    title = ", ".join(record.label for record in records)
    parts = _of_one(records[0]) if len(records) == 1 else _of_several(records)
    head, drawn, rest = parts
    sections = [head, drawn, _propagation(records, say) if spp else None, *rest]
    return page(f"{title} - nfflax report", *(part for part in sections if part))


def _of_one(record: Record) -> tuple[Html, Html | None, list[Html]]:
    rest = []
    if record.lines["eval"]:
        rest.append(_section("Evaluations", evaluations(record)))
    if record.spec:
        rest += [_section("Network", network(record)), _section("Settings", settings(record))]
    return heading(record), _curves([record]), rest


def _of_several(records: Sequence[Record]) -> tuple[Html, Html | None, list[Html]]:
    told = [f"{record.label}: {note}" for record in records for note in record.notes]
    head = tag("header", tag("h1", f"{len(records)} runs"), notes(told), overview(records))
    rest = [_section("Where they differ", disagreements(records))]
    for record in records:
        parts = [evaluations(record)] if record.lines["eval"] else []
        parts += [network(record), settings(record)] if record.spec else []
        whole = tag("details", tag("summary", record.label, " ", state(record)), parts)
        rest.append(whole)
    return head, _curves(records), [*rest[:1], _section("Each run", *rest[1:])]


def _curves(records: Sequence[Record]) -> Html | None:
    if not any(record.lines[kind] for record in records for kind in record.lines):
        return None
    return _section("Curves", draw(curves(records), "curve"))


def _propagation(records: Sequence[Record], say: Callable[[str], None]) -> Html | None:
    """The section on the signal; None where no run has a network to measure."""
    known = [record for record in records if record.spec]
    found = [measured(record, say) for record in known]
    said = notes([note for moved in found for note in moved.notes])
    found = [moved for moved in found if moved.moments]
    if not found:
        return _section("Signal propagation", said) if said else None
    sizes = {input_of(moved.record.spec) for moved in found if moved.record.spec}
    shapes = ", ".join(f"{images} images of {size} px" for images, size in sorted(sizes))
    about = f"From the stem to the last block, on {shapes} of N(0, 1) noise; logarithmic."
    return _section("Signal propagation", tag("p", about), said, draw(charts(found), "signal"))


def _section(title: str, *parts: Html | None) -> Html:
    return tag("section", tag("h2", title), parts)
