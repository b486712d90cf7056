"""Learning rates as functions of the step, as the official code defines them.

Step 0 is the first update. A warm-up may end between two steps: five epochs of ImageNet in batches
of 4096 are 1563.92 steps. Nothing is clamped at the end of a run: past `steps` the cosine rises
again, as in the official code (`nfnets/optim.py`).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Schedule = Callable[[jax.typing.ArrayLike], jax.Array]
"""Step to learning rate."""


def warmup_cosine(
    peak: float, steps: float, warmup: float = 0.0, *, start: float = 0.0, end: float = 0.0
) -> Schedule:
    """A line from `start` to `peak` over `warmup` steps, then half a cosine down to `end`."""

    def cosine(step: jax.Array) -> jax.Array:
        angle = jnp.pi * ((step - warmup) / (steps - warmup))
        return 0.5 * (peak - end) * (1 + jnp.cos(angle)) + end

    return _warmed_up(cosine, peak, warmup, start)


def warmup_exponential(
    peak: float, warmup: float = 0.0, *, start: float = 0.0, factor: float = 0.97, every: float
) -> Schedule:
    """A line from `start` to `peak` over `warmup` steps, then `factor` once `every` so many."""

    def staircase(step: jax.Array) -> jax.Array:
        return peak * factor ** jnp.floor((step - warmup) / every)

    return _warmed_up(staircase, peak, warmup, start)


def warmup_constant(peak: float, warmup: float = 0.0, *, start: float = 0.0) -> Schedule:
    """A line from `start` to `peak` over `warmup` steps, then `peak`."""
    return _warmed_up(lambda step: jnp.full_like(step, peak), peak, warmup, start)


def _warmed_up(
    after: Callable[[jax.Array], jax.Array], peak: float, warmup: float, start: float
) -> Schedule:
    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(count, jnp.float32)
        if not warmup:
            return jnp.asarray(after(step))
        line = (peak - start) * (step / warmup) + start
        return jnp.where(step > warmup, after(step), line)

    return schedule
