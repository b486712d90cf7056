"""Signal propagation: three curves over depth that show whether a network is sound.

The plots are those of arXiv:2101.08692, section 3.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from nfflax.nn.net import NFNet
from nfflax.spec.plan import plan
from nfflax.spec.schema import Spec

_IMAGES = 8
_MACS = 16e9  # multiply-adds of a measurement, at most: seconds on two CPU cores
_SMALLEST = 32  # pixels: below, the last maps have no inside left


def signals(model: NFNet, x_NHWC: ArrayLike) -> dict[str, jax.Array]:
    """Signal statistics of an eval pass, as arrays over depth.

    `avg_sq_mean` and `avg_var` (blocks + 1 entries, the stem first): over channels, the average
    squared mean and the average variance of each block's output. `res_avg_var` (one per block):
    the average variance at the end of the residual branch, before stochastic depth, skip gain
    and alpha.
    """
    return _signals(model, jnp.asarray(x_NHWC))


@nnx.jit
def _signals(model: NFNet, x_NHWC: jax.Array) -> dict[str, jax.Array]:
    signals = model.trace(x_NHWC).signals
    assert signals is not None
    return signals


def input_of(spec: Spec) -> tuple[int, int]:
    """How many images a network is measured on, and how large they are: what takes seconds."""
    size = spec.resolution.train
    while size > _SMALLEST and plan(spec, resolution=size).macs() * 2 > _MACS:
        size = max(_SMALLEST, size // 2)
    cost = max(1, plan(spec, resolution=size).macs())
    return int(min(_IMAGES, max(1, _MACS // cost))), size
