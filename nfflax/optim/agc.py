"""Adaptive gradient clipping (arXiv:2102.06171, section 4) for any parameter tree.

The gradient of unit i, all weights that feed one output, is scaled down to
`clipping * max(|W_i|, eps)` when its norm is larger. What a unit is depends on a parameter's
meaning and not on its rank: roles say it for NNX modules, `unit_axes` for other trees.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nfflax.optim.roles import (
    Path,
    Roles,
    Static,
    Treatment,
    dotted,
    from_the_end,
    is_probe,
    leaves_by_path,
    nearest_entry,
    part_of,
    path_of,
    with_roles,
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ClipStatistics:
    """What clipping did in one step, for each part of the network; see `nfflax.optim.metrics`."""

    clipped: jax.Array
    """Units clipped, per part."""
    largest: jax.Array
    """The largest |G| / max(|W|, eps), per part."""
    parts: Static
    """Name and number of units of every part."""


class AgcState(NamedTuple):
    """The state of `agc`: a step count for schedules, and statistics when they are asked for."""

    count: jax.Array
    statistics: ClipStatistics | None


def agc(
    clipping: optax.ScalarOrSchedule = 0.01,
    eps: float = 1e-3,
    *,
    roles: Any = None,
    unit_axes: Any = None,
    mask: Any = None,
    statistics: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Adaptive gradient clipping, to stand first in a chain: it judges the raw gradient.

    In any optax project:

        tx = optax.chain(nfflax.agc(0.01), optax.sgd(0.1, momentum=0.9, nesterov=True))
        state = tx.init(params)
        updates, state = tx.update(grads, state, params)

    With NNX, `nnx.Optimizer(model, tx, wrt=nnx.Param)` is all: the parameters of nfflax's modules
    carry their unit axes, also when layers are stacked, and the classifier's weight stays
    unclipped. Where `init` is given plain arrays, name the module as `roles`.

    For parameters without a role, units follow from the rank as in the official code: vectors and
    scalars are one unit; ranks 2 and 3 are reduced over their first axis; kernels of rank 4 and
    more over all axes but the last. That is wrong for stacked layers and one-dimensional
    convolutions, and everything is clipped, the last layer included: say it with `unit_axes` and
    `mask`.

    Norms are computed in float32 or better; updates keep their dtype.

    Args:
      clipping: the largest ratio of a unit's gradient norm to its weight norm, or a schedule of it.
        The paper uses 0.01 for batches of 1024 to 4096, and up to 0.16 for small ones.
      eps: weight norms count as at least this, or zero-initialised units could never move.
      roles: a module, or its state, whose variables carry roles.
      unit_axes: a tree of tuples of axes (negative ones stay right when layers are stacked), or a
        function of the parameters that returns one. An entry holds for all below it; parameters
        that it does not mention keep their role or the rule by rank.
      mask: a tree of bools, or a function of the parameters that returns one: False is not clipped.
        An entry holds for all below it, in place of the role's own flag.
      statistics: keep the share of clipped units in the state, for `nfflax.optim.metrics`.
    """
    if isinstance(clipping, int | float) and not clipping > 0:
        raise ValueError(f"clipping must be greater than 0, not {clipping}")
    if isinstance(eps, int | float) and not eps > 0:
        raise ValueError(f"eps must be greater than 0, not {eps}")

    def make(found: Roles) -> optax.GradientTransformation:
        return _agc(clipping, eps, _Treatments(found, unit_axes, mask), statistics)

    return with_roles(make, roles)


def _agc(
    clipping: optax.ScalarOrSchedule,
    eps: float,
    treatments: "_Treatments",
    with_statistics: bool,
) -> optax.GradientTransformation:
    def init(params: optax.Params) -> AgcState:
        chosen = treatments.of(params)
        statistics = None
        if with_statistics:
            units: dict[str, int] = {}
            for path, (treatment, shape) in chosen.items():
                if treatment.clip:
                    part = part_of(path)
                    units[part] = units.get(part, 0) + _unit_count(shape, treatment.unit_axes)
            parts = Static(tuple(units.items()), unknown=is_probe(params))
            statistics = ClipStatistics(jnp.zeros(len(units)), jnp.zeros(len(units)), parts)
        return AgcState(jnp.zeros((), jnp.int32), statistics)

    def update(
        updates: optax.Updates, state: AgcState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, AgcState]:
        if params is None:
            raise ValueError("agc needs the weights as well: call update(grads, state, params)")
        limit = clipping(state.count) if callable(clipping) else clipping
        chosen, weights = treatments.of(params), leaves_by_path(params)
        ratios: dict[str, list[jax.Array]] = {}

        def clip(keys: tuple[Any, ...], gradient: jax.Array) -> jax.Array:
            path = path_of(keys)
            treatment, _ = chosen[path]
            if not treatment.clip:
                return gradient
            scale, ratio = _clip_scale(gradient, weights[path], treatment.unit_axes, limit, eps)
            ratios.setdefault(part_of(path), []).append(ratio)
            return (gradient * scale).astype(gradient.dtype)

        updates = jax.tree_util.tree_map_with_path(clip, updates)
        statistics = state.statistics
        if statistics is not None:
            statistics = _measured(ratios, limit, statistics.parts)
        return updates, AgcState(jnp.asarray(optax.safe_increment(state.count)), statistics)

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]


def _clip_scale(
    gradient: jax.Array,
    weight: jax.Array,
    unit_axes: tuple[int, ...],
    limit: jax.typing.ArrayLike,
    eps: float,
) -> tuple[jax.Array, jax.Array]:
    """What each unit's gradient is multiplied by, and its norm's ratio to the weight's."""
    gradient_norm = unit_norm(gradient, unit_axes)
    weight_norm = jnp.maximum(unit_norm(weight, unit_axes), eps)
    most = weight_norm * limit
    exceeds = gradient_norm > most
    scale = jnp.where(exceeds, most / jnp.where(exceeds, gradient_norm, 1.0), 1.0)
    return scale, gradient_norm / weight_norm


def unit_norm(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The norm over some axes, which stay with length 1, in float32 or better."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return jnp.sqrt(jnp.sum(jnp.square(x), axis=axes, keepdims=True))


def _unit_count(shape: tuple[int, ...], axes: tuple[int, ...]) -> int:
    return math.prod(shape) // math.prod(shape[axis] for axis in axes)


def _measured(
    ratios: dict[str, list[jax.Array]], limit: jax.typing.ArrayLike, parts: Static
) -> ClipStatistics:
    """Statistics of one step, from the units' ratios: no further pass over the gradients."""
    none = [jnp.zeros((), jnp.float32)]
    clipped, largest = [], []
    for part, _ in parts.value:
        # Numbers before vectors are joined: those may be sharded, and joining would gather them.
        of_part = ratios.get(part, none)
        counts = [jnp.sum(ratio > limit, dtype=jnp.float32) for ratio in of_part]
        clipped.append(jnp.sum(jnp.stack(counts)))
        largest.append(jnp.max(jnp.stack([jnp.max(ratio) for ratio in of_part])))
    stack = lambda values: jnp.stack(values) if values else jnp.zeros(0)  # noqa: E731
    return ClipStatistics(stack(clipped), stack(largest).astype(jnp.float32), parts)


class _Treatments:
    """The unit axes and clip flag of every parameter: explicit ones, roles, or the rule by rank."""

    def __init__(self, roles: Roles, unit_axes: Any, mask: Any):
        self.roles, self.unit_axes, self.mask = roles, unit_axes, mask

    def of(self, params: optax.Params) -> dict[Path, tuple[Treatment, tuple[int, ...]]]:
        """The treatment and shape of each leaf, by path."""
        explicit_axes = _entries(self.unit_axes, params, "unit_axes", _is_axes)
        explicit_clip = _entries(self.mask, params, "mask", None)
        chosen = {}
        for path, leaf in leaves_by_path(params).items():
            shape = jnp.shape(leaf)
            role = self.roles.treatment(path, shape)
            axes = nearest_entry(explicit_axes, path)
            clip = nearest_entry(explicit_clip, path)
            axes = role.unit_axes if axes is None else _checked_axes(axes, shape, path)
            clip = role.clip if clip is None else bool(clip)
            chosen[path] = (Treatment(axes, role.decay, clip), shape)
        return chosen


def _entries(
    tree: Any, params: optax.Params, name: str, is_leaf: Callable[[Any], bool] | None
) -> dict[Path, Any]:
    """An argument's entries by path; each must stand at or above a parameter."""
    if tree is None:
        return {}
    tree = tree(params) if callable(tree) else tree
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    entries = {path_of(keys): leaf for keys, leaf in leaves}
    masked = lambda leaf: isinstance(leaf, optax.MaskedNode)  # noqa: E731
    places = jax.tree_util.tree_leaves_with_path(params, is_leaf=masked)
    known = {path_of(keys)[:n] for keys, _ in places for n in range(len(keys) + 1)}
    for path in entries:
        if path not in known and not is_probe(params):
            raise ValueError(f"{name} has an entry for {dotted(path)!r}: no parameter is there")
    return entries


def _is_axes(value: Any) -> bool:
    return isinstance(value, tuple | list) and all(isinstance(axis, int) for axis in value)


def _checked_axes(axes: Any, shape: tuple[int, ...], path: Path) -> tuple[int, ...]:
    """Explicit axes, counted from the end, for a leaf of this shape."""
    try:
        if _is_axes(axes):
            return from_the_end(axes, len(shape))
    except ValueError:
        pass
    raise ValueError(f"{dotted(path)} has shape {shape}: it has no unit_axes {axes}")
