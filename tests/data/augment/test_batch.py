"""`augment`: one batch from the host to the network, on one device and on eight."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nfflax.data.augment import Mix, RandAugment, augment, normalize
from nfflax.spec.schema import Preprocess

PREPROCESS = Preprocess()
KEY = jax.random.key(7)
NO_PARTNERS = {"mix_images": None, "mix_labels": None}
COLLECTIVES = r"\b(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)"


def full(key, batch):
    return augment(key, **batch, preprocess=PREPROCESS, mix=Mix(), randaugment=RandAugment(4, 10))


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    images, partners = rng.integers(0, 256, (2, 16, 16, 18, 3), np.uint8)
    return {
        "images": images,
        "labels": np.arange(16),
        "mix_images": partners,
        "mix_labels": np.arange(16)[::-1].copy(),
    }


@pytest.fixture(scope="module")
def on_one_device(batch):
    with jax.set_mesh(Mesh(np.array(jax.devices()[:1]), ("data",))):
        return jax.tree.map(np.asarray, jax.jit(full)(KEY, batch))


def to_levels(images):
    """Back from the network's values to 0..255."""
    mean, std = np.array(PREPROCESS.mean), np.array(PREPROCESS.std)
    return 255 * (np.asarray(images, np.float64) * std + mean)


@pytest.mark.parametrize(
    ("shape", "axes", "says_mesh"),
    [((8,), ("data",), True), ((2, 2, 2), ("data", "fsdp", "tensor"), True), ((8,), ("x",), False)],
)
def test_devices_change_nothing_and_do_not_talk(batch, on_one_device, shape, axes, says_mesh):
    mesh = Mesh(
        np.array(jax.devices()).reshape(shape), axes, axis_types=(AxisType.Auto,) * len(axes)
    )
    split = NamedSharding(mesh, P(axes[:2]))
    batch = jax.device_put(batch, split)
    step = jax.jit(full, out_shardings=split)
    if says_mesh:
        with jax.set_mesh(mesh):
            compiled = step.lower(KEY, batch).compile()
    else:
        compiled = step.lower(KEY, batch).compile()
    assert not re.findall(COLLECTIVES, compiled.as_text() or "")
    found = compiled(KEY, batch)
    for name, wanted in on_one_device.items():
        np.testing.assert_array_equal(np.asarray(found[name]), wanted, name)


@pytest.mark.slow
def test_a_batch_that_does_not_divide_gets_the_same_with_gathering(batch):
    batch = {name: values[:6] for name, values in batch.items()}
    results = []
    for count in (1, 4):
        with jax.set_mesh(jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,))):
            results.append(np.asarray(jax.jit(full)(KEY, batch)["images"]))
    np.testing.assert_array_equal(results[0], results[1])


def test_the_mixed_images_are_distorted_not_the_sources(on_one_device):
    levels = to_levels(on_one_device["images"])
    np.testing.assert_allclose(
        levels, np.rint(levels), atol=1e-3
    )  # else MixUp's would be fractions
    np.testing.assert_array_equal(on_one_device["labels"], np.arange(16))
    np.testing.assert_array_equal(on_one_device["mix_labels"], np.arange(16)[::-1])


def test_without_fresh_partners_the_next_row_is_the_partner(batch):
    images, labels = batch["images"], batch["labels"]
    mixed = jax.jit(lambda key, *rows: augment(key, *rows, preprocess=PREPROCESS, mix=Mix()))
    out = mixed(KEY, images, labels)
    np.testing.assert_array_equal(out["mix_labels"], np.roll(labels, -1))
    ratio = np.asarray(out["ratio"])[:, None, None, None]
    rows = slice(0, None, 2)  # MixUp's
    wanted = ratio * images + (1 - ratio) * np.roll(images, -1, axis=0)
    np.testing.assert_allclose(to_levels(out["images"])[rows], wanted[rows], atol=1e-2)


def test_nothing_asked_for_is_normalisation_alone(batch):
    images, labels = batch["images"], batch["labels"]
    out = augment(KEY, images, labels, preprocess=PREPROCESS, dtype=jnp.bfloat16)
    assert out["images"].dtype == jnp.bfloat16
    mean, std = np.array(PREPROCESS.mean), np.array(PREPROCESS.std)
    wanted = (images / 255 - mean) / std
    np.testing.assert_allclose(np.asarray(out["images"], np.float32), wanted, rtol=2**-8)
    np.testing.assert_allclose(normalize(jnp.asarray(images), PREPROCESS), wanted, atol=1e-5)
    np.testing.assert_array_equal(out["mix_labels"], labels)
    np.testing.assert_array_equal(out["ratio"], np.ones(len(labels)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mix_labels": None}, "mix_images and mix_labels come together"),
        ({"mix": None}, "mix_images without mix"),
        ({"rows": 1, **NO_PARTNERS}, "one image has no partner"),
        (
            {"channels": 2, "mix": None, **NO_PARTNERS},
            "preprocess.mean: 3 values for images of 2 channels",
        ),
    ],
)
def test_what_does_not_fit_is_named(batch, changes, message):
    changes = dict(changes)
    rows, channels = changes.pop("rows", 16), changes.pop("channels", 3)
    given: dict[str, Any] = {name: jnp.asarray(values[:rows]) for name, values in batch.items()}
    given |= {"mix": Mix()} | changes
    for name in ("images", "mix_images"):
        if given[name] is not None:
            given[name] = given[name][..., :channels]
    with pytest.raises(ValueError, match=message):
        augment(KEY, preprocess=PREPROCESS, **given)
