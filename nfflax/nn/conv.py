"""The one place where convolutions become XLA operations, by platform.

Three facts rule it (measurements: benchmarks/conv_lowering.py):

- XLA's automatic partitioner gives wrong weight gradients for grouped convolutions when the batch
  is sharded over some mesh axes only (jax 0.10 to 0.12, CPU; openxla/xla#47945 is its sibling). So a
  grouped convolution never reaches it: groups are dense convolutions, or stand inside `shard_map`.
- On CPU the gradient of a grouped convolution is 20 times slower than that of dense ones.
- On CPU XLA recognises a convolution as fast only when its operands are laid out NHWC x HWIO, and
  reorders others only outside loops. The gradients autodiff writes are others: inside a scanned
  stage they run 30 times slower. `_dense_cpu` writes both gradients in that layout.

Reverse mode only: the CPU rule is a `custom_vjp`, so `jax.jvp` of a kxk convolution is an error.
For a Hessian-vector product take the gradient of a gradient.
"""

import functools
import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, PartitionSpec

Padding = Literal["same", "symmetric"] | Sequence[tuple[int, int]]
Pads = tuple[tuple[int, int], ...]
Ints = tuple[int, ...]

BATCH_AXES = ("data", "fsdp")  # mesh axes that split the batch
GROUP_AXIS = "tensor"  # mesh axis that splits the groups of a grouped convolution

# Narrow groups are computed several at a time, as one dense convolution with a block-diagonal
# kernel at least this wide: the extra products cost less than many tiny convolutions.
_CPU_BUNDLE_WIDTH = 32


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
    fast = functools.partial(
        _pointwise_cpu if _is_pointwise(w, pads) else _bundled_cpu,
        strides=strides,
        pads=pads,
        dilations=dilations,
        groups=groups,
    )
    general = functools.partial(
        _general, strides=strides, pads=pads, dilations=dilations, groups=groups
    )
    return lax.platform_dependent(x, w, cpu=fast, default=general)


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


def _layout(rank: int) -> tuple[str, str, str]:
    """Channels last, for one to three spatial axes."""
    space = "DHW"[-rank:]
    return (f"N{space}C", f"{space}IO", f"N{space}C")


def _native(
    x: jax.Array, w: jax.Array, *, strides: Ints, pads: Pads, dilations: Ints, groups: int = 1
) -> jax.Array:
    return lax.conv_general_dilated(
        x,
        w,
        strides,
        pads,
        rhs_dilation=dilations,
        dimension_numbers=_layout(x.ndim - 2),
        feature_group_count=groups,
    )


# --- GPU and TPU -----------------------------------------------------------------------------


def _general(
    x: jax.Array, w: jax.Array, *, strides: Ints, pads: Pads, dilations: Ints, groups: int
) -> jax.Array:
    native = functools.partial(_native, strides=strides, pads=pads, dilations=dilations)
    if groups == 1:
        return native(x, w)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty and jax.device_count() == 1:
        return native(x, w, groups=groups)
    layout = None if mesh.empty else _manual_layout(mesh, x.shape, groups)
    if layout is None:  # unknown or unsupported sharding: dense convolutions partition correctly
        return _bundled(x, w, groups, 1, native)
    batch, group_axis, shards = layout
    local = functools.partial(native, groups=groups // shards)
    x_spec = PartitionSpec(batch, *(None,) * (x.ndim - 2), group_axis)
    w_spec = PartitionSpec(*(None,) * (w.ndim - 1), group_axis)
    return jax.shard_map(local, in_specs=(x_spec, w_spec), out_specs=x_spec)(x, w)


def _manual_layout(
    mesh: jax.sharding.AbstractMesh, x_shape: Sequence[int], groups: int
) -> tuple[Ints, str | None, int] | None:
    """(batch axes, axis of the groups, its size) of a grouped convolution under `shard_map`.

    None where that would be wrong or wasteful: axes with other names, a split height, a batch that
    does not divide.
    """
    sizes = dict(zip(mesh.axis_names, mesh.axis_sizes, strict=True))
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if AxisType.Explicit in types.values():
        raise ValueError("nfflax needs a mesh of AxisType.Auto axes; this one has Explicit axes")
    free = {name: n for name, n in sizes.items() if types[name] == AxisType.Auto}
    if any(n > 1 for name, n in free.items() if name not in (*BATCH_AXES, GROUP_AXIS)):
        return None
    batch = tuple(name for name in BATCH_AXES if name in free)
    if x_shape[0] % math.prod(free[name] for name in batch):
        return None
    shards = free.get(GROUP_AXIS, 1)
    if groups % shards:
        return batch, None, 1
    return batch, GROUP_AXIS if GROUP_AXIS in free else None, shards


# --- CPU -------------------------------------------------------------------------------------


def _is_pointwise(w: jax.Array, pads: Pads) -> bool:
    return all(k == 1 for k in w.shape[:-2]) and not any(map(any, pads))


def _pointwise_cpu(
    x: jax.Array, w: jax.Array, *, strides: Ints, pads: Pads, dilations: Ints, groups: int
) -> jax.Array:
    """A 1x1 convolution is a matrix product."""
    del pads, dilations
    x = x[(slice(None), *(slice(None, None, s) for s in strides))]
    w = w.reshape(w.shape[-2:])
    return _bundled(x, w, groups, _bundle(x, groups), lambda x, w: x @ w)


def _bundled_cpu(
    x: jax.Array, w: jax.Array, *, strides: Ints, pads: Pads, dilations: Ints, groups: int
) -> jax.Array:
    def dense(x: jax.Array, w: jax.Array) -> jax.Array:
        return _dense_cpu(x, w, strides, pads, dilations)

    return _bundled(x, w, groups, _bundle(x, groups), dense)


def _bundle(x: jax.Array, groups: int) -> int:
    """How many groups one dense convolution covers."""
    return max(1, _CPU_BUNDLE_WIDTH * groups // x.shape[-1])


def _bundled(x: jax.Array, w: jax.Array, groups: int, bundle: int, dense) -> jax.Array:
    """A grouped convolution as dense ones over `bundle` groups each."""
    if groups == 1:
        return dense(x, w)
    inputs, outputs = x.shape[-1] // groups, w.shape[-1] // groups
    parts = []
    for first in range(0, groups, bundle):
        count = min(bundle, groups - first)
        x_part = lax.slice_in_dim(x, first * inputs, (first + count) * inputs, axis=-1)
        w_part = lax.slice_in_dim(w, first * outputs, (first + count) * outputs, axis=-1)
        parts.append(dense(x_part, _block_diagonal(w_part, count)))
    return jnp.concatenate(parts, axis=-1)


def _block_diagonal(w: jax.Array, groups: int) -> jax.Array:
    """The dense kernel that does what `w` does in `groups` groups."""
    if groups == 1:
        return w
    *window, inputs, outputs = w.shape
    per_group = w.reshape(*window, inputs, groups, outputs // groups)
    diagonal = jnp.einsum("...igo,gh->...higo", per_group, jnp.eye(groups, dtype=w.dtype))
    return diagonal.reshape(*window, groups * inputs, outputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _dense_cpu(x: jax.Array, w: jax.Array, strides: Ints, pads: Pads, dilations: Ints):
    return _native(x, w, strides=strides, pads=pads, dilations=dilations)


def _dense_cpu_forward(x: jax.Array, w: jax.Array, strides: Ints, pads: Pads, dilations: Ints):
    return _dense_cpu(x, w, strides, pads, dilations), (x, w)


def _dense_cpu_backward(strides: Ints, pads: Pads, dilations: Ints, saved, dy: jax.Array):
    x, w = saved
    rank = x.ndim - 2
    space, window = x.shape[1:-1], w.shape[:-2]
    ones = (1,) * rank
    # Strides become zeros between the output's gradients: a plain convolution is the fast one.
    spread = [(0, 0, 0), *((0, 0, s - 1) for s in strides), (0, 0, 0)]
    dy = lax.pad(dy, jnp.zeros((), dy.dtype), spread)
    reach = [(k - 1) * d for k, d in zip(window, dilations, strict=True)]

    before = [r - p[0] for r, p in zip(reach, pads, strict=True)]
    dx_pads = tuple(
        (b, n + r - m - b) for n, r, m, b in zip(space, reach, dy.shape[1:-1], before, strict=True)
    )
    mirrored = jnp.flip(w, tuple(range(rank))).swapaxes(-1, -2)
    dx = _native(dy, mirrored, strides=ones, pads=dx_pads, dilations=dilations)

    # The weight gradient correlates x with dy over the batch, which plays the channels.
    dw_pads = tuple(
        (p[0], r + m - n - p[0])
        for n, r, m, p in zip(space, reach, dy.shape[1:-1], pads, strict=True)
    )
    dw = _native(
        x.swapaxes(0, -1),
        jnp.moveaxis(dy, 0, -2),
        strides=dilations,
        pads=dw_pads,
        dilations=ones,
    )
    return dx, jnp.moveaxis(dw, 0, -2)


_dense_cpu.defvjp(_dense_cpu_forward, _dense_cpu_backward)
