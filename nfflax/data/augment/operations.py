"""RandAugment's sixteen operations as rows of tables, at one magnitude and one image size.

A layer of RandAugment (`layer.py`) is four steps: move, look up, blend with a grey or a smoothed
image, cut out. Each operation is a row in the tables of these steps, and changes the image in one
of them. In the others its row is the identity.

Magnitudes and their scale are those of DeepMind's nfnets/autoaugment.py, which is TensorFlow's
RandAugment with `cutout_const` 40 and `translate_const` 100.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

Numerics = Literal["official", "pillow"]

# In the order in which the official code draws them.
OPERATIONS = (
    "AutoContrast",
    "Equalize",
    "Invert",
    "Rotate",
    "Posterize",
    "Solarize",
    "Color",
    "Contrast",
    "Brightness",
    "Sharpness",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
    "Cutout",
    "SolarizeAdd",
)
INDEX = {name: index for index, name in enumerate(OPERATIONS)}

FILL = 128  # grey of what comes in from outside the image, and of cutouts

_FULL_SCALE = 10.0  # the magnitude at which an operation has the strength written below


@dataclass(frozen=True, eq=False)
class Settings:
    """What a layer looks up: rows are operations."""

    affine: np.ndarray
    """(16, 2, 2, 3) float32, by operation and sign: takes (x, y, 1) of a pixel to its source."""
    lookup: np.ndarray
    """(16, 256) uint8: the new value of each value, where that does not depend on the image."""
    factor: np.ndarray
    """(16,) float32: 1 leaves the image, 0 is the degenerate image, 2 doubles the distance."""
    cutout: np.ndarray
    """(16,) int32: half the side of the square that is cut out."""
    contrast: float
    """The factor of Contrast, for numerics that take the image's own mean."""


def settings(magnitude: float, size: tuple[int, int], numerics: Numerics) -> Settings:
    """The tables for images of `size` (height, width)."""
    strength = magnitude / _FULL_SCALE
    enhancement = strength * 1.8 + 0.1

    factor = np.ones(len(OPERATIONS), np.float32)
    factor[[INDEX["Color"], INDEX["Sharpness"]]] = enhancement
    cutout = np.zeros(len(OPERATIONS), np.int32)
    cutout[INDEX["Cutout"]] = int(strength * 40)
    return Settings(
        affine=_affine(strength, size),
        lookup=_lookup(strength, enhancement, size, numerics),
        factor=factor,
        cutout=cutout,
        contrast=enhancement,
    )


def _affine(strength: float, size: tuple[int, int]) -> np.ndarray:
    tables = np.tile(np.eye(2, 3), (len(OPERATIONS), 2, 1, 1))
    for index, sign in enumerate((1, -1)):
        shear, pixels = sign * strength * 0.3, sign * strength * 100
        tables[INDEX["Rotate"], index] = _rotation(math.radians(sign * strength * 30), size)
        tables[INDEX["ShearX"], index, 0, 1] = shear
        tables[INDEX["ShearY"], index, 1, 0] = shear
        tables[INDEX["TranslateX"], index, 0, 2] = pixels
        tables[INDEX["TranslateY"], index, 1, 2] = pixels
    return tables.astype(np.float32)


def _rotation(angle: float, size: tuple[int, int]) -> np.ndarray:
    """About the middle of the image."""
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    centre = (np.array(size[::-1]) - 1) / 2
    return np.column_stack([turn, centre - turn @ centre])


def _lookup(
    strength: float, enhancement: float, size: tuple[int, int], numerics: Numerics
) -> np.ndarray:
    values = np.arange(256)
    tables = np.tile(values, (len(OPERATIONS), 1))
    threshold, bits = int(strength * 256), int(strength * 4)
    if numerics == "official":
        # TensorFlow (2.15, seen by running it) makes both arguments uint8 without a check: from
        # magnitude 10 on Solarize's threshold wraps around. A shift is held to 7 bits.
        threshold, shift = threshold % 256, min((8 - bits) % 256, 7)
        # The grey that contrast is taken from is not the image's mean there: it is the number of
        # pixels over 256, a mean over the bins of the histogram.
        grey = min(math.prod(size) // 256, 255)
        tables[INDEX["Contrast"]] = _blended(grey, enhancement)
    else:
        shift = 8 - min(max(bits, 1), 8)
    tables[INDEX["Invert"]] = 255 - values
    tables[INDEX["Posterize"]] = values >> shift << shift
    tables[INDEX["Solarize"]] = np.where(values < threshold, values, 255 - values)
    added = np.minimum(values + int(strength * 110), 255)
    tables[INDEX["SolarizeAdd"]] = np.where(values < 128, added, values)
    tables[INDEX["Brightness"]] = _blended(0, enhancement)
    return tables.astype(np.uint8)


def _blended(degenerate: int, factor: float) -> np.ndarray:
    """Every value after a blend away from one grey, cut to whole levels."""
    values = np.arange(256, dtype=np.float32)
    grey = np.float32(degenerate)
    return np.clip(grey + np.float32(factor) * (values - grey), 0, 255).astype(np.uint8)
