"""RandAugment as a whole: what is drawn, what goes in and comes out, and its configuration."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from nfflax.data.augment import RandAugment
from nfflax.data.augment.layer import distort_layer
from nfflax.data.augment.operations import OPERATIONS, settings
from nfflax.data.augment.randaugment import apply_randaugment, distort, draw

SHAPE = (24, 16, 20, 3)
CONFIG = RandAugment(layers=3, magnitude=1, numerics="pillow")

apply = jax.jit(apply_randaugment, static_argnums=2)


@pytest.fixture(scope="module")
def images():
    return jax.random.randint(jax.random.key(0), SHAPE, 0, 256).astype(jnp.uint8)


def test_draws_are_uniform_and_independent():
    batch, height, width = 20_000, 16, 20
    draws = jax.jit(draw, static_argnums=(1, 2))(jax.random.key(1), (batch, height, width, 3), 2)
    for values, count in zip(draws, (len(OPERATIONS), 2, height, width), strict=True):
        assert values.shape == (2, batch)
        for layer in np.asarray(values):
            assert stats.chisquare(np.bincount(layer, minlength=count)).pvalue > 1e-3
    first, second = np.asarray(draws.operation)
    for other, count in ((second, 16), (draws.is_negative[0], 2), (draws.row[0], height)):
        table = np.zeros((16, count))
        np.add.at(table, (first, np.asarray(other)), 1)
        independent: Any = stats.chi2_contingency(table)
        assert independent.pvalue > 1e-3


def test_a_key_is_a_result(images):
    first, again, other = (apply(jax.random.key(seed), images, CONFIG) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.mean(np.any(first != other, axis=(1, 2, 3))) > 0.8


def test_distort_runs_its_layers_in_turn(images):
    choices = draw(jax.random.key(2), SHAPE, CONFIG.layers)
    tables = settings(CONFIG.magnitude, SHAPE[1:3], CONFIG.numerics)
    layer = jax.jit(lambda x, c: distort_layer(x, c, tables, CONFIG.numerics, is_local=True))
    wanted = jnp.moveaxis(images, -1, 1)
    for index in range(CONFIG.layers):
        wanted = layer(wanted, jax.tree.map(lambda values, i=index: values[i], choices))
    found = jax.jit(distort, static_argnums=2)(images, choices, CONFIG)
    np.testing.assert_array_equal(found, jnp.moveaxis(wanted, 1, -1))


def test_float_images_lose_their_fractions(images):
    key = jax.random.key(3)
    wanted = apply(key, images, CONFIG)
    whole = images.astype(jnp.float32)
    beyond = jnp.where(images == 255, 300.0, jnp.where(images == 0, -40.0, whole + 0.75))
    np.testing.assert_array_equal(apply(key, beyond, CONFIG), wanted)
    assert wanted.dtype == jnp.float32
    np.testing.assert_array_equal(wanted, np.clip(np.rint(wanted), 0, 255))


def test_one_channel_is_a_grey_image(images):
    key, grey = jax.random.key(4), images[..., :1]
    three = apply(key, jnp.repeat(grey, 3, axis=-1), CONFIG)
    np.testing.assert_array_equal(apply(key, grey, CONFIG), three[..., :1])


@pytest.mark.parametrize(
    ("name", "layers", "magnitude"), [("405", 4, 5), ("415", 4, 15), ("9", 2, 9)]
)
def test_official_names(name, layers, magnitude):
    assert RandAugment.named(name) == RandAugment(layers, magnitude)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": 0}, r"layers = 0; allowed: 1 or more"),
        ({"magnitude": 31}, r"magnitude = 31; allowed: 0 to 30"),
        ({"magnitude": float("nan")}, r"magnitude = nan; allowed"),
        ({"numerics": "pil"}, r"numerics = 'pil'; allowed: official, pillow"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        RandAugment(**settings)


def test_a_name_of_other_signs_is_refused():
    with pytest.raises(ValueError, match="'4x5'; allowed: digits, as in 405"):
        RandAugment.named("4x5")


def test_other_channels_are_refused():
    with pytest.raises(ValueError, match="4 channels; allowed: 1 or 3"):
        jax.eval_shape(
            lambda key, x: apply_randaugment(key, x, RandAugment()),
            jax.random.key(0),
            jnp.zeros((2, 8, 8, 4)),
        )
