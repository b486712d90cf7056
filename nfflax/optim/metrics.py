"""What an optimiser's state has to tell: how much was clipped, what was skipped."""

import jax
import jax.numpy as jnp
import optax

from nfflax.optim.agc import ClipStatistics
from nfflax.optim.guard import GuardState, typical_norm


def metrics(state: optax.OptState) -> dict[str, jax.Array]:
    """The numbers that `agc(statistics=True)` and `guard` keep, wherever they stand in the state.

    Shares of units clipped in the last step are called `clipped` and `clipped/<part>`, the largest
    ratio of a gradient's to its weight's norm `clip_ratio` and `clip_ratio/<part>`.
    """
    found: dict[str, jax.Array] = {}
    kinds = (ClipStatistics, GuardState)
    for node in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, kinds)):
        if isinstance(node, GuardState):
            found |= {
                "guard/norm": node.norm,
                "guard/typical_norm": typical_norm(node),
                "guard/skipped": node.skipped,
                "guard/in_a_row": node.in_a_row,
            } | metrics(node.inner)
        elif isinstance(node, ClipStatistics):
            found |= _clip_metrics(node)
    return found


def _clip_metrics(statistics: ClipStatistics) -> dict[str, jax.Array]:
    parts = statistics.parts.value
    if not parts:
        return {}
    units = jnp.array([count for _, count in parts], jnp.float32)
    shares = statistics.clipped / units
    found = {
        "clipped": jnp.sum(statistics.clipped) / jnp.sum(units),
        "clip_ratio": jnp.max(statistics.largest),
    }
    for i, (part, _) in enumerate(parts):
        found |= {f"clipped/{part}": shares[i], f"clip_ratio/{part}": statistics.largest[i]}
    return found
