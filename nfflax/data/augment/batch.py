"""What happens to a batch inside the train step: mixing, RandAugment, normalisation, in this order.

The official NFNet code distorts the mixed images (`augment_before_mix=False`), not the sources.
"""

import chex
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from nfflax.data.augment.mix import Mix, apply_mix
from nfflax.data.augment.randaugment import RandAugment, apply_randaugment
from nfflax.pixels import normalize
from nfflax.spec.schema import Preprocess


def augment(
    key: jax.Array,
    images: jax.Array,
    labels: jax.Array,
    mix_images: jax.Array | None = None,
    mix_labels: jax.Array | None = None,
    *,
    preprocess: Preprocess,
    mix: Mix | None = None,
    randaugment: RandAugment | None = None,
    dtype: DTypeLike = jnp.float32,
) -> dict[str, jax.Array]:
    """{"images", "labels", "mix_labels", "ratio"}, ready for the network and its loss.

    `images` (N, H, W, C) are in 0..255, uint8 or float. The loss of an image is `ratio` times that
    of its label plus 1 - `ratio` times that of its mix label; without `mix` the ratio is 1.

    `mix_images` are fresh partners: row i is mixed with row i. Split in the same way as `images`,
    they need no communication. Without them the partner of a row is the row after it, and a batch
    that is split over devices passes one image from each to the next.

    All randomness comes from `key`, best `jax.random.fold_in(jax.random.key(seed), step)`. It does
    not depend on the number of devices. Call this inside `jax.set_mesh(mesh)` when there is one.
    """
    chex.assert_rank(images, 4)
    if (mix_images is None) != (mix_labels is None):
        raise ValueError("augment: mix_images and mix_labels come together")
    if mix is None and mix_images is not None:
        raise ValueError("augment: mix_images without mix; give mix=Mix(...), or no partners")
    mix_key, distort_key = jax.random.split(key)
    if mix is None:
        mix_labels, ratio = labels, jnp.ones(labels.shape[:1])
    else:
        if mix_images is None or mix_labels is None:
            if len(images) < 2:
                raise ValueError("augment: one image has no partner in its batch")
            mix_images, mix_labels = (jnp.roll(x, -1, axis=0) for x in (images, labels))
        chex.assert_equal_shape([images, mix_images])
        images, ratio = apply_mix(mix_key, images, mix_images, mix)
    if randaugment is not None:
        images = apply_randaugment(distort_key, images, randaugment)
    images = normalize(images, preprocess, dtype)
    return {"images": images, "labels": labels, "mix_labels": mix_labels, "ratio": ratio}
