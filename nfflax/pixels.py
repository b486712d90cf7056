"""From pixels to a network's input, the same in training, inference and exported programs."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from nfflax.spec.schema import Preprocess


def normalize(
    images: jax.Array, preprocess: Preprocess, dtype: DTypeLike = jnp.float32
) -> jax.Array:
    """Images in 0..255 as the network wants them: mean and standard deviation taken out, cast."""
    for name, values in (("mean", preprocess.mean), ("std", preprocess.std)):
        if len(values) not in (1, images.shape[-1]):
            raise ValueError(
                f"preprocess.{name}: {len(values)} values for images of {images.shape[-1]} "
                "channels; allowed: one value, or one for each channel"
            )
    mean, std = (255 * jnp.asarray(x, jnp.float32) for x in (preprocess.mean, preprocess.std))
    return ((images.astype(jnp.float32) - mean) / std).astype(dtype)
