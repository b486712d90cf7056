"""Sharpness-aware minimisation (SAM, arXiv:2010.01412), as NFNets were trained with it.

A step climbs first: along the gradient of a part of the batch, to a point `rho` away. The gradient
found there, on the whole batch, is the one that the optimiser takes from the original parameters.
The NFNet paper (arXiv:2102.06171) takes rho = 0.05 and 20% of the same batch for the climb, and
each device climbs by its own gradient.

Climbing on 20% of the rows made a gradient of `nfnet_tiny` at batch 32 take 1.15 times as long,
with 1.19 times the operations; on all rows 1.73 times as long, with twice the operations
(`python benchmarks/sam_cost.py`, 2 shared CPU cores, 2026-11-21). The paper says 20 to 40% more
time.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import PartitionSpec as P

from nfflax.ambient import BATCH_AXES, automatic_axes
from nfflax.optim.accumulate import Gradient, batch_rows, mean_dtype


def with_sam(
    value_and_grad: Gradient,
    rho: float = 0.05,
    *,
    fraction: float = 0.2,
    synchronize: bool = False,
) -> Gradient:
    """The same function, with the gradient of a sharpness-aware step and its loss and aux.

    On a mesh (`jax.set_mesh`, axes "data" and "fsdp", either may be missing) the batch falls into
    shards. Each shard climbs by the gradient of its own first rows, alone, and the gradients found
    up there are averaged. This is what the paper found best, and it costs memory under "fsdp":
    every device holds all parameters and a whole gradient during the step, gathered at its start
    and averaged at its end. With `synchronize` all shards climb together, by the mean of their
    gradients; nothing is gathered beyond what the plain step gathers.

    Both passes get the same key, so that dropout and stochastic depth can drop the same things in
    both. Shards that climb alone fold their number into it, so that they drop different ones.

    With accumulation, wrap this function: `with_accumulation(with_sam(f), steps)`. Every microbatch
    then climbs on its own, and no pass is larger than a microbatch.

    Args:
      value_and_grad: the plain function; see `nfflax.optim.accumulate.Gradient`.
      rho: how far to climb, in the norm over all parameters.
      fraction: the share of each shard's rows whose gradient leads the climb, rounded to whole
        rows and at least one.
      synchronize: whether all shards climb by one gradient.
    """
    if not rho > 0:
        raise ValueError(f"rho must be greater than 0, not {rho}")
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be greater than 0 and at most 1, not {fraction}")

    def climb_and_descend(
        params: Any, batch: Any, key: jax.Array, shards: int = 1
    ) -> tuple[tuple[jax.Array, Any], Any]:
        _, ascent = value_and_grad(params, _first_rows(batch, fraction, shards), key)
        return value_and_grad(_climbed(params, ascent, rho), batch, key)

    def sharpness_aware(
        params: Any, batch: Any, key: jax.Array
    ) -> tuple[tuple[jax.Array, Any], Any]:
        axes, rows = automatic_axes(), batch_rows(batch)
        names = tuple(name for name in BATCH_AXES if axes.get(name, 1) > 1)
        shards = math.prod(axes[name] for name in names)
        if rows % shards:
            mesh = " x ".join(f"{name} {axes[name]}" for name in names)
            raise ValueError(
                f"a batch of {rows} rows does not divide into {shards} shards ({mesh})"
            )
        if synchronize or shards == 1:
            return climb_and_descend(params, batch, key, shards)

        def on_one_shard(params: Any, batch: Any, key: jax.Array) -> Any:
            own_key = jax.random.fold_in(key, lax.axis_index(names))
            found = climb_and_descend(params, batch, own_key)
            return jax.tree.map(lambda x: lax.pmean(x.astype(mean_dtype(x)), names), found)

        # Unchecked, or autodiff would add the gradients of all shards up before they climb. Axes of
        # size 1 are taken in, so that on most meshes none is left to the partitioner.
        return jax.shard_map(
            on_one_shard,
            in_specs=(P(), P(names), P()),
            out_specs=P(),
            axis_names={*names, *(name for name, size in axes.items() if size == 1)},
            check_vma=False,
        )(params, batch, key)

    return sharpness_aware


def _first_rows(batch: Any, fraction: float, shards: int) -> Any:
    """The first rows of each shard, still sharded alike."""
    rows = batch_rows(batch) // shards
    taken = max(1, round(fraction * rows))

    def first(x: jax.Array) -> jax.Array:
        by_shard = jnp.reshape(x, (shards, rows, *x.shape[1:]))
        return jnp.reshape(by_shard[:, :taken], (shards * taken, *x.shape[1:]))

    return jax.tree.map(first, batch)


def _climbed(params: Any, ascent: Any, rho: float) -> Any:
    """The parameters, `rho` further along a gradient; a gradient of zero leads nowhere."""
    ascent = jax.tree.map(lambda g: g.astype(jnp.promote_types(g.dtype, jnp.float32)), ascent)
    norm = optax.tree.norm(ascent)
    scale = rho / jnp.where(norm == 0, 1.0, norm)
    return jax.tree.map(lambda p, g: (p + scale * g).astype(p.dtype), params, ascent)
