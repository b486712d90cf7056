"""The loss: the official numbers, and errors that name what does not fit."""

import jax.numpy as jnp
import numpy as np
import pytest
from golden_data import golden

from nfflax.optim.loss import cross_entropy


@pytest.fixture(scope="module")
def reference():
    return golden("train_nfnet_tiny.npz")


@pytest.mark.parametrize(
    ("smoothing", "name"),
    [(0.0, "plain/loss_smoothing_0.0"), (0.1, "plain/loss"), (0.2, "plain/loss_smoothing_0.2")],
)
def test_official_loss(reference, smoothing, name):
    logits, labels = reference["plain/logits"], reference["plain/labels"]
    losses = cross_entropy(logits, labels.astype(np.int32), label_smoothing=smoothing)
    assert losses.shape == labels.shape
    np.testing.assert_allclose(jnp.mean(losses), reference[name], rtol=1e-6)


def test_official_loss_of_mixed_labels(reference):
    first, second = (reference[f"mixed/{k}"].astype(np.int32) for k in ("labels", "mix_labels"))
    ratio = reference["mixed/ratio"]
    losses = cross_entropy(reference["mixed/logits"], first, second, ratio, label_smoothing=0.1)
    np.testing.assert_allclose(jnp.mean(losses), reference["mixed/loss"], rtol=1e-6)


def test_losses_are_float32_per_position():
    """Also for bfloat16 logits of a dense task."""
    logits = jnp.zeros((2, 3, 5), jnp.bfloat16)
    losses = cross_entropy(logits, jnp.zeros((2, 3), jnp.int32), label_smoothing=0.1)
    assert losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, np.full((2, 3), np.log(5.0)), rtol=1e-6)


def test_bad_input_is_named():
    logits, labels = jnp.zeros((4, 5)), jnp.zeros(4, jnp.int32)
    with pytest.raises(AssertionError, match=r"has shape \(3,\) but expected \(4\)"):
        cross_entropy(logits, labels[:3])
    with pytest.raises(AssertionError, match=r"has shape \(4, 1\) but expected \(4\)"):
        cross_entropy(logits, labels, labels, jnp.ones((4, 1)))
    with pytest.raises(AssertionError, match="float32"):
        cross_entropy(logits, jnp.zeros(4))
    with pytest.raises(ValueError, match="come together"):
        cross_entropy(logits, labels, labels)
    with pytest.raises(ValueError, match=r"label_smoothing .* not 1\.0"):
        cross_entropy(logits, labels, label_smoothing=1.0)
