"""What `nfflax plan` shows: what was compiled, what was estimated, and which is which."""
# ruff: noqa: RUF001 - the multiplication sign is meant

import math
from typing import TYPE_CHECKING, Any

from nfflax.cli import new_table
from nfflax.spec.table import human

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import RenderableType

    from nfflax.insight.chips import Pod
    from nfflax.insight.estimate import Estimate
    from nfflax.insight.rehearsal import Rehearsal
    from nfflax.insight.search import Candidate
    from nfflax.spec.run import Run

_SHOWN = 12  # ways of a search that people are shown
_STATE = {
    "params": "parameters",
    "ema": "their running average",
    "stats": "BatchNorm's statistics",
    "opt": "the optimiser's state",
}


def estimate_data(estimated: "Estimate", run: "Run") -> dict[str, Any]:
    """An estimate for programs: seconds of a step, bytes of a chip."""
    pod, images = estimated.pod, run.train.examples
    return {
        "pod": pod.name,
        "chips": pod.count,
        "mesh": dict(estimated.mesh),
        "fits": estimated.fits,
        "memory": round(estimated.memory),
        "state": round(estimated.state),
        "capacity": pod.chip.usable,
        "flops": estimated.flops,
        "seconds": {
            "compute": estimated.compute,
            "memory": estimated.traffic,
            "exchange": estimated.exchange,
            "at_peak": estimated.at_peak,
            "expected": estimated.expected,
        },
        "images_per_second": estimated.images_per_second,
        "utilization": estimated.utilization,
        "hours_per_epoch": estimated.hours(images) if images else None,
    }


def page(
    run: "Run", rehearsal: "Rehearsal | None", estimated: "Estimate | None"
) -> "RenderableType":
    """One way to carry out a run."""
    from rich.console import Group
    from rich.text import Text

    mesh = rehearsal.mesh if rehearsal else dict(estimated.mesh) if estimated else {}
    where = estimated.pod.name if estimated else f"{math.prod(mesh.values())} CPU devices"
    rows = run.train.batch_size // (mesh["data"] * mesh["fsdp"]) // run.train.accumulate
    how = [f"{run.spec.name}, {run.model.dtype}, remat {run.model.remat}"]
    how.append(" × ".join(f"{axis} {n}" for axis, n in mesh.items() if n > 1) or "one device")
    images = f"batch {run.train.batch_size:,}, {rows:,} at a time in each part of it"
    title = Text.assemble((run.name, "bold cyan"), f"  on {where}: {' · '.join([*how, images])}")
    parts: list[RenderableType] = [title]
    if rehearsal:
        parts += ["", *_compiled(rehearsal)]
    if estimated:
        parts += [
            "",
            *_estimated(estimated, run, is_compiled=bool(rehearsal and rehearsal.is_compiled)),
        ]
    return Group(*parts)


def _compiled(rehearsal: "Rehearsal") -> "list[RenderableType]":
    """What the compiler says."""
    effort = "as for a run" if rehearsal.optimized else "with the least effort"
    head = f"compiled in {rehearsal.seconds:.0f} s, {effort}, and not run; bytes of one device"
    if not rehearsal.is_compiled:
        needed, there = human(rehearsal.memory), human(rehearsal.capacity)
        return [head, "", f"  does not fit: it needs {needed}B or more, and there are {there}B"]
    memory = new_table()
    memory.add_column("memory", style="bold", no_wrap=True)
    memory.add_column("bytes", justify="right", style="green")
    for name, size in rehearsal.state.items():
        memory.add_row(f"  {_STATE[name]}", f"{human(size)}B")
    rest = rehearsal.arguments - sum(rehearsal.state.values())
    memory.add_row("  a batch, and other arguments", f"{human(max(0, rest))}B")
    memory.add_row("  results in places of their own", f"{human(rehearsal.outputs)}B")
    memory.add_row("  maps, gradients and all that lives between", f"{human(rehearsal.temporary)}B")
    if rehearsal.code:
        memory.add_row("  the program", f"{human(rehearsal.code)}B")
    total = f"{human(rehearsal.memory)}B"
    if rehearsal.capacity:
        verdict = "fits" if rehearsal.fits else "does not fit"
        total += f" of {human(rehearsal.capacity)}B: {verdict}"
    memory.add_section()
    memory.add_row("all", total, style="bold")
    counted = (
        f"by the compiler's count {human(rehearsal.flops)} operations and "
        f"{human(rehearsal.accessed)}B to and from memory (bodies of loops count once)"
    )
    return [head, "", memory, "", _exchanges(rehearsal), "", counted]


def _exchanges(rehearsal: "Rehearsal") -> "RenderableType":
    """What devices exchange in a step."""
    if not rehearsal.exchanges:
        return "devices exchange nothing"
    table = new_table()
    table.add_column("exchanged in a step", style="bold", no_wrap=True)
    for header in ("among", "times", "bytes", "sent by each"):
        table.add_column(header, justify="right")
    for each in rehearsal.exchanges:
        bytes = f"{human(each.bytes)}B", f"{human(each.sent)}B"
        table.add_row(f"  {each.kind}", str(each.devices), f"{each.count:,}", *bytes)
    return table


def _estimated(estimated: "Estimate", run: "Run", *, is_compiled: bool) -> "list[RenderableType]":
    """What arithmetic says."""
    from nfflax.insight.estimate import EFFICIENCY

    chip, count = estimated.pod.chip, estimated.pod.count
    head = (
        f"estimated from the published rates of {count:,} {chip.name}, not measured: "
        f"{chip.flops / 1e12:g} TFLOP/s, {human(chip.memory)}B at {human(chip.memory_rate)}B/s"
    )
    table = new_table()
    table.add_column("a step", style="bold", no_wrap=True)
    table.add_column("time", justify="right", style="green")
    table.add_column("")
    operations = "arithmetic at the peak of bfloat16"
    source = "exchanges as compiled" if is_compiled else "exchanges on paper"
    table.add_row("  arithmetic", _ms(estimated.compute), operations)
    table.add_row("  memory", _ms(estimated.traffic), "what is kept, written and read once")
    table.add_row("  exchange", _ms(estimated.exchange), source)
    table.add_section()
    table.add_row("no faster than", _ms(estimated.at_peak), "the longest of the three")
    reached = f"at {EFFICIENCY:.0%} of the peak, as published for TPU v3; exchanges not hidden"
    table.add_row("to expect", _ms(estimated.expected), reached, style="bold")
    rate = f"{human(estimated.images_per_second)} images/s"
    facts = [f"{rate} · {estimated.utilization:.0%} of the peak is the network's own arithmetic"]
    if images := run.train.examples:
        hours = estimated.hours(images)
        length = f"an epoch of {images:,} images: {_hours(hours)}, {hours * count:,.3g} chip hours"
        whole = estimated.hours(run.steps * run.train.batch_size)
        facts.append(f"{length} · the run of {run.steps:,} steps: {_hours(whole)}")
    if not is_compiled:
        verdict = "fits" if estimated.fits else "does not fit"
        memory = f"{human(estimated.memory)}B of {human(chip.usable)}B"
        facts.append(f"memory, counted: {memory} on each chip: {verdict}")
    return [head, "", table, "", *facts]


def ranking(
    run: "Run",
    pod: "Pod",
    found: "Sequence[Candidate]",
    compiled: "Mapping[int, Rehearsal]",
) -> "RenderableType":
    """The best ways of a search, and what the compiler says of some, by their place in `found`."""
    from rich.console import Group
    from rich.text import Text

    title = Text.assemble((run.name, "bold cyan"), f"  on {pod.name}, {len(found)} ways")
    fits = found[0].estimate.fits
    order = "by the time to expect" if fits else "none fits; by memory"
    table = new_table()
    for header in ("fsdp", "tensor", "remat", "microbatches"):
        table.add_column(header, justify="right", style="bold")
    for header in ("to expect", "exchange", "of peak", "memory"):
        table.add_column(header, justify="right")
    if compiled:
        table.add_column("compiled", justify="right", style="green")
    for place in sorted({*range(len(found))[:_SHOWN], *compiled}):
        estimated = found[place].estimate
        cells = [str(value) for value in found[place].settings.values()]
        cells += [_ms(estimated.expected), _ms(estimated.exchange)]
        cells += [f"{estimated.utilization:.0%}", f"{human(estimated.memory)}B"]
        if place in compiled:
            verdict = "fits" if compiled[place].fits else "does not fit"
            cells.append(f"{human(compiled[place].memory)}B, {verdict}")
        table.add_row(*cells)
    legend = (
        f"{order}; of equals the simplest first. Estimated from published rates, not measured; "
        f"memory is counted, of {human(pod.chip.usable)}B on a chip."
    )
    best = next((place for place, each in compiled.items() if each.fits), 0)
    if not fits:
        return Group(title, "", table, "", legend)
    if compiled and not compiled[best].fits:
        refused = "no way is left: all that were compiled need more, and others count no less."
        return Group(title, "", table, "", legend, "", refused)
    settings = " ".join(f"--set {key}={value}" for key, value in found[best].settings.items())
    command = f"nfflax plan {run.name} --topology {pod.name} {settings}"
    state = "checked by the compiler" if compiled else "on paper, not checked by the compiler"
    return Group(title, "", table, "", legend, "", f"{state}: {command}")


def _ms(seconds: float) -> str:
    """A step's time, or a part of it."""
    return f"{seconds * 1e3:,.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:,.0f} µs"


def _hours(hours: float) -> str:
    """A length of time in the largest unit that leaves it over 1."""
    if hours >= 48:
        return f"{hours / 24:,.1f} days"
    return f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.1f} min"
