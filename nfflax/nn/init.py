"""Initial weights: each parameter says its distribution, a whole network is drawn at once.

Compiling one random draw costs XLA on CPU about half a second, whatever its size. So `draw_all`
fills a whole abstract network from one draw per kind of distribution.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

Kind = Literal["constant", "normal", "truncated", "uniform"]


@dataclass(frozen=True)
class Init:
    """`scale` times a constant 1, a standard normal, one cut at 2, or a uniform on (-1, 1)."""

    kind: Kind
    scale: float

    def draw(self, key: jax.Array | None, shape: Sequence[int]) -> jax.Array:
        """One float32 array."""
        return _standard(self.kind, key, shape) * self.scale


ZEROS, ONES = Init("constant", 0.0), Init("constant", 1.0)


def fan_in_normal(shape: Sequence[int]) -> Init:
    """The official kernels: N(0, 1 / fan_in), outputs on the last axis."""
    return Init("normal", math.prod(shape[:-1]) ** -0.5)


def _standard(kind: Kind, key: jax.Array | None, shape: Sequence[int]) -> jax.Array:
    if kind == "constant" or key is None:
        return jnp.ones(shape)
    if kind == "normal":
        return jax.random.normal(key, shape)
    if kind == "truncated":
        return jax.random.truncated_normal(key, -2.0, 2.0, shape)
    return jax.random.uniform(key, shape, minval=-1.0, maxval=1.0)


def draw_all(key: jax.Array, abstract: nnx.State) -> nnx.State:
    """Values for every parameter of an abstract state, by the Init that each one carries.

    Running statistics carry none: means start at 0, variances at 1.
    """
    flat = nnx.to_flat_state(abstract)
    by_kind: dict[Kind, list[tuple[tuple, nnx.Variable, Init]]] = {}
    for path, variable in flat:
        init = variable.get_metadata().get("init") or (ONES if path[-1] == "var" else ZEROS)
        by_kind.setdefault(init.kind, []).append((path, variable, init))
    values = {}
    for stream, (kind, members) in enumerate(sorted(by_kind.items())):
        sizes = [math.prod(variable.shape) for _, variable, _ in members]
        pool = _standard(kind, jax.random.fold_in(key, stream), (sum(sizes),))
        start = 0
        for (path, variable, init), size in zip(members, sizes, strict=True):
            drawn = jax.lax.slice_in_dim(pool, start, start + size) * init.scale
            values[path] = variable.replace(drawn.reshape(variable.shape))
            start += size
    return nnx.from_flat_state([(path, values[path]) for path, _ in flat])
