"""Convolutions in the forms that XLA's CPU compiler is fast at (benchmarks/conv_lowering.py).

- The gradient of its grouped convolution is 20 times slower than that of dense ones: groups are
  dense convolutions, one after another.
- It recognises a convolution as fast only when its operands are laid out NHWC x HWIO, and reorders
  others only outside loops. The gradients autodiff writes are others: inside a scanned stage they
  run 30 times slower. Here both gradients are in that layout, or matrix products.

Reverse mode only: the gradients are `custom_vjp`s, so `jax.jvp` of a convolution is an error. For a
Hessian-vector product take the gradient of a gradient.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from nfflax.ambient import automatic_axes
from nfflax.nn.conv_parts import (
    Ints,
    Pads,
    block_diagonal,
    bundle,
    bundled,
    edged,
    native,
    shifted,
    tap_starts,
)

How = tuple[Ints, Pads, Ints]
"""Strides, padding and dilations."""

# The input gradient of maps up to this many pixels is faster as one product than as a convolution.
_FEW_PIXELS = 64


def convolve_cpu(
    x: jax.Array, w: jax.Array, *, strides: Ints, pads: Pads, dilations: Ints, groups: int
) -> jax.Array:
    """Convolve `x` (batch, *space, channels) with `w` (*window, channels / groups, outputs)."""
    x, w = _varying_alike(x, w)
    if all(k == 1 for k in w.shape[:-2]) and not any(map(any, pads)):
        x = x[(slice(None), *(slice(None, None, s) for s in strides))]
        return bundled(x, w.reshape(w.shape[-2:]), groups, _product)
    how = strides, pads, dilations

    def dense(x: jax.Array, w: jax.Array) -> jax.Array:
        return _dense(x, w, *how)

    inputs, outputs = x.shape[-1] // groups, w.shape[-1] // groups
    width = bundle(inputs)
    turns = groups // width
    if turns <= 2:
        return bundled(x, w, groups, dense)
    # A loop compiles one of them, and runs no slower.
    looped = turns * width
    x_looped, x_rest = jnp.split(x, [looped * inputs], axis=-1)
    w_looped, w_rest = jnp.split(w, [looped * outputs], axis=-1)
    y: Any = _in_turns(x_looped, w_looped, turns, width, how)
    if looped == groups:
        return y
    return jnp.concatenate([y, bundled(x_rest, w_rest, groups - looped, dense)], axis=-1)


def _varying_alike(x: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both marked as different on every shard of a `shard_map` that either is different on.

    A `custom_vjp` must return gradients marked like its arguments. For a kernel that all shards
    share that would be their sum, which is what this cast's own gradient is.
    """
    x_axes, w_axes = (jax.typeof(array).manual_axis_type.varying for array in (x, w))
    x = lax.pcast(x, tuple(sorted(w_axes - x_axes)), to="varying")
    return x, lax.pcast(w, tuple(sorted(x_axes - w_axes)), to="varying")


# --- matrix products --------------------------------------------------------------------------


@jax.custom_vjp
def _product(x: jax.Array, w: jax.Array) -> jax.Array:
    return x @ w


def _product_backward(saved: tuple[jax.Array, jax.Array], dy: jax.Array):
    """Autodiff would write the kernel's gradient the other way round, for all who read it."""
    x, w = saved
    return dy @ w.T, x.reshape(-1, x.shape[-1]).T @ dy.reshape(-1, dy.shape[-1])


_product.defvjp(lambda x, w: (_product(x, w), (x, w)), _product_backward)


# --- many groups, in turns --------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _in_turns(x: jax.Array, w: jax.Array, turns: int, width: int, how: How) -> jax.Array:
    """A grouped convolution, `width` groups in each of `turns`."""
    convolve = functools.partial(_turn, width=width, how=how)
    part = jax.eval_shape(convolve, _part(x, 0, turns), _part(w, 0, turns))

    def turn(i: jax.Array, y: jax.Array) -> jax.Array:
        return _with_part(y, i, convolve(_part(x, i, turns), _part(w, i, turns)))

    return lax.fori_loop(0, turns, turn, _blank((*part.shape[:-1], w.shape[-1]), x))


def _in_turns_forward(x: jax.Array, w: jax.Array, turns: int, width: int, how: How):
    return _in_turns(x, w, turns, width, how), (x, w)


def _in_turns_backward(turns: int, width: int, how: How, saved, dy: jax.Array):
    convolve = functools.partial(_turn, width=width, how=how)

    def turn(i: jax.Array, gradients: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        _, pull_back = jax.vjp(convolve, *(_part(whole, i, turns) for whole in saved))
        return tuple(map(_with_part, gradients, (i, i), pull_back(_part(dy, i, turns))))

    return lax.fori_loop(0, turns, turn, tuple(_blank(whole.shape, whole) for whole in saved))


_in_turns.defvjp(_in_turns_forward, _in_turns_backward)


def _turn(x: jax.Array, w: jax.Array, *, width: int, how: How) -> jax.Array:
    return _dense(x, block_diagonal(w, width), *how)


def _part(whole: jax.Array, i: jax.typing.ArrayLike, parts: int) -> jax.Array:
    """One of the equal parts of the last axis."""
    size = whole.shape[-1] // parts
    return lax.dynamic_slice_in_dim(whole, i * size, size, axis=-1)


def _with_part(whole: jax.Array, i: jax.typing.ArrayLike, part: jax.Array) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(whole, part, i * part.shape[-1], axis=-1)


def _blank(shape: Sequence[int], like: jax.Array) -> jax.Array:
    """Zeros, marked as `like` is inside a `shard_map`."""
    axes = tuple(sorted(jax.typeof(like).manual_axis_type.varying))
    return lax.pcast(jnp.zeros(shape, like.dtype), axes, to="varying")


# --- dense convolutions and their gradients ---------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _dense(x: jax.Array, w: jax.Array, strides: Ints, pads: Pads, dilations: Ints) -> jax.Array:
    return _padded(x, w, pads, strides=strides, dilations=dilations)


def _dense_forward(x: jax.Array, w: jax.Array, strides: Ints, pads: Pads, dilations: Ints):
    return _dense(x, w, strides, pads, dilations), (x, w)


def _dense_backward(strides: Ints, pads: Pads, dilations: Ints, saved, dy: jax.Array):
    x, w = saved
    how = (strides, pads, dilations)
    strided, small = max(strides) > 1, math.prod(x.shape[1:-1]) <= _FEW_PIXELS
    if not all(size == 1 for size in automatic_axes().values()):
        # Strides become zeros between the pixels of dy: slow, but the partitioner knows how.
        spread = [(0, 0, 0), *((0, 0, s - 1) for s in strides), (0, 0, 0)]
        dy, strided, small = lax.pad(dy, jnp.zeros((), dy.dtype), spread), False, False
    dx = _dx_of_columns if strided or small else _dx_mirrored
    dw = _dw_of_taps if strided else _dw_correlated
    return dx(x, w, dy, *how), dw(x, w, dy, *how)


_dense.defvjp(_dense_forward, _dense_backward)


def _dx_mirrored(
    x: jax.Array, w: jax.Array, dy: jax.Array, strides: Ints, pads: Pads, dilations: Ints
) -> jax.Array:
    """The mirrored kernel over dy."""
    del strides
    sizes = _sizes(x, w, dy, pads, dilations)
    dx_pads = [(reach - before, n - m + before) for n, m, reach, before in sizes]
    mirrored = jnp.flip(w, tuple(range(w.ndim - 2))).swapaxes(-1, -2)
    return _padded(dy, mirrored, dx_pads, strides=(1,) * len(pads), dilations=dilations)


def _dw_correlated(
    x: jax.Array, w: jax.Array, dy: jax.Array, strides: Ints, pads: Pads, dilations: Ints
) -> jax.Array:
    """dy over x, the batch playing the channels."""
    del strides
    sizes = _sizes(x, w, dy, pads, dilations)
    dw_pads = [(before, reach + m - n - before) for n, m, reach, before in sizes]
    images, kernels = x.swapaxes(0, -1), jnp.moveaxis(dy, 0, -2)
    dw = _padded(images, kernels, dw_pads, strides=dilations, dilations=(1,) * len(pads))
    return jnp.moveaxis(dw, 0, -2)


def _sizes(
    x: jax.Array, w: jax.Array, dy: jax.Array, pads: Pads, dilations: Ints
) -> Iterator[tuple[int, int, int, int]]:
    """Along each axis: pixels of x and of dy, how far the window reaches, the padding before."""
    axes = zip(x.shape[1:-1], dy.shape[1:-1], w.shape[:-2], dilations, pads, strict=True)
    for n, m, k, d, (before, _) in axes:
        yield n, m, (k - 1) * d, before


def _dx_of_columns(
    x: jax.Array, w: jax.Array, dy: jax.Array, strides: Ints, pads: Pads, dilations: Ints
) -> jax.Array:
    """One product of dy with the whole kernel, then the sum of every position's share."""
    inputs, outputs = w.shape[-2:]
    columns = dy.reshape(-1, outputs) @ w.reshape(-1, outputs).T
    columns = columns.reshape(*dy.shape[:-1], -1, inputs)
    shares, zero = [], jnp.zeros((), dy.dtype)
    for i, (_, starts) in enumerate(tap_starts(w, dilations)):
        spread = []
        for n, m, s, start, p in zip(
            x.shape[1:-1], dy.shape[1:-1], strides, starts, pads, strict=True
        ):
            before = start - p[0]
            spread.append((before, n - before - _span(m, s), s - 1))
        shares.append(lax.pad(columns[..., i, :], zero, [(0, 0, 0), *spread, (0, 0, 0)]))
    return functools.reduce(jnp.add, shares)


def _dw_of_taps(
    x: jax.Array, w: jax.Array, dy: jax.Array, strides: Ints, pads: Pads, dilations: Ints
) -> jax.Array:
    """One product per position of the window: what it saw of x, with dy."""
    spans = list(map(_span, dy.shape[1:-1], strides))
    padded, dy_rows = edged(x, pads), dy.reshape(-1, dy.shape[-1])
    products = []
    for _, starts in tap_starts(w, dilations):
        seen = shifted(padded, starts, spans, strides)
        products.append(seen.reshape(-1, seen.shape[-1]).T @ dy_rows)
    return jnp.stack(products).reshape(w.shape)


def _span(outputs: int, stride: int) -> int:
    """How many pixels of the input lie between the first and the last a position sees."""
    return (outputs - 1) * stride + 1


def _padded(
    x: jax.Array, w: jax.Array, pads: Sequence[tuple[int, int]], *, strides: Ints, dilations: Ints
) -> jax.Array:
    """A convolution with any padding: XLA's fast CPU form reads out of bounds at negative ones."""
    cuts = [(min(0, before), min(0, after)) for before, after in pads]
    if any(map(any, cuts)):
        x = edged(x, cuts)
    rest = tuple((max(0, before), max(0, after)) for before, after in pads)
    return native(x, w, strides=strides, pads=rest, dilations=dilations)
