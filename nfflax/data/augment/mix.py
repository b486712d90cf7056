"""MixUp (arXiv:1710.09412) and CutMix (arXiv:1905.04899): each image and a partner become one.

Both are one weighted sum, `weight * image + (1 - weight) * partner`. MixUp's weight is a number,
CutMix's a map that is 1 in a box and 0 outside. With both on, even rows of the batch get MixUp
and odd rows CutMix, so that any contiguous part of a batch is half and half. Nothing here looks
at another row: on a batch that is split over devices there is no communication.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Mix:
    """Which mixing a batch gets. Defaults are those of NFNets (arXiv:2102.06171, section 5.1)."""

    mixup: float = 0.2
    """Ratios are drawn from Beta(mixup, mixup), one per image; 0: no MixUp."""
    cutmix: bool = True
    """Whether there is CutMix: on every other image, or without MixUp on all."""

    def __post_init__(self) -> None:
        if not 0 <= self.mixup < float("inf"):
            raise ValueError(f"Mix: mixup = {self.mixup}; allowed: 0 or more")
        if not self.mixup and not self.cutmix:
            raise ValueError("Mix: neither mixup nor cutmix; allowed: one or both, or mix=None")


def apply_mix(
    key: jax.Array, images_NHWC: jax.Array, partners_NHWC: jax.Array, mix: Mix
) -> tuple[jax.Array, jax.Array]:
    """Mixed float32 images, and by image its share of its row: the weight of its label."""
    weight_NHW1, ratio_N = draw_weights(key, images_NHWC.shape, mix)
    images, partners = (x.astype(jnp.float32) for x in (images_NHWC, partners_NHWC))
    return weight_NHW1 * images + (1 - weight_NHW1) * partners, ratio_N


def draw_weights(key: jax.Array, shape: tuple[int, ...], mix: Mix) -> tuple[jax.Array, jax.Array]:
    """Weight maps (N, H, W, 1) for images of `shape`, and their means (N,)."""
    mixup_key, cutmix_key = jax.random.split(key)
    batch, height, width, _ = shape
    boxes_NHW, area_N = _boxes(cutmix_key, batch, height, width)
    if not mix.mixup:
        return boxes_NHW[..., None].astype(jnp.float32), area_N
    ratio_N = symmetric_beta(mixup_key, mix.mixup, batch)
    if mix.cutmix:
        is_cutmix_N = jnp.arange(batch) % 2 == 1
    else:
        is_cutmix_N = jnp.zeros(batch, bool)
    weight_NHW = jnp.where(is_cutmix_N[:, None, None], boxes_NHW, ratio_N[:, None, None])
    return weight_NHW[..., None], jnp.where(is_cutmix_N, area_N, ratio_N)


def symmetric_beta(key: jax.Array, alpha: float, count: int) -> jax.Array:
    """Draws from Beta(alpha, alpha), each from two uniform numbers.

    `jax.random.beta` rejects and retries until the whole batch is done, which on a batch that is
    split takes an all-reduce per turn. Here t is Student's with 2 * alpha degrees of freedom over
    their root, by Bailey's polar method (Mathematics of Computation 62, 1994), and
    (1 + t / sqrt(1 + t^2)) / 2 is the draw. It is written so that no power overflows.
    """
    radius_key, angle_key = jax.random.split(key)
    power_N = jax.random.uniform(radius_key, (count,)) ** (1 / alpha)
    cosine_N = jnp.cos(2 * jnp.pi * jax.random.uniform(angle_key, (count,)))
    squared_N = (1 - power_N) * cosine_N**2  # t^2, times power
    return (1 + jnp.sign(cosine_N) * jnp.sqrt(squared_N / (power_N + squared_N))) / 2


def _boxes(key: jax.Array, batch: int, height: int, width: int) -> tuple[jax.Array, jax.Array]:
    """Boxes of which the image keeps the inside, and their share of the area, as drawn officially.

    A box is as wide to the image as it is high, has its centre anywhere, and is cut off at the
    image's edge. Before that its area is uniform in [0, 1].
    """
    keys = jax.random.split(key, 3)
    side_N = jnp.sqrt(1 - jax.random.uniform(keys[0], (batch,)))

    def span(key: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
        half_N = (side_N * size).astype(jnp.int32) // 2
        centre_N = jax.random.randint(key, (batch,), 0, size)
        return jnp.maximum(centre_N - half_N, 0), jnp.minimum(centre_N + half_N, size)

    def is_within(size: int, start_N: jax.Array, end_N: jax.Array) -> jax.Array:
        place = jnp.arange(size)
        return (place >= start_N[:, None]) & (place < end_N[:, None])

    (top, bottom), (left, right) = span(keys[1], height), span(keys[2], width)
    is_in_NHW = is_within(height, top, bottom)[:, :, None] & is_within(width, left, right)[:, None]
    area_N = ((bottom - top) * (right - left)).astype(jnp.float32) / (height * width)
    return is_in_NHW, area_N
