"""What a training run would do, as `nfflax train --dry-run` prints it."""
# ruff: noqa: RUF001 - the multiplication sign and the dash are meant

import math
from typing import TYPE_CHECKING, Any

from nfflax.cli import display, new_table, print_json

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flax import nnx
    from rich.console import RenderableType

    from nfflax.optim.factory import Recipe
    from nfflax.spec.execution import Checkpoint, Eval
    from nfflax.spec.plan import Plan
    from nfflax.spec.run import Run
    from nfflax.train.errors import MeshError
    from nfflax.train.layout import Layout

_COLUMNS = 48  # points at which the schedule is drawn


def show(run: "Run", *, as_json: bool) -> None:
    """Print the plan of a run, and touch nothing."""
    from nfflax.spec.plan import plan
    from nfflax.train.state import abstract_model, recipe_of

    run = timed(run)
    network = plan(run.spec, resolution=run.spec.resolution.train)
    model = abstract_model(run)
    recipe = recipe_of(run, model)
    state = _layout(run, recipe, model)
    if as_json:
        print_json(_data(run, network, recipe, state))
    else:
        display(_page(run, network, recipe, state))


def timed(run: "Run") -> "Run":
    """The run, with the length of its epochs from its source where nothing else says it."""
    if not run.needs_examples:
        return run
    from nfflax.data.errors import DataError
    from nfflax.data.feed import sized
    from nfflax.data.sources import open_source
    from nfflax.spec.errors import Problem

    try:
        return sized(run, open_source(run.data, run.data.train))
    except DataError as error:
        message = "is left to the data source, which cannot be opened"
        problem = Problem(f"run {run.name}", "train.examples", message, 0, "1 or more")
        raise DataError([problem, *error.problems]) from None


def _layout(run: "Run", recipe: "Recipe", model: "nnx.Module") -> "Layout | MeshError":
    """How the training state would lie on the devices here, or why it cannot."""
    from nfflax.train.errors import MeshError
    from nfflax.train.layout import layout
    from nfflax.train.mesh import check_fits, make_mesh
    from nfflax.train.state import abstract_state

    try:
        mesh = make_mesh(run.mesh)
        check_fits(run, mesh)
    except MeshError as error:  # a plan for a pod may be looked at from a laptop
        return error
    return layout(abstract_state(run, recipe, model, mesh))


def _rates(run: "Run", recipe: "Recipe") -> dict[int, float]:
    """The learning rate at steps from the first to the last."""
    import numpy as np

    last = max(run.steps - 1, 0)
    steps = {round(i * last / (_COLUMNS - 1)) for i in range(_COLUMNS)}
    return {step: np.asarray(recipe.schedule(step)).item() for step in sorted(steps)}


def _data(
    run: "Run", network: "Plan", recipe: "Recipe", state: "Layout | MeshError"
) -> dict[str, Any]:
    """The plan of the run, for programs."""
    return {
        "params": network.params,
        "macs": network.macs(),
        "steps": run.steps,
        "epochs": run.steps / run.steps_per_epoch if run.train.examples else None,
        "warmup": run.warmup,
        "peak_learning_rate": run.peak_learning_rate,
        "learning_rate": [{"step": k, "rate": v} for k, v in _rates(run, recipe).items()],
        "groups": [vars(group) for group in recipe.groups],
        "layout": None if isinstance(state, Exception) else state.as_dict(),
        "warnings": list(recipe.warnings),
        "run": run.model_dump(mode="json"),
    }


def _page(
    run: "Run", network: "Plan", recipe: "Recipe", state: "Layout | MeshError"
) -> "RenderableType":
    """The same for people."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from nfflax.spec.table import human

    facts = Table.grid(padding=(0, 2, 0, 0))
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column()
    for name, fact in _facts(run, network):
        facts.add_row(name, fact)
        if name == "schedule":
            facts.add_row("", Text(_curve(list(_rates(run, recipe).values())), "green"))
    notes, below = list(recipe.warnings), []
    if isinstance(state, Exception):
        notes += [f"not on this machine: {problem.message}" for problem in state.problems]
    else:
        total, devices = state.total, math.prod(state.mesh.values())
        where = f"{human(total.per_device)}B on each of {devices} devices here"
        facts.add_row("state", where if devices > 1 else f"{human(total.bytes)}B")
        below = ["", state] * (devices > 1)
    for warning in notes:
        facts.add_row(Text("warning", "yellow"), Text(warning, "yellow"))
    groups = new_table()
    groups.add_column("parameters", style="bold", overflow="fold")
    groups.add_column("tensors", justify="right")
    groups.add_column("weights", justify="right", style="green")
    for header in ("decay", "clip", "rate"):
        groups.add_column(header, justify="right")
    for group in recipe.groups:
        is_frozen = not group.learning_rate
        treatment = group.decay, group.clip, group.learning_rate
        cells = ["–", "–", "frozen"] if is_frozen else [f"{x:g}" if x else "–" for x in treatment]
        cells[2] = cells[2] if is_frozen else f"× {cells[2]}"
        groups.add_row(group.name, str(len(group.parameters)), human(group.count, 2), *cells)
    summary = "".join(c if c.isprintable() else " " for c in run.summary)
    title = Text.assemble((run.name, "bold cyan"), f"  {summary}")
    return Group(title, "", facts, "", groups, *below)


def _facts(run: "Run", network: "Plan") -> "Iterator[tuple[str, str]]":
    """What the run is made of, by name."""
    from nfflax.spec.table import human

    train, schedule, optimizer = run.train, run.schedule, run.optimizer
    side = run.spec.resolution.train
    costs = f"{human(network.params)} params · {human(network.macs(), 2)} MACs at {side}×{side}"
    remat = f" · remat {run.model.remat}" if run.model.remat != "none" else ""
    yield "model", f"{run.spec.name} · {costs} · {run.model.dtype}{remat}"
    yield "data", run.data.in_words
    yield "augment", run.augment.in_words
    microbatches = f" in {train.accumulate} microbatches" if train.accumulate > 1 else ""
    yield "batch", f"{train.batch_size:,} images{microbatches}"
    length = f"{run.steps:,} steps"
    if train.examples:
        length += f" · {run.steps / run.steps_per_epoch:,.4g} epochs of {train.examples:,} images"
    yield "length", length
    peak = f"{run.peak_learning_rate:.4g}"
    if schedule.reference_batch:
        scale = f"{train.batch_size} / {schedule.reference_batch}"
        peak += f" = {schedule.learning_rate:g} × {scale}"
    yield "rate", peak
    warmup = f"{run.warmup:,.6g} steps of warm-up from {schedule.start:g}"
    after = {
        "cosine": f"cosine to {schedule.end:g}",
        "exponential": f"× {schedule.decay_factor:g} every {schedule.decay_epochs:g} epochs",
        "constant": "constant",
    }
    yield "schedule", " · ".join([*[warmup] * bool(run.warmup), after[schedule.kind]])
    settings = {
        "sgd": f"momentum {optimizer.momentum:g}{', Nesterov' if optimizer.nesterov else ''}",
        "adamw": f"b1 {optimizer.b1:g}, b2 {optimizer.b2:g}, epsilon {optimizer.epsilon:g}",
        "lion": f"b1 {optimizer.b1:g}, b2 {optimizer.b2:g}",
    }
    settings["lars"] = f"{settings['sgd']}, trust coefficient {optimizer.trust_coefficient:g}"
    decay = f"weight decay {optimizer.weight_decay:g}"
    yield "optimizer", f"{optimizer.kind} · {settings[optimizer.kind]} · {decay}"
    yield "loss", f"cross entropy · label smoothing {run.loss.label_smoothing:g}"
    agc, sam, ema, guard = run.agc, run.sam, run.ema, run.guard
    yield "AGC", f"{agc.clipping:g} · eps {agc.eps:g}" if agc.clipping else "off"
    synchronized = " · synchronised" * sam.synchronize
    ascent = f"rho {sam.rho:g} · ascent on {sam.fraction:.0%} of the batch{synchronized}"
    yield "SAM", ascent if sam.rho else "off"
    yield "EMA", f"{ema.decay:g}{' with warm-up' * ema.warmup}" if ema.decay else "off"
    broken = "not finite" + (f" or over {guard.spike:g} × its average" if guard.spike else "")
    stop = f"the run stops after {guard.patience} in a row"
    yield "guard", f"skips a step whose gradient is {broken} · {stop}"
    batch = f"batches of {run.eval.batch_size or train.batch_size:,}"
    yield "eval", f"{_often(run, run.eval)} · {run.data.eval} split · {batch}"
    table = run.checkpoint
    best = f" and the best {table.keep_best or ''}".rstrip() * bool(table.keep_best)
    yield "checkpoint", f"{_often(run, table)} · the last {table.keep}{best} are kept"


def _often(run: "Run", table: "Eval | Checkpoint") -> str:
    """How often something is done that is always done at the end."""
    if table.every_epochs and not run.train.examples:
        return f"every {table.every_epochs:g} epochs, and at the end"
    every = run.eval_every if table is run.eval else run.checkpoint_every
    return f"every {every:,} steps, and at the end" if every else "at the end"


def _curve(rates: list[float]) -> str:
    """A line of bars, the highest for the highest rate."""
    bars, highest = "▁▂▃▄▅▆▇█", max(rates)
    return "".join(bars[round(7 * rate / highest) if highest else 0] for rate in rates)
