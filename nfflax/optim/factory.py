"""From the tables of a run spec to everything its optimiser needs: `from_spec`."""

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from nfflax.optim.accumulate import with_accumulation, with_preparation
from nfflax.optim.agc import agc
from nfflax.optim.directions import decayed, lars_scaled
from nfflax.optim.ema import update_ema
from nfflax.optim.groups import Group, Groups, resolve
from nfflax.optim.guard import guard
from nfflax.optim.momentum import momentum
from nfflax.optim.roles import Path, map_by_path, nearest_entry
from nfflax.optim.sam import with_sam
from nfflax.optim.schedules import Schedule, warmup_constant, warmup_cosine, warmup_exponential


class RecipeWarning(UserWarning):
    """The optimiser's settings are known to have burnt others."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The optimiser of a run, resolved for one model."""

    tx: optax.GradientTransformationExtraArgs
    """The optax transform; `nfflax.optim.metrics` reads its state."""
    schedule: Schedule
    """Step to learning rate."""
    gradient: Callable[..., Callable[..., Any]]
    """Wraps a function `(params, batch, key) -> ((loss, aux), gradients)` into the one that the run
    asks for: microbatches, sharpness-aware minimisation, or itself. A second function may make the
    parameters that the first one takes from those that train, as rarely as can be."""
    ema: Callable[[Any, Any, Any], Any] | None
    """`(average, params, step) -> average`, or None where the run keeps no average."""
    groups: tuple[Group, ...]
    """Who is treated how, for people."""
    warnings: tuple[str, ...]
    """What others got burnt by."""


def from_spec(run: Any, model: nnx.Module) -> Recipe:
    """The optimiser of a run (see `nfflax.load_run`) for the parameters of `model`.

        run = nfflax.load_run("nfnet")
        recipe = nfflax.optim.from_spec(run, model)
        optimizer = nnx.Optimizer(model, recipe.tx, wrt=nnx.Param)

    The model may be abstract (`nnx.eval_shape`), and may be larger than one network: parameters
    without a role need a rule in `[[optimizer.rules]]`. Raises SpecError for those that have none.
    Settings that others got burnt by give a RecipeWarning.
    """
    groups = resolve(run.optimizer, model)
    schedule = _schedule(run)
    cautions = tuple(_cautions(run))
    for text in cautions:
        warnings.warn(text, RecipeWarning, stacklevel=2)
    clipping = run.agc.clipping or None
    return Recipe(
        tx=_transform(run, groups, schedule),
        schedule=schedule,
        gradient=partial(_gradient, run),
        ema=partial(update_ema, decay=run.ema.decay, warmup=run.ema.warmup)
        if run.ema.decay
        else None,
        groups=groups.listed(run.optimizer.weight_decay, clipping),
        warnings=cautions,
    )


def _schedule(run: Any) -> Schedule:
    table, peak, warmup = run.schedule, run.peak_learning_rate, run.warmup
    if table.kind == "cosine":
        return warmup_cosine(peak, run.steps, warmup, start=table.start, end=table.end)
    if table.kind == "exponential":
        every = table.decay_epochs * run.steps_per_epoch
        factor = table.decay_factor
        return warmup_exponential(peak, warmup, start=table.start, factor=factor, every=every)
    return warmup_constant(peak, warmup, start=table.start)


def _transform(
    run: Any, groups: Groups, schedule: Schedule
) -> optax.GradientTransformationExtraArgs:
    """Guard, clip, direction, learning rate, factors; frozen parameters take part in none of it."""
    direction = _direction(run.optimizer, groups)
    if run.agc.clipping:
        clip = agc(run.agc.clipping, run.agc.eps, roles=groups.roles, statistics=True)
        direction = optax.chain(clip, direction)

    def learns(params: optax.Params) -> Any:
        return map_by_path(lambda path, _: bool(nearest_entry(groups.factors, path)), params)

    if not all(groups.factors.values()):
        direction = optax.masked(direction, learns)
    return optax.chain(
        guard(direction, run.guard.spike),
        optax.scale_by_learning_rate(schedule),
        _scaled_by(groups.factors),
    )


def _direction(table: Any, groups: Groups) -> optax.GradientTransformation:
    roles, weight_decay = groups.roles, table.weight_decay
    follow = partial(momentum, table.momentum, roles, nesterov=table.nesterov)
    if table.kind == "sgd":
        return follow(weight_decay=weight_decay)
    decay = decayed(weight_decay, roles)
    if table.kind == "lars":
        return optax.chain(decay, lars_scaled(table.trust_coefficient, roles), follow())
    if table.kind == "lion":
        return optax.chain(optax.scale_by_lion(table.b1, table.b2), decay)
    return optax.chain(optax.scale_by_adam(table.b1, table.b2, table.epsilon), decay)


def _scaled_by(factors: Mapping[Path, float]) -> optax.GradientTransformation:
    """Each update times its own factor; what is frozen does not move, whatever its gradient."""
    if set(factors.values()) == {1.0}:
        return optax.identity()

    def scaled(path: Path, update: jax.Array) -> jax.Array:
        factor = nearest_entry(factors, path)
        return update * factor if factor else jnp.zeros_like(update)

    return optax.stateless(lambda updates, _: map_by_path(scaled, updates))


def _gradient(
    run: Any, value_and_grad: Callable[..., Any], prepare: Callable[[Any], Any] | None = None
) -> Callable[..., Any]:
    """Each microbatch takes its own ascent, so that SAM costs no more memory than a plain step.

    That leads to other parameters, so only without it are all microbatches prepared at once.
    """
    sam, steps = run.sam, run.train.accumulate
    prepared = partial(with_preparation, prepare=prepare) if prepare else lambda function: function
    if not sam.rho:
        return prepared(with_accumulation(value_and_grad, steps))
    climbing = with_sam(
        prepared(value_and_grad), sam.rho, fraction=sam.fraction, synchronize=sam.synchronize
    )
    return with_accumulation(climbing, steps)


def _cautions(run: Any) -> list[str]:
    """What users of these networks got burnt by."""
    kind, clipping = run.optimizer.kind, run.agc.clipping
    cautions = []
    if kind in ("adamw", "lion"):
        if clipping:
            cautions.append(
                f"agc.clipping = {clipping:g} under {kind}: catastrophic in others' sweeps: "
                "the optimiser scales the clipped gradient up again; set agc.clipping = 0"
            )
        else:
            cautions.append(
                f"{kind}: losses of NFNets have been seen to explode under Adam; the published "
                "networks were trained with SGD and clipping"
            )
        if run.peak_learning_rate > 0.01:
            cautions.append(
                f"{kind} with a peak learning rate of {run.peak_learning_rate:g}: that is a rate "
                "for SGD; about 0.001 is usual, with schedule.reference_batch = 0"
            )
    if kind == "lars":
        cautions.append("lars: stable, but worse than SGD with clipping (arXiv:2102.06171)")
    if kind == "sgd" and clipping and clipping <= 0.01 and run.train.batch_size < 1024:
        cautions.append(
            f"agc.clipping = {clipping:g} at batch size {run.train.batch_size}: 0.01 suits batches "
            "of 1024 to 4096; small ones want weaker clipping, 0.08 to 0.16 at 128 or 256"
        )
    return cautions
