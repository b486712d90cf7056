"""The step of a layer that maps each value of a channel to another: one table of 256 per channel.

Most tables are constants. Those of AutoContrast and Equalize follow from the image's histogram,
which is dear: on CPU more than all other steps together if every image gets one. So a loop makes
them for the few images that need them.
"""

import jax
import jax.numpy as jnp
from jax import lax

from nfflax.data.augment.operations import INDEX, Numerics, Settings


def looked_up(
    images_NCHW: jax.Array,
    operation_N: jax.Array,
    settings: Settings,
    numerics: Numerics,
    *,
    is_local: bool,
) -> jax.Array:
    """Every value replaced by what its image's and channel's table says.

    `is_local`: all of the batch is known to lie on one device.
    """
    batch, channels = images_NCHW.shape[:2]
    tables_NCV = _tables_NCV(images_NCHW, operation_N, settings, numerics, is_local=is_local)
    index_NCHW = images_NCHW.astype(jnp.int32) + 256 * jnp.arange(channels)[:, None, None]

    def taken(table: jax.Array, index: jax.Array) -> jax.Array:
        return table.at[index].get(mode="promise_in_bounds")

    return jax.vmap(taken)(tables_NCV.reshape(batch, channels * 256), index_NCHW)


def grey_N1HW(images_NCHW: jax.Array, numerics: Numerics) -> jax.Array:
    """The luma of colours, as whole numbers in float32."""
    values = images_NCHW.astype(jnp.float32)
    if values.shape[1] == 1:
        return values
    red, green, blue = (values[:, channel, None] for channel in range(3))
    if numerics == "official":  # tf.image: cut off, after a scale of 255.5 / 255
        scale = 255.5 / 255
        weights, rounding = (0.2989 * scale, 0.587 * scale, 0.114 * scale), 0.0
    else:  # Pillow: 16-bit fixed point, rounded; exact in float32
        weights, rounding = (19595 / 65536, 38470 / 65536, 7471 / 65536), 0.5
    return jnp.floor(weights[0] * red + weights[1] * green + weights[2] * blue + rounding)


def _tables_NCV(
    images_NCHW: jax.Array,
    operation_N: jax.Array,
    settings: Settings,
    numerics: Numerics,
    *,
    is_local: bool,
) -> jax.Array:
    follow_image = ["AutoContrast", "Equalize"]
    if numerics == "pillow":
        follow_image.append("Contrast")

    def from_image(image_CHW: jax.Array, operation: jax.Array) -> jax.Array:
        counts_CV = jax.vmap(_histogram)(image_CHW)
        tables = jnp.where(
            operation == INDEX["Equalize"],
            jax.vmap(_equalize)(counts_CV),
            jax.vmap(_autocontrast)(counts_CV),
        )
        if numerics == "pillow":
            contrast = _contrast(image_CHW, settings.contrast)
            tables = jnp.where(operation == INDEX["Contrast"], contrast, tables)
        return tables.astype(jnp.uint8)

    batch, channels = images_NCHW.shape[:2]
    constant_NV = jnp.asarray(settings.lookup)[operation_N]
    constant_NCV = jnp.broadcast_to(constant_NV[:, None], (batch, channels, 256))
    needs_image_N = jnp.isin(operation_N, jnp.array([INDEX[name] for name in follow_image]))
    if not is_local:  # a loop over images would gather a batch that is split
        tables_NCV = jax.vmap(from_image)(images_NCHW, operation_N)
        return jnp.where(needs_image_N[:, None, None], tables_NCV, constant_NCV)

    needing_first = jnp.argsort(~needs_image_N)

    def fill(turn: jax.Array, tables_NCV: jax.Array) -> jax.Array:
        n = needing_first[turn]
        return tables_NCV.at[n].set(from_image(images_NCHW[n], operation_N[n]))

    return lax.fori_loop(0, jnp.sum(needs_image_N, dtype=jnp.int32), fill, constant_NCV)


def _histogram(channel_HW: jax.Array) -> jax.Array:
    values = channel_HW.reshape(-1).astype(jnp.int32)
    return jnp.zeros(256, jnp.int32).at[values].add(1, mode="promise_in_bounds")


def _equalize(counts_V: jax.Array) -> jax.Array:
    """Pillow's rule: a level per 255th of the pixels, those of the brightest value not counted."""
    step = (jnp.sum(counts_V) - counts_V[_last(counts_V > 0)]) // 255
    below = jnp.cumsum(counts_V) - counts_V
    equal = jnp.clip((below + step // 2) // jnp.maximum(step, 1), 0, 255)
    return jnp.where(step == 0, jnp.arange(256), equal)


def _autocontrast(counts_V: jax.Array) -> jax.Array:
    """Stretches the values that occur to 0..255."""
    values, darkest, brightest = jnp.arange(256), jnp.argmax(counts_V > 0), _last(counts_V > 0)
    stretched = (values - darkest) * 255 // jnp.maximum(brightest - darkest, 1)
    return jnp.where(brightest > darkest, jnp.clip(stretched, 0, 255), values)


def _contrast(image_CHW: jax.Array, factor: float) -> jax.Array:
    """Away from the image's mean grey."""
    levels = grey_N1HW(image_CHW[None], "pillow").astype(jnp.int32)
    mean = ((jnp.sum(levels) + levels.size // 2) // levels.size).astype(jnp.float32)
    values = jnp.arange(256, dtype=jnp.float32)
    return jnp.clip(mean + factor * (values - mean), 0, 255).astype(jnp.int32)


def _last(is_there_V: jax.Array) -> jax.Array:
    return 255 - jnp.argmax(is_there_V[::-1])
