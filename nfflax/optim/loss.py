"""The training loss: cross-entropy with mixed labels and label smoothing."""

import chex
import jax
import jax.numpy as jnp
import optax


def cross_entropy(
    logits: jax.Array,
    labels: jax.Array,
    mix_labels: jax.Array | None = None,
    ratio: jax.Array | None = None,
    *,
    label_smoothing: float = 0.0,
) -> jax.Array:
    """Cross-entropy of every example, in float32; the mean over the batch is the caller's.

    Args:
      logits: scores, of shape (*batch, classes).
      labels: integers, of shape (*batch).
      mix_labels: the second label of images made by MixUp or CutMix, like `labels`.
      ratio: how much of each image its first label has, of shape (*batch): the target is
        `ratio * onehot(labels) + (1 - ratio) * onehot(mix_labels)`.
      label_smoothing: the share s of the target that is spread evenly over all classes:
        `(1 - s) * target + s / classes`.
    """
    if (mix_labels is None) != (ratio is None):
        raise ValueError("mix_labels and ratio come together: one of them is missing")
    if not 0 <= label_smoothing < 1:
        raise ValueError(
            f"label_smoothing must be at least 0 and less than 1, not {label_smoothing}"
        )
    *batch, classes = logits.shape
    chex.assert_shape([x for x in (labels, mix_labels, ratio) if x is not None], batch)
    chex.assert_type([x for x in (labels, mix_labels) if x is not None], int)
    targets = jax.nn.one_hot(labels, classes, dtype=jnp.float32)
    if mix_labels is not None and ratio is not None:
        share = ratio.astype(jnp.float32)[..., None]
        others = jax.nn.one_hot(mix_labels, classes, dtype=jnp.float32)
        targets = share * targets + (1 - share) * others
    if label_smoothing:
        targets = optax.smooth_labels(targets, label_smoothing)
    return optax.softmax_cross_entropy(logits.astype(jnp.float32), targets)
