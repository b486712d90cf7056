"""One layer of RandAugment on a whole batch: each image gets its own operation.

Four steps, each the identity for images whose operation is another: a nearest-neighbour sampling,
a table per channel (`lookup.py`), a blend with a grey or a smoothed image, a mask. Images are
uint8 between steps, as in the official code between operations, and have their channels in front:
an innermost axis of three is slow on CPU and wastes most of a TPU's lanes.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from nfflax.data.augment.lookup import grey_N1HW, looked_up
from nfflax.data.augment.operations import FILL, INDEX, Numerics, Settings

# Sources half-way between two pixels are common: at 45 degrees, or a shear of 0.15. The last bit,
# which differs with the way XLA compiles a sum of products, must not choose. So first the source
# goes to the nearest of this many places per pixel.
_GRID = 4096


class Choice(NamedTuple):
    """What each image gets: arrays of (N,), or (L, N) for all layers."""

    operation: jax.Array
    """Index into OPERATIONS."""
    is_negative: jax.Array
    """0 or 1: to which side Rotate, Shear and Translate go."""
    row: jax.Array
    """Centre of the cutout."""
    column: jax.Array


def distort_layer(
    images_NCHW: jax.Array,
    choice: Choice,
    settings: Settings,
    numerics: Numerics,
    *,
    is_local: bool,
) -> jax.Array:
    """uint8 images after the operation that `choice` names for each.

    `is_local`: all of the batch is known to lie on one device. Then work that no image needs is
    skipped; on a batch that is split, asking whether one does would be communication.
    """
    affine_N23 = jnp.asarray(settings.affine)[choice.operation, choice.is_negative]
    factor_N = jnp.asarray(settings.factor)[choice.operation]
    is_sharpness_N = choice.operation == INDEX["Sharpness"]
    half_N = jnp.asarray(settings.cutout)[choice.operation]

    def moved(images_NCHW: jax.Array) -> jax.Array:
        return _moved(images_NCHW, affine_N23)

    def blended(images_NCHW: jax.Array) -> jax.Array:
        return _blended(images_NCHW, is_sharpness_N, factor_N, numerics)

    is_moved = jnp.any(affine_N23 != jnp.eye(2, 3))
    images_NCHW = _run_if(is_moved, moved, images_NCHW, is_local=is_local)
    images_NCHW = looked_up(images_NCHW, choice.operation, settings, numerics, is_local=is_local)
    images_NCHW = _run_if(jnp.any(factor_N != 1), blended, images_NCHW, is_local=is_local)
    return _cut_out(images_NCHW, choice.row, choice.column, half_N)


def _run_if(
    is_needed: jax.Array,
    step: Callable[[jax.Array], jax.Array],
    images_NCHW: jax.Array,
    *,
    is_local: bool,
) -> jax.Array:
    """`step`, or the images as they are.

    The branch also keeps XLA from fusing a step into the next one. On CPU the fused loop, which
    has a gather in it, is slow throughout: 46 against 28 ms of CPU time for a layer (64 images at
    192 px, 2 shared CPU cores, 2026-11-21).
    """
    if not is_local:
        return step(images_NCHW)
    return lax.cond(is_needed, step, lambda images: images, images_NCHW)


def _moved(images_NCHW: jax.Array, affine_N23: jax.Array) -> jax.Array:
    """Each pixel from the nearest one to where the affine map points."""
    batch, channels, height, width = images_NCHW.shape
    y = lax.broadcasted_iota(jnp.float32, (height, width), 0)
    x = lax.broadcasted_iota(jnp.float32, (height, width), 1)

    def source_NHW(row_N3: jax.Array) -> jax.Array:
        a, b, c = (row_N3[:, column, None, None] for column in range(3))
        fine = lax.round((a * x + b * y + c) * _GRID) / _GRID
        return lax.round(fine).astype(jnp.int32)  # halves away from zero, as in TensorFlow

    column_NHW, row_NHW = source_NHW(affine_N23[:, 0]), source_NHW(affine_N23[:, 1])
    is_inside = (row_NHW >= 0) & (row_NHW < height) & (column_NHW >= 0) & (column_NHW < width)
    index_NP = jnp.where(is_inside, row_NHW * width + column_NHW, 0).reshape(batch, -1)
    pixels_NCP = images_NCHW.reshape(batch, channels, -1)

    def taken(pixels_P: jax.Array, index_P: jax.Array) -> jax.Array:
        return pixels_P.at[index_P].get(mode="promise_in_bounds")

    taken_NCP = jax.vmap(jax.vmap(taken, in_axes=(0, None)))(pixels_NCP, index_NP)
    taken_NCHW = taken_NCP.reshape(images_NCHW.shape)
    return jnp.where(is_inside[:, None], taken_NCHW, jnp.uint8(FILL))


def _blended(
    images_NCHW: jax.Array, is_sharpness_N: jax.Array, factor_N: jax.Array, numerics: Numerics
) -> jax.Array:
    """Sharpness and Color: away from the smoothed image, or from the grey one."""
    values = images_NCHW.astype(jnp.float32)
    is_sharpness, factor = (value[:, None, None, None] for value in (is_sharpness_N, factor_N))
    degenerate = jnp.where(
        is_sharpness, _smoothed(values, numerics), grey_N1HW(images_NCHW, numerics)
    )
    blended = degenerate + factor * (values - degenerate)
    return jnp.clip(blended, 0, 255).astype(jnp.uint8)


def _smoothed(values_NCHW: jax.Array, numerics: Numerics) -> jax.Array:
    """Pillow's SMOOTH: 3x3 weights of 1 around a 5, over 13. The outermost pixels stay."""
    height, width = values_NCHW.shape[2:]
    padded = jnp.pad(values_NCHW, ((0, 0), (0, 0), (1, 1), (1, 1)))
    rows = padded[:, :, :-2] + padded[:, :, 1:-1] + padded[:, :, 2:]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * values_NCHW
    rounding = 0.0 if numerics == "official" else 6.5  # TensorFlow's cast cuts off
    y = lax.broadcasted_iota(jnp.int32, (height, width), 0)
    x = lax.broadcasted_iota(jnp.int32, (height, width), 1)
    is_inner = (y > 0) & (y < height - 1) & (x > 0) & (x < width - 1)
    return jnp.where(is_inner, jnp.floor((total + rounding) / 13), values_NCHW)


def _cut_out(
    images_NCHW: jax.Array, row_N: jax.Array, column_N: jax.Array, half_N: jax.Array
) -> jax.Array:
    height, width = images_NCHW.shape[2:]
    y, x = jnp.arange(height)[:, None], jnp.arange(width)
    row, column, half = (value[:, None, None, None] for value in (row_N, column_N, half_N))
    is_cut = (y >= row - half) & (y < row + half) & (x >= column - half) & (x < column + half)
    return jnp.where(is_cut, jnp.uint8(FILL), images_NCHW)
