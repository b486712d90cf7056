"""MixUp and CutMix: their ratios and boxes against the definitions, and what they make of rows."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from nfflax.data.augment import Mix
from nfflax.data.augment.mix import apply_mix, draw_weights, symmetric_beta

MANY = (8_000, 12, 10, 3)

draw = jax.jit(draw_weights, static_argnums=(1, 2))


@pytest.fixture(scope="module")
def boxes():
    """Many CutMix masks, without the channel axis, and their ratios."""
    weights, ratios = draw(jax.random.key(0), MANY, Mix(mixup=0))
    return np.asarray(weights[..., 0]), np.asarray(ratios)


def official_boxes(count, height, width):
    """As nfnets/dataset.py defines them: (top, bottom, left, right)."""
    rng = np.random.default_rng(0)
    side = np.sqrt(1 - rng.random(count))
    result = []
    for size in (height, width):
        centre, half = rng.integers(0, size, count), (side * size).astype(int) // 2
        result += [np.clip(centre - half, 0, size), np.clip(centre + half, 0, size)]
    return result


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_mixup_ratios_are_beta_distributed(alpha):
    ratios = np.asarray(symmetric_beta(jax.random.key(1), alpha, 50_000))
    edges = np.array([0, 1e-4, 1e-2, 0.1, 0.3, 0.5, 0.7, 0.9, 1 - 1e-2, 1 - 1e-4, 1])
    expected = np.diff(stats.beta(alpha, alpha).cdf(edges)) * ratios.size
    observed, _ = np.histogram(ratios, edges)
    is_tested = expected > 5
    rest = expected[~is_tested].sum()
    assert observed[~is_tested].sum() <= rest + 5 * np.sqrt(rest) + 5
    expected = expected[is_tested] * observed[is_tested].sum() / expected[is_tested].sum()
    assert stats.chisquare(observed[is_tested], expected).pvalue > 1e-3


@pytest.mark.parametrize("alpha", [1e-3, 1e3])
def test_extreme_ratios_are_finite(alpha):
    ratios = np.asarray(symmetric_beta(jax.random.key(2), alpha, 50_000))
    assert ratios.min() >= 0
    assert ratios.max() <= 1
    assert abs(ratios.mean() - 0.5) < 0.01


def test_a_ratio_is_the_true_share_of_its_box(boxes):
    masks, ratios = boxes
    assert set(np.unique(masks)) == {0.0, 1.0}
    np.testing.assert_allclose(ratios, masks.mean((1, 2)), rtol=1e-6)
    rows, columns = masks.max(2), masks.max(1)
    np.testing.assert_array_equal(masks, rows[:, :, None] * columns[:, None])
    for line in (rows, columns):  # one run of ones
        assert np.all(np.abs(np.diff(line, axis=1, prepend=0, append=0)).sum(1) <= 2)


def test_boxes_are_distributed_as_the_official_ones(boxes):
    masks, _ = boxes
    top, bottom, left, right = official_boxes(*MANY[:3])
    height, width = masks.max(2).sum(1), masks.max(1).sum(1)
    for found, wanted, count in [
        (height, np.where(right > left, bottom - top, 0), MANY[1] + 1),
        (width, np.where(bottom > top, right - left, 0), MANY[2] + 1),
        (masks.max(2).argmax(1)[height > 0], top[(bottom > top) & (right > left)], MANY[1]),
        (masks.max(1).argmax(1)[height > 0], left[(bottom > top) & (right > left)], MANY[2]),
    ]:
        table = np.stack([np.bincount(v.astype(int), minlength=count) for v in (found, wanted)])
        same: Any = stats.chi2_contingency(table[:, table.sum(0) > 10])
        assert same.pvalue > 1e-3


def test_even_rows_get_mixup_and_odd_rows_cutmix():
    weights, ratios = draw(jax.random.key(3), (101, 12, 10, 3), Mix())
    weights, ratios = np.asarray(weights), np.asarray(ratios)
    np.testing.assert_array_equal(
        weights[::2], np.broadcast_to(ratios[::2, None, None, None], (51, 12, 10, 1))
    )
    assert set(np.unique(weights[1::2])) == {0.0, 1.0}
    assert np.all((ratios[::2] >= 0) & (ratios[::2] <= 1))
    assert len(np.unique(ratios[::2])) > 45  # one draw per image


def test_without_cutmix_all_rows_get_mixup():
    weights, ratios = draw(jax.random.key(4), (16, 6, 5, 3), Mix(cutmix=False))
    np.testing.assert_array_equal(weights[:, 3, 2, 0], ratios)
    assert np.all(np.ptp(weights, axis=(1, 2)) == 0)


def test_images_are_weighted_sums():
    images, partners = jax.random.randint(jax.random.key(5), (2, 16, 6, 5, 3), 0, 256)
    mix = jax.jit(lambda a, b: apply_mix(jax.random.key(6), a, b, Mix()))
    weights, _ = mix(jnp.ones_like(images), jnp.zeros_like(images))
    mixed, ratios = mix(images, partners)
    np.testing.assert_allclose(weights.mean((1, 2, 3)), ratios, rtol=1e-5)
    np.testing.assert_allclose(mixed, weights * images + (1 - weights) * partners, atol=1e-4)
    inside = np.broadcast_to(np.asarray(weights[1::2]) == 1, images[1::2].shape)
    np.testing.assert_array_equal(np.asarray(mixed[1::2])[inside], np.asarray(images[1::2])[inside])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mixup": -0.1}, "mixup = -0.1; allowed: 0 or more"),
        ({"mixup": float("nan")}, "mixup = nan; allowed"),
        ({"mixup": 0, "cutmix": False}, "neither mixup nor cutmix"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Mix(**settings)
