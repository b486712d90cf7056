"""The parts of the page that are words and tables: what ran, what it reached, what it was."""

import datetime
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nfflax.insight.report_compare import (
    Departure,
    differences,
    run_departure,
    spec_departure,
    values_of,
)
from nfflax.insight.report_html import Html, joined, table, tag
from nfflax.insight.report_record import Record
from nfflax.insight.report_scale import number
from nfflax.spec.plan import plan
from nfflax.spec.table import human
from nfflax.train.history import AVERAGE
from nfflax.train.meter import duration

_ROWS = 500  # evaluations that the table tells, the last ones
_FEW = 10  # steps that a line of the head tells

_STATES = {
    "finished": "good",
    "stopped": "open",
    "unfinished": "open",
    "not begun": "open",
    "diverged": "bad",
    "failed": "bad",
}


def heading(record: Record) -> Html:
    """What ran, how it stands, and its main numbers."""
    summary = record.run.summary if record.run else ""
    return tag(
        "header",
        tag("h1", record.label, " ", state(record)),
        tag("p", summary, class_="summary") if summary else None,
        tag("div", (_figure(*figure) for figure in _figures(record)), class_="figures"),
        tag(
            "dl",
            (tag("div", tag("dt", name), tag("dd", fact)) for name, fact in _facts(record)),
        ),
        notes(record.notes),
    )


def state(record: Record) -> Html:
    """How a run stands, as a coloured word."""
    return tag("span", record.state, class_=f"state {_STATES[record.state]}")


def notes(texts: Sequence[str]) -> Html | None:
    """What the reader should know."""
    if not texts:
        return None
    return tag("ul", (tag("li", text) for text in texts), class_="notes")


def _figure(name: str, value: str, about: str) -> Html:
    return tag("div", tag("b", value), tag("span", name), tag("small", about))


def _figures(record: Record) -> Iterator[tuple[str, str, str]]:
    """The numbers that matter most."""
    if best := record.best:
        value = number(best[f"{record.average}top1"], "share")
        yield "best top-1", value, f"step {best['step']:,}"
    if last := record.last:
        for name, word, kind in (("top1", "last top-1", "share"), ("loss", "last loss", "")):
            value = last.get(f"{record.average}{name}", math.nan)
            yield word, number(value, kind), f"step {last['step']:,}"
    length = f"of {record.length:,}" if record.length else "of an unknown number"
    yield "steps", f"{record.step:,}", length
    if seconds := record.seconds:
        stretches = len(record.stretches)
        yield "time", duration(seconds), f"in {stretches} stretches" if stretches > 1 else "at work"


def _facts(record: Record) -> Iterator[tuple[str, str]]:
    """What ran, on what."""
    if spec := record.spec:
        size = plan(spec)
        cost = f"{human(size.params)} parameters, {human(size.macs())} multiply-adds"
        yield "network", f"{spec.name}: {cost} at {spec.resolution.test} px"
    if run := record.run:
        yield "run", run.name
        data, epoch = run.data, run.train.steps_per_epoch
        images = f", {run.train.examples:,} images" if run.train.examples else ""
        yield "data", f"{data.source}: {data.train}{images}; evaluated on {data.eval}"
        epochs = f", {record.step / epoch:.3g} epochs so far" if epoch else ""
        batches = f"batches of {run.train.batch_size:,}{epochs}"
        yield "training", f"{batches}, seed {run.train.seed}, {run.model.dtype}"
        if record.average:
            yield "accuracy", "of the moving average of the weights, unless it says raw"
        if run.model.weights:
            yield "started from", run.model.weights
    if devices := dict.fromkeys(s.devices for s in record.stretches if s.devices):
        yield "devices", "; ".join(devices)
    if (began := record.began) is not None:
        yield "began", _date(began)
    if record.resumed:
        yield "resumed", _steps(record.resumed)
    if record.stretches and (error := record.stretches[-1].error):
        yield "ended by", error
    if record.checkpoints:
        yield "checkpoints", _steps(record.checkpoints)
    if record.versions:
        versions = (f"{name} {version}" for name, version in record.versions.items())
        yield "versions", ", ".join(versions)
    yield "folder", str(record.folder)


def _date(seconds: float) -> str:
    return f"{datetime.datetime.fromtimestamp(seconds, datetime.UTC):%Y-%m-%d %H:%M} UTC"


def _steps(steps: Sequence[int]) -> str:
    """A few steps, and how many more there are."""
    more = f" and {len(steps) - _FEW} more" if len(steps) > _FEW else ""
    return ", ".join(f"step {step:,}" for step in steps[:_FEW]) + more


def overview(records: Sequence[Record]) -> Html:
    """Several runs side by side: the best and the last of each."""
    head = ["run", "best top-1", "at step", "last top-1", "last top-5", "last loss", "state"]
    head += ["steps", "time", "network", "parameters"]
    highest = max((_top1(record) for record in records), default=math.nan)
    rows = []
    for record in records:
        best, last, spec = record.best, record.last or {}, record.spec
        top1 = number(_top1(record), "share") if best else ""
        rows.append(
            [
                record.label,
                tag("mark", top1) if best and _top1(record) == highest else top1,
                f"{best['step']:,}" if best else "",
                *_scores(last, record.average),
                state(record),
                f"{record.step:,}",
                duration(record.seconds) if record.seconds else "",
                spec.name if spec else "",
                human(plan(spec).params) if spec else "",
            ]
        )
    caption = "Results; of the average of the weights where there is one"
    return table(head, rows, caption=caption, words=(0, 6, 9))


def _top1(record: Record) -> float:
    best = record.best
    return best[f"{record.average}top1"] if best else -math.inf


def disagreements(records: Sequence[Record]) -> Html:
    """The keys in which the runs differ."""
    known = [record for record in records if record.run]
    if len(known) < 2:
        return tag("p", "There are no two runs whose settings can be read.")
    found = differences([record.run for record in known if record.run])
    if not found:
        return tag("p", "The runs say the same, key by key.")
    rows = [[tag("code", key), *(tag("code", value) for value in values)] for key, values in found]
    head = ["key", *(record.label for record in known)]
    caption = "Keys in which the runs differ"
    return table(head, rows, caption=caption, words=range(len(head)))


def evaluations(record: Record) -> Html:
    """Every evaluation, the best one marked."""
    sets = [("average", AVERAGE), ("raw", "")] if record.average else [("", "")]
    scores = [f"{name} {word}".strip() for word, _ in sets for name in ("top-1", "top-5", "loss")]
    head = ["step", "epoch", *scores, "images"]
    found, epoch, best = record.lines["eval"], record.steps_per_epoch, record.best
    rows = []
    shown = found[-_ROWS:]
    for line in [best, *shown] if best and best["step"] < shown[0]["step"] else shown:
        scores = [score for _, prefix in sets for score in _scores(line, prefix)]
        is_best = best is not None and line["step"] == best["step"]
        cells = [
            f"{line['step']:,}",
            f"{line['step'] / epoch:.4g}" if epoch else "",
            *scores,
            number(line["examples"], "count") if "examples" in line else "",
        ]
        rows.append([tag("mark", cell) if is_best else cell for cell in cells])
    left_out = f", the last {_ROWS} of {len(found):,}" if len(found) > _ROWS else ""
    return table(head, rows, caption=f"Evaluations{left_out}; the best is marked", words=())


def _scores(line: Mapping[str, Any], prefix: str) -> list[str]:
    kinds = {"top1": "share", "top5": "share", "loss": "loss"}
    return [
        number(line[f"{prefix}{name}"], kind) if f"{prefix}{name}" in line else ""
        for name, kind in kinds.items()
    ]


def network(record: Record) -> Html:
    """The plan, a row per stage."""
    assert record.spec
    compiled = plan(record.spec)
    params, macs = compiled.params, compiled.macs()

    def row(name: str, parts: Sequence[Any], *about: str) -> list[str]:
        """A part of the network: what is said about it, and its share of the whole."""
        ours, cost = sum(part.params for part in parts), sum(part.macs for part in parts)
        channels = f"{parts[0].in_channels} → {parts[-1].out_channels}"
        shares = human(ours), f"{ours / params:.0%}", human(cost), f"{cost / macs:.0%}"
        return [name, channels, *(about or ("", "", "")), *shares]

    rows = [row("stem", compiled.stem)]
    for number_of_stage, blocks in enumerate(compiled.stages()):
        height, width = blocks[0].resolution
        betas = f"{blocks[0].beta:.3f} to {blocks[-1].beta:.3f}"
        about = str(len(blocks)), f"{height} x {width}", betas
        rows.append(row(f"stage {number_of_stage}", blocks, *about))
    for name, conv in (("final conv", compiled.final_conv), ("classifier", compiled.classifier)):
        if conv:
            rows.append(row(name, [conv]))
    head = ["part", "channels", "blocks", "map", "beta", "parameters", "share"]
    head += ["multiply-adds", "share"]
    about = f"{record.spec.name} at {compiled.input_size[0]} px: {human(params)} parameters,"
    return table(head, rows, caption=f"{about} {human(macs)} multiply-adds")


def settings(record: Record) -> Html:
    """What differs from the nearest shipped files, and everything that the run and network say."""
    pieces: list[Html] = []
    if run := record.run:
        departure = run_departure(run)
        pieces += [_departed("run", departure), _everything("run", values_of(run), departure)]
    if spec := record.spec:
        departure = spec_departure(spec)
        pieces += [
            _departed("network", departure),
            _everything("network", values_of(spec), departure),
        ]
    return joined(pieces)


def _departed(noun: str, departure: Departure) -> Html:
    preset = departure.preset
    if not departure.differences:
        return tag("p", f"The {noun} is ", tag("code", preset), " as shipped.")
    rows = [
        [tag("code", key), tag("code", theirs), tag("mark", tag("code", ours))]
        for key, (theirs, ours) in departure.differences
    ]
    caption = f"Where the {noun} differs from {preset}"
    return table(["key", preset, "here"], rows, caption=caption, words=range(3))


def _everything(noun: str, values: Mapping[str, str], departure: Departure) -> Html:
    changed = {difference.key for difference in departure.differences}
    rows = [
        [
            tag("code", key),
            tag("mark", tag("code", value)) if key in changed else tag("code", value),
        ]
        for key, value in values.items()
    ]
    caption = f"Every key of the {noun}"
    whole = table(["key", "value"], rows, caption=caption, words=range(2))
    return tag("details", tag("summary", caption), whole, class_="keys")
