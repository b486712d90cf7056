"""The divergence guard: a step whose gradient is broken changes nothing, and is counted.

One bad batch, or a bit flipped on one of a thousand chips, must not end a month's run; a run that
has diverged must not go on burning it.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nfflax.optim.momentum import MomentumState

_MEMORY = 0.99  # the running average of the gradient's norm looks back about a hundred steps
_HISTORY = 20  # a norm is judged against the average of at least this many good steps


class GuardState(NamedTuple):
    """The guarded transform's state, and what the guard has seen."""

    inner: optax.OptState
    norm: jax.Array
    """Norm of the last gradient, broken ones included."""
    average: jax.Array
    """Running sum behind `typical_norm`: of good steps, not yet divided by its weight."""
    good: jax.Array
    """Steps taken."""
    skipped: jax.Array
    """Steps skipped, in all."""
    in_a_row: jax.Array
    """Steps skipped since the last good one."""


class DivergedError(RuntimeError):
    """The run has diverged: too many steps in a row had a broken gradient."""


def guard(
    inner: optax.GradientTransformation, spike: float = 100.0
) -> optax.GradientTransformationExtraArgs:
    """Skip a step, state of `inner` included, when its gradient is not finite or explodes.

    A gradient explodes when its norm is `spike` times the running average of the steps taken (0:
    never). A loss given as `value=` must be finite as well. A learning-rate schedule belongs after
    the guard, where it goes on counting steps:

        tx = optax.chain(guard(direction), optax.scale_by_learning_rate(schedule))

    The guard costs one read of the gradients: its choice is fused into the update's own passes.
    """
    inner = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> GuardState:
        norms = [jnp.zeros((), jnp.float32) for _ in range(2)]  # distinct: they may be donated
        counts = [jnp.zeros((), jnp.int32) for _ in range(3)]
        return GuardState(inner.init(params), *norms, *counts)

    def update(
        updates: optax.Updates,
        state: GuardState,
        params: optax.Params | None = None,
        *,
        value: jax.typing.ArrayLike | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, GuardState]:
        norm = _norm(updates)
        broken = ~jnp.isfinite(norm)
        if value is not None:
            broken |= ~jnp.isfinite(value)
            extra["value"] = value
        if spike:
            exploding = norm > spike * typical_norm(state)
            broken |= (state.good >= _HISTORY) & exploding
        stepped, after = inner.update(updates, state.inner, params, skip=broken, **extra)

        def kept(old: Any, new: Any) -> Any:
            return new if _keeps_itself(new) else jnp.where(broken, old, new)

        average = _MEMORY * state.average + (1 - _MEMORY) * norm
        one = jnp.ones((), jnp.int32)
        return (
            jax.tree.map(lambda u: jnp.where(broken, jnp.zeros_like(u), u), stepped),
            GuardState(
                inner=jax.tree.map(kept, state.inner, after, is_leaf=_keeps_itself),
                norm=norm,
                average=jnp.where(broken, state.average, average),
                good=state.good + jnp.where(broken, 0, one),
                skipped=state.skipped + jnp.where(broken, one, 0),
                in_a_row=jnp.where(broken, state.in_a_row + 1, 0),
            ),
        )

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def _keeps_itself(node: Any) -> bool:
    """Whether this state obeys `skip` by itself: choosing again would cost XLA a copy of it."""
    return isinstance(node, MomentumState)


def _norm(tree: optax.Updates) -> jax.Array:
    """The norm of a whole tree in float32.

    Unit by unit first, as clipping does for kernels, linear layers and stacks of them: XLA then
    shares the pass with it. On CPU this is also seven times faster than summing an array into one
    number at once, which the barrier keeps XLA from doing.
    """
    squares = []
    for leaf in jax.tree.leaves(tree):
        axes = (-4, -3, -2) if leaf.ndim >= 4 else (-2,) if leaf.ndim >= 2 else ()
        squares.append(jnp.sum(jnp.square(leaf.astype(jnp.float32)), axes, keepdims=True))
    return jnp.sqrt(sum(map(jnp.sum, jax.lax.optimization_barrier(squares)), jnp.zeros(())))


def typical_norm(state: GuardState) -> jax.Array:
    """The gradient norm of the recent good steps."""
    weight = 1 - _MEMORY ** state.good.astype(jnp.float32)
    return state.average / jnp.maximum(weight, 1 - _MEMORY)


def raise_if_diverged(
    metrics: Mapping[str, Any], patience: int, *, step: int, checkpoint: str = ""
) -> None:
    """Raise DivergedError when `metrics`, of `nfflax.optim.metrics`, tell of `patience` bad steps.

    `checkpoint` is the last good one, for the message.
    """
    in_a_row = int(metrics["guard/in_a_row"])
    if in_a_row < patience:
        return
    norm, typical = float(metrics["guard/norm"]), float(metrics["guard/typical_norm"])
    kept = f"The last good checkpoint is {checkpoint}." if checkpoint else "There is no checkpoint."
    raise DivergedError(
        f"the run diverged: the {in_a_row} steps up to step {step} all had a gradient that was not "
        f"finite or exploded (norm {norm:.4g}; before, {typical:.4g}). They were skipped, so the "
        f"weights are those of step {step - in_a_row}. {kept} What helps: a lower peak learning "
        "rate, a longer warm-up, a smaller agc.clipping."
    )
