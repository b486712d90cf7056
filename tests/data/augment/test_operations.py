"""Every operation of RandAugment against its definition, and against DeepMind's code.

Definitions are Pillow's where it has the operation, else NumPy in float64.

tests/golden/randaugment.npz comes from the official nfnets/autoaugment.py (deepmind-research), run
unchanged but for the random sign on TensorFlow 2.15.1, TensorFlow Addons 0.23.0 and NumPy 1.23.5
(CPU): `image`, and results under "operation|magnitude|sign" or "operations with signs|magnitude".
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_data import golden
from PIL import Image, ImageEnhance, ImageOps

from nfflax.data.augment.layer import Choice, distort_layer
from nfflax.data.augment.operations import INDEX, OPERATIONS, Settings, settings

SIGNED = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")
ENHANCED = ("Color", "Contrast", "Brightness", "Sharpness")
FROM_PILLOW = [name for name in OPERATIONS if name not in (*SIGNED, "Cutout", "SolarizeAdd")]
CENTRE = (4, 15)


@functools.partial(jax.jit, static_argnames=("numerics", "is_local"))
def _layer(images_NCHW, choice, tables, *, numerics, is_local):
    return distort_layer(images_NCHW, choice, Settings(**tables), numerics, is_local=is_local)


def run(image, operations, signs, magnitude, numerics, is_local=True):
    """Each operation on the same image, in one batch; compiled once for all magnitudes."""
    choice = Choice(
        jnp.array([INDEX[name] for name in operations], jnp.int32),
        jnp.array([sign < 0 for sign in signs], jnp.int32),
        *(jnp.full(len(operations), place, jnp.int32) for place in CENTRE),
    )
    tables = vars(settings(magnitude, image.shape[:2], numerics))
    images = np.broadcast_to(np.moveaxis(image, -1, 0), (len(operations), 3, *image.shape[:2]))
    results = _layer(images, choice, tables, numerics=numerics, is_local=is_local)
    return np.moveaxis(np.asarray(results), 1, -1).astype(int)


def run_all(image, magnitude, numerics, is_local=True):
    """{(operation, sign): result} of all of them, both signs."""
    pairs = [(name, sign) for name in OPERATIONS for sign in (1, -1)]
    names, signs = zip(*pairs, strict=True)
    results = run(image, names, signs, magnitude, numerics, is_local)
    return dict(zip(pairs, results, strict=True))


# --- definitions ----------------------------------------------------------------------------------


def by_pillow(name, image, magnitude):
    pillow = Image.fromarray(image)
    if name in ENHANCED:
        result = getattr(ImageEnhance, name)(pillow).enhance(magnitude / 10 * 1.8 + 0.1)
    elif name == "Posterize":
        result = ImageOps.posterize(pillow, min(8, max(1, int(magnitude / 10 * 4))))
    elif name == "Solarize":
        result = ImageOps.solarize(pillow, int(magnitude / 10 * 256))
    else:
        result = getattr(ImageOps, name.lower())(pillow)
    return np.asarray(result).astype(int)


def affine(name, sign, magnitude, size):
    """What takes (x, y, 1) of a pixel to its source. 10 is 30 degrees, 0.3, or 100 pixels."""
    amount = sign * magnitude / 10
    if name == "Rotate":
        cos, sin = math.cos(math.radians(30 * amount)), math.sin(math.radians(30 * amount))
        y, x = (side / 2 - 0.5 for side in size)
        return np.array([[cos, -sin, x - cos * x + sin * y], [sin, cos, y - sin * x - cos * y]])
    result = np.eye(2, 3)
    place = {"ShearX": (0, 1), "ShearY": (1, 0), "TranslateX": (0, 2), "TranslateY": (1, 2)}[name]
    result[place] = amount * (0.3 if name.startswith("Shear") else 100)
    return result


def moved(image, matrix):
    """Nearest pixels, 128 from outside; and which are certain, not half-way between two."""
    height, width, _ = image.shape
    y, x = np.mgrid[:height, :width].astype(float)
    column, row = np.tensordot(matrix, np.stack([x, y, np.ones_like(x)]), 1)
    half_way = [np.abs(np.abs(v - np.rint(v)) - 0.5) < 1e-3 for v in (column, row)]
    column, row = (np.rint(v).astype(int) for v in (column, row))
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    taken = image[np.where(inside, row, 0), np.where(inside, column, 0)]
    return np.where(inside[..., None], taken, 128).astype(int), ~(half_way[0] | half_way[1])


@pytest.fixture(scope="module")
def official():
    return golden("randaugment.npz")


def image_of(kind, textured):
    if kind == "one colour":
        return np.broadcast_to(np.array([200, 31, 77], np.uint8), textured.shape)
    if kind == "two values":
        return np.where(np.indices(textured.shape).sum(0) % 3, 90, 91).astype(np.uint8)
    if kind == "noise":
        return np.random.default_rng(0).integers(0, 256, textured.shape, np.uint8)
    return textured


CASES = [("textured", magnitude) for magnitude in range(31)] + [
    (kind, magnitude)
    for kind in ("one colour", "two values", "noise")
    for magnitude in (0, 7, 15, 30)
]


# --- tests ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "magnitude"), CASES)
def test_operations_equal_their_definitions(official, kind, magnitude):
    image = image_of(kind, official["image"])
    results = run_all(image, magnitude, "pillow")
    for name in FROM_PILLOW:
        wanted = by_pillow(name, image, magnitude)
        assert np.abs(results[name, 1] - wanted).max() <= 1, name
        np.testing.assert_array_equal(results[name, -1], results[name, 1])
    for name, sign in [(name, sign) for name in SIGNED for sign in (1, -1)]:
        wanted, certain = moved(image, affine(name, sign, magnitude, image.shape[:2]))
        assert certain.mean() > 0.7
        np.testing.assert_array_equal(results[name, sign][certain], wanted[certain], name)

    added = np.where(
        image < 128, np.minimum(image.astype(int) + int(magnitude / 10 * 110), 255), image
    )
    np.testing.assert_array_equal(results["SolarizeAdd", 1], added)
    cut, (row, column), half = image.astype(int), CENTRE, int(magnitude / 10 * 40)
    cut[max(0, row - half) : row + half, max(0, column - half) : column + half] = 128
    np.testing.assert_array_equal(results["Cutout", 1], cut)


def test_rotation_turns_as_pillow_does(official):
    image = official["image"]
    for sign in (1, -1):
        found = run(image, ["Rotate"], [sign], 7, "pillow")[0]
        turned = Image.fromarray(image).rotate(sign * 21, fillcolor=(128, 128, 128))
        assert np.mean(np.any(found != np.asarray(turned), axis=-1)) < 0.01


def test_operations_equal_the_official_code(official):
    image = official["image"]
    magnitudes = {key.split("|")[1] for key in official if key.count("|") == 2}
    results = {magnitude: run_all(image, int(magnitude), "official") for magnitude in magnitudes}
    compared = 0
    for key in [key for key in official if key.count("|") == 2]:
        name, magnitude, sign = key.split("|")
        sign = 1 if sign == "+" else -1
        difference = np.abs(results[magnitude][name, sign] - official[key])
        if name in SIGNED:
            matrix = affine(name, sign, int(magnitude), image.shape[:2])
            difference = difference[moved(image, matrix)[1]]
        if name == "Sharpness":  # sums in float32 there: a smoothed pixel in 200 is one level lower
            factor = int(magnitude) / 10 * 1.8 + 0.1
            assert np.mean(difference > 0) < 0.01
            assert difference.max() <= 1 + abs(1 - factor)
        elif name == "AutoContrast":
            assert difference.max() <= 1
        else:
            assert difference.max() == 0, key
        compared += 1
    assert compared == 83


def test_layers_in_a_row_equal_the_official_code(official):
    chains = [key for key in official if key.count("|") == 1]
    assert len(chains) == 4
    for key in chains:
        names, magnitude = key.split("|")
        image = official["image"]
        for step in names.split():
            name, sign = step[:-1], 1 if step[-1] == "+" else -1
            image = run(image, [name], [sign], int(magnitude), "official")[0].astype(np.uint8)
        assert np.mean(np.any(image != official[key], axis=-1)) < 0.01, key


def test_a_batch_that_may_be_split_gets_the_same(official):
    for numerics in ("official", "pillow"):
        whole = run_all(official["image"], 13, numerics)
        split = run_all(official["image"], 13, numerics, is_local=False)
        for pair, result in whole.items():
            np.testing.assert_array_equal(split[pair], result, str(pair))
