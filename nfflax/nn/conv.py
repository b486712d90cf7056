"""The one place where convolutions become XLA operations, by platform.

Five facts rule it (measurements: benchmarks/conv_lowering.py):

- XLA's automatic partitioner gives wrong weight gradients for grouped convolutions when the batch
  is sharded over some mesh axes only (jax 0.10 to 0.12 on CPU; openxla/xla#47945 is its sibling).
  So a grouped convolution never reaches it: groups are dense convolutions, or in `shard_map`.
- It gives wrong weight gradients for any convolution whose map is split in space in the same way.
  On a mesh with an axis that may do so, a convolution is a sum of matrix products.
- On CPU the gradient of a grouped convolution is 20 times slower than that of dense ones.
- On CPU XLA recognises a convolution as fast only when its operands are laid out NHWC x HWIO, and
  reorders others only outside loops. The gradients autodiff writes are others: inside a scanned
  stage they run 30 times slower. `_dense_cpu` writes both gradients in that layout.
- Under "fsdp" it may split maps by channel, as a kernel is, and gather maps. `_rows_stay` forbids.

Reverse mode only: the CPU rule is a `custom_vjp`, so `jax.jvp` of a kxk convolution is an error.
For a Hessian-vector product take the gradient of a gradient.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from nfflax.ambient import BATCH_AXES, automatic_axes, has_mesh

Padding = Literal["same", "symmetric"] | Sequence[tuple[int, int]]
Pads = tuple[tuple[int, int], ...]
Ints = tuple[int, ...]
Dense = Callable[[jax.Array, jax.Array], jax.Array]

GROUP_AXIS = "tensor"  # mesh axis that splits the groups of a grouped convolution

# Narrow groups are computed several at a time, as one dense convolution with a block-diagonal
# kernel about this wide: the extra products cost less than many tiny convolutions.
_BUNDLE_WIDTH = 32


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
    fast = functools.partial(_pointwise_cpu if _is_pointwise(w, pads) else _bundled_cpu, **how)
    return lax.platform_dependent(x, w, cpu=fast, default=functools.partial(_general, **how))


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
        return _rows_stay(native(_rows_stay(x), w))
    free = automatic_axes()
    if not free and (has_mesh() or jax.device_count() == 1):
        return native(x, w, groups=groups)  # one device, or inside a shard_map over the whole mesh
    batch = _batch_axes(x)
    if not free or batch is None:
        return _bundled(x, w, groups, native)  # sharding unknown: dense convolutions are safe
    splits = GROUP_AXIS in free and groups % free[GROUP_AXIS] == 0
    group_axis, shards = (GROUP_AXIS, free[GROUP_AXIS]) if splits else (None, 1)
    x_spec = PartitionSpec(batch, *(None,) * (x.ndim - 2), group_axis)
    w_spec = PartitionSpec(*(None,) * (w.ndim - 1), group_axis)
    local = functools.partial(native, groups=groups // shards)
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
    x = _edged(x, pads)
    return _bundled(x, w, groups, functools.partial(_taps, strides=strides, dilations=dilations))


def _taps(x: jax.Array, w: jax.Array, *, strides: Ints, dilations: Ints) -> jax.Array:
    """A dense convolution without padding, one matrix product per kernel position."""
    reach = [(k - 1) * d for k, d in zip(w.shape[:-2], dilations, strict=True)]
    spans = [n - r for n, r in zip(x.shape[1:-1], reach, strict=True)]
    products = [
        _shifted(x, starts, spans, strides) @ w[tap] for tap, starts in _tap_starts(w, dilations)
    ]
    return functools.reduce(jnp.add, products)


def _tap_starts(w: jax.Array, dilations: Ints) -> Iterator[tuple[Ints, Ints]]:
    """Every position in a kernel's window, and how far it lies from the first."""
    for tap in itertools.product(*map(range, w.shape[:-2])):
        yield tap, tuple(t * d for t, d in zip(tap, dilations, strict=True))


def _shifted(x: jax.Array, starts: Ints, spans: Sequence[int], strides: Ints) -> jax.Array:
    """What one position of the window sees of a padded map."""
    places = zip(starts, spans, strides, strict=True)
    return x[(slice(None), *(slice(start, start + span, s) for start, span, s in places))]


def _edged(x: jax.Array, pads: Sequence[tuple[int, int]]) -> jax.Array:
    """A map with zeros around it, or cut where padding is negative."""
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *((*p, 0) for p in pads), (0, 0, 0)])


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
    return _bundled(x, w, groups, lambda x, w: x @ w)


def _bundled_cpu(
    x: jax.Array, w: jax.Array, *, strides: Ints, pads: Pads, dilations: Ints, groups: int
) -> jax.Array:
    def dense(x: jax.Array, w: jax.Array) -> jax.Array:
        return _dense_cpu(*_varying_alike(x, w), strides, pads, dilations)

    inputs, outputs = x.shape[-1] // groups, w.shape[-1] // groups
    bundle = _bundle(inputs)
    turns = groups // bundle
    if turns <= 2:
        return _bundled(x, w, groups, dense)

    def turn(parts: tuple[jax.Array, jax.Array]) -> jax.Array:
        return dense(parts[0], _block_diagonal(parts[1], bundle))

    # A loop compiles one of them, and runs no slower.
    looped = turns * bundle
    xs, ws = _split(x[..., : looped * inputs], turns), _split(w[..., : looped * outputs], turns)
    ys = jnp.moveaxis(lax.map(turn, (xs, ws)), 0, -2)
    y = ys.reshape(*ys.shape[:-2], -1)
    if looped == groups:
        return y
    x, w = x[..., looped * inputs :], w[..., looped * outputs :]
    return jnp.concatenate([y, _bundled(x, w, groups - looped, dense)], axis=-1)


def _split(x: jax.Array, parts: int) -> jax.Array:
    """The last axis in equal parts, stacked."""
    return jnp.moveaxis(x.reshape(*x.shape[:-1], parts, -1), -2, 0)


def _varying_alike(x: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both marked as different on every shard of a `shard_map` that either is different on.

    A `custom_vjp` must return gradients marked like its arguments. For a kernel that all shards
    share that would be their sum, which is what this cast's own gradient is.
    """
    x_axes, w_axes = (jax.typeof(array).manual_axis_type.varying for array in (x, w))
    x = lax.pcast(x, tuple(sorted(w_axes - x_axes)), to="varying")
    return x, lax.pcast(w, tuple(sorted(x_axes - w_axes)), to="varying")


def _bundled(x: jax.Array, w: jax.Array, groups: int, dense: Dense) -> jax.Array:
    """A grouped convolution as dense ones, over several groups each where those are narrow."""
    if groups == 1:
        return dense(x, w)
    inputs, outputs = x.shape[-1] // groups, w.shape[-1] // groups
    bundle = _bundle(inputs)
    parts = []
    for first in range(0, groups, bundle):
        count = min(bundle, groups - first)
        x_part = lax.slice_in_dim(x, first * inputs, (first + count) * inputs, axis=-1)
        w_part = lax.slice_in_dim(w, first * outputs, (first + count) * outputs, axis=-1)
        parts.append(dense(x_part, _block_diagonal(w_part, count)))
    return jnp.concatenate(parts, axis=-1)


def _bundle(inputs: int) -> int:
    """How many groups of some input channels go into one dense convolution."""
    return max(1, _BUNDLE_WIDTH // inputs)


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
    return _padded(x, w, pads, strides=strides, dilations=dilations)


def _dense_cpu_forward(x: jax.Array, w: jax.Array, strides: Ints, pads: Pads, dilations: Ints):
    return _dense_cpu(x, w, strides, pads, dilations), (x, w)


def _dense_cpu_backward(strides: Ints, pads: Pads, dilations: Ints, saved, dy: jax.Array):
    x, w = saved
    if max(strides) > 1 and all(size == 1 for size in automatic_axes().values()):
        return _gradients_by_taps(x, w, dy, strides, pads, dilations)
    space, window, ones = x.shape[1:-1], w.shape[:-2], (1,) * len(strides)
    # Strides become zeros between the pixels of dy: slow, but the partitioner knows how.
    spread = [(0, 0, 0), *((0, 0, s - 1) for s in strides), (0, 0, 0)]
    dy = lax.pad(dy, jnp.zeros((), dy.dtype), spread)
    reach = [(k - 1) * d for k, d in zip(window, dilations, strict=True)]
    before = [r - p[0] for r, p in zip(reach, pads, strict=True)]
    sizes = list(zip(space, reach, dy.shape[1:-1], strict=True))
    dx_pads = [(b, n + r - m - b) for b, (n, r, m) in zip(before, sizes, strict=True)]
    mirrored = jnp.flip(w, tuple(range(len(window)))).swapaxes(-1, -2)
    dx = _padded(dy, mirrored, dx_pads, strides=ones, dilations=dilations)

    # The weight gradient correlates x with dy over the batch, which plays the channels.
    dw_pads = [(p[0], r + m - n - p[0]) for p, (n, r, m) in zip(pads, sizes, strict=True)]
    images, kernels = x.swapaxes(0, -1), jnp.moveaxis(dy, 0, -2)
    dw = _padded(images, kernels, dw_pads, strides=dilations, dilations=ones)
    return dx, jnp.moveaxis(dw, 0, -2)


def _gradients_by_taps(
    x: jax.Array, w: jax.Array, dy: jax.Array, strides: Ints, pads: Pads, dilations: Ints
) -> tuple[jax.Array, jax.Array]:
    """Both gradients of a strided convolution on one device, without zeros between pixels of dy."""
    inputs, outputs = w.shape[-2:]
    flat_dy = dy.reshape(-1, outputs)
    columns = (flat_dy @ w.reshape(-1, outputs).T).reshape(*dy.shape[:-1], -1, inputs)
    padded, zero = _edged(x, pads), jnp.zeros((), dy.dtype)
    spans = [(m - 1) * s + 1 for m, s in zip(dy.shape[1:-1], strides, strict=True)]
    dx_taps, dw_taps = [], []
    for i, (_, starts) in enumerate(_tap_starts(w, dilations)):
        shifted = _shifted(padded, starts, spans, strides)
        dw_taps.append(shifted.reshape(-1, inputs).T @ flat_dy)
        before = [start - p[0] for start, p in zip(starts, pads, strict=True)]
        sizes = zip(x.shape[1:-1], before, spans, strides, strict=True)
        spread = [(b, n - b - span, s - 1) for n, b, span, s in sizes]
        dx_taps.append(lax.pad(columns[..., i, :], zero, [(0, 0, 0), *spread, (0, 0, 0)]))
    return functools.reduce(jnp.add, dx_taps), jnp.stack(dw_taps).reshape(w.shape)


def _padded(
    x: jax.Array, w: jax.Array, pads: Sequence[tuple[int, int]], *, strides: Ints, dilations: Ints
) -> jax.Array:
    """A convolution with any padding: XLA's fast CPU form reads out of bounds at negative ones."""
    cuts = [(min(0, before), min(0, after)) for before, after in pads]
    if any(map(any, cuts)):
        x = _edged(x, cuts)
    rest = tuple((max(0, before), max(0, after)) for before, after in pads)
    return _native(x, w, strides=strides, pads=rest, dilations=dilations)


_dense_cpu.defvjp(_dense_cpu_forward, _dense_cpu_backward)
