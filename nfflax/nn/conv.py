"""The one place where convolutions become XLA operations, by platform.

Three facts rule it beside those of conv_cpu.py:

- XLA's automatic partitioner gives wrong weight gradients for grouped convolutions when the batch
  is sharded over some mesh axes only (jax 0.10 to 0.12 on CPU; openxla/xla#47945 is its sibling).
  So a grouped convolution never reaches it: groups are dense convolutions, or in `shard_map`.
- It gives wrong weight gradients for any convolution whose map is split in space in the same way.
  On a mesh with an axis that may do so, a convolution is a sum of matrix products.
- Under "fsdp" it may split maps by channel, as a kernel is, and gather maps. `_rows_stay` forbids.
"""

import functools
import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from nfflax.ambient import BATCH_AXES, automatic_axes, has_mesh
from nfflax.nn.conv_cpu import convolve_cpu
from nfflax.nn.conv_parts import Ints, Pads, bundled, edged, native, shifted, tap_starts

Padding = Literal["same", "symmetric"] | Sequence[tuple[int, int]]

GROUP_AXIS = "tensor"  # mesh axis that splits the groups of a grouped convolution


def conv(
    x: jax.Array,
    w: jax.Array,
    *,
    stride: Sequence[int] | int = 1,
    padding: Padding = "same",
    dilation: Sequence[int] | int = 1,
    groups: int = 1,
) -> jax.Array:
    """Convolve `x` (batch, *space, channels) with `w` (*window, channels / groups, outputs).

    `padding` "same" is TensorFlow's, "symmetric" PyTorch's; explicit pairs are taken as they are.
    """
    rank = x.ndim - 2
    strides, dilations = _per_axis(stride, rank), _per_axis(dilation, rank)
    pads = resolve_padding(padding, x.shape[1:-1], w.shape[:-2], strides, dilations)
    if x.shape[-1] != w.shape[-2] * groups or w.shape[-1] % groups:
        raise ValueError(
            f"{x.shape[-1]} channels, a kernel of shape {w.shape} and {groups} groups do not fit"
        )
    how = {"strides": strides, "pads": pads, "dilations": dilations, "groups": groups}
    if _may_split_space():
        return _by_taps(x, w, **how)
    cpu, default = (functools.partial(form, **how) for form in (convolve_cpu, _general))
    return lax.platform_dependent(x, w, cpu=cpu, default=default)


def resolve_padding(
    padding: Padding, space: Sequence[int], window: Sequence[int], strides: Ints, dilations: Ints
) -> Pads:
    """The padding of every spatial axis as (before, after)."""
    if not isinstance(padding, str):
        return tuple((int(before), int(after)) for before, after in padding)
    pads = []
    for size, k, s, d in zip(space, window, strides, dilations, strict=True):
        reach = (k - 1) * d
        if padding == "symmetric":
            pads.append(((s - 1 + reach) // 2,) * 2)
        else:
            total = max(0, (-(-size // s) - 1) * s + reach + 1 - size)
            pads.append((total // 2, total - total // 2))
    return tuple(pads)


def _per_axis(value: Sequence[int] | int, rank: int) -> Ints:
    return (value,) * rank if isinstance(value, int) else tuple(value)


# --- GPU and TPU -----------------------------------------------------------------------------


def _general(
    x: jax.Array, w: jax.Array, *, strides: Ints, pads: Pads, dilations: Ints, groups: int
) -> jax.Array:
    convolve = functools.partial(native, strides=strides, pads=pads, dilations=dilations)
    if groups == 1:
        return _rows_stay(convolve(_rows_stay(x), w))
    free = automatic_axes()
    if not free and (has_mesh() or jax.device_count() == 1):
        # One device, or inside a shard_map over the whole mesh.
        return convolve(x, w, groups=groups)
    batch = _batch_axes(x)
    if not free or batch is None:
        return bundled(x, w, groups, convolve)  # sharding unknown: dense convolutions are safe
    splits = GROUP_AXIS in free and groups % free[GROUP_AXIS] == 0
    group_axis, shards = (GROUP_AXIS, free[GROUP_AXIS]) if splits else (None, 1)
    x_spec = PartitionSpec(batch, *(None,) * (x.ndim - 2), group_axis)
    w_spec = PartitionSpec(*(None,) * (w.ndim - 1), group_axis)
    local = functools.partial(convolve, groups=groups // shards)
    manual = jax.shard_map(
        local, in_specs=(x_spec, w_spec), out_specs=x_spec, axis_names=frozenset(free)
    )
    return manual(x, w)


def _rows_stay(x: jax.Array) -> jax.Array:
    """`x`, whose rows of the batch every device keeps: kernels that are split come to them.

    Left to itself XLA's partitioner may split maps by channel as a kernel is, and gather maps: a
    step of NFNet-F6 with data 16 and fsdp 16 then takes 82.8 GB on each chip, in place of 13.1.
    """
    batch = _batch_axes(x)
    if not batch:
        return x
    others = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1)
    return lax.with_sharding_constraint(x, PartitionSpec(batch, *others))


def _batch_axes(x: jax.Array) -> tuple[str, ...] | None:
    """The axes of the mesh that split the batch; None where its rows do not divide among them."""
    free = automatic_axes()
    batch = tuple(name for name in BATCH_AXES if name in free)
    return None if x.shape[0] % math.prod(free[name] for name in batch) else batch


# --- maps split in space ----------------------------------------------------------------------


def _may_split_space() -> bool:
    """Whether the mesh has axes that are known to split neither the batch nor the channels."""
    known = (*BATCH_AXES, GROUP_AXIS)
    return any(size > 1 for name, size in automatic_axes().items() if name not in known)


def _by_taps(
    x: jax.Array, w: jax.Array, *, strides: Ints, pads: Pads, dilations: Ints, groups: int
) -> jax.Array:
    """A convolution as one matrix product per kernel position, which XLA partitions correctly."""
    dense = functools.partial(_taps, strides=strides, dilations=dilations)
    return bundled(edged(x, pads), w, groups, dense)


def _taps(x: jax.Array, w: jax.Array, *, strides: Ints, dilations: Ints) -> jax.Array:
    """A dense convolution without padding, one matrix product per kernel position."""
    reach = [(k - 1) * d for k, d in zip(w.shape[:-2], dilations, strict=True)]
    spans = [n - r for n, r in zip(x.shape[1:-1], reach, strict=True)]
    products = [
        shifted(x, starts, spans, strides) @ w[tap] for tap, starts in tap_starts(w, dilations)
    ]
    return functools.reduce(jnp.add, products)
