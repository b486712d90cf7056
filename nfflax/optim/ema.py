"""The running average of the weights, which evaluation and released checkpoints use."""

from typing import Any

import jax
import jax.numpy as jnp


def update_ema(
    average: Any,
    params: Any,
    step: jax.typing.ArrayLike,
    decay: float = 0.99999,
    warmup: bool = True,
) -> Any:
    """The average after `params`, the parameters as update number `step` left them.

    `average` and `params` are pytrees of the same structure; start with the initial parameters.
    `step` counts from 0. With `warmup` the decay is at most (1 + step) / (10 + step), as in
    TensorFlow 1 and the official code (`nfnets/utils.py`, `tf1_ema`): the average follows a young
    run closely, and reaches a decay of 0.99999 only after 900,000 steps.

    Arithmetic is in float32 or better, 1 - decay rounded where the official code rounds it; leaves
    keep the dtype of `average`.
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay must be at least 0 and less than 1, not {decay}")
    kept = decay
    if warmup:
        count = jnp.asarray(step, jnp.float32)
        kept = jnp.minimum(decay, (1 + count) / (10 + count))

    def averaged(old: jax.Array, new: jax.Array) -> jax.Array:
        precise = jnp.promote_types(old.dtype, jnp.float32)
        return (old.astype(precise) * kept + new.astype(precise) * (1 - kept)).astype(old.dtype)

    return jax.tree.map(averaged, average, params)
