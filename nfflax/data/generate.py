"""A made-up image folder: real JPEG files of several shapes, in classes that a network can learn.

A class is a grating of one hue, direction and frequency; phase, contrast, light and noise differ
from image to image. For tests, benchmarks and trying things out.
"""

import colorsys
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from nfflax.data.errors import DataError
from nfflax.spec.errors import Problem

# Multiples of the golden ratio's fraction are spread evenly, however many classes there are.
_GOLDEN = 0.6180339887
_FREQUENCIES = (3.0, 5.0, 8.0)  # periods along the short side
_QUALITY = 90  # of the JPEG files, about what photographs have


def generate_folder(
    folder: Path,
    *,
    classes: int = 10,
    train: int = 1000,
    test: int = 200,
    size: int = 256,
    seed: int = 0,
    progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Write `train/<class>/<n>.jpeg` and `test/...`, that many images in all, short side `size`.

    The folder appears when it is whole. The same arguments give the same images.
    """
    if folder.exists():
        raise DataError([Problem(str(folder), "", "exists already", allowed="a new folder")])
    temporary = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # what an interrupted call left
    digits = len(str(classes - 1))
    for part, (split, images) in enumerate((("train", train), ("test", test))):
        for label in range(classes):
            place = temporary / split / f"class_{label:0{digits}d}"
            place.mkdir(parents=True)
            for number in range(label, images, classes):
                rng = np.random.default_rng((seed, part, number))
                picture = Image.fromarray(draw(label, size, rng))
                picture.save(place / f"{number:06d}.jpeg", quality=_QUALITY)
                progress(1)
    temporary.rename(folder)


def draw(label: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """One image of a class: uint8 (height, width, 3), short side `size`, long side up to 4/3."""
    sides = [size, round(size * rng.uniform(1, 4 / 3))]
    height, width = sides if rng.random() < 0.7 else sides[::-1]
    angle = math.pi * (label * _GOLDEN % 1) + rng.normal(0, 0.05)
    frequency = _FREQUENCIES[label % len(_FREQUENCIES)] / size
    y, x = np.arange(height)[:, None], np.arange(width)[None, :]
    across = x * math.cos(angle) + y * math.sin(angle)
    wave_HW = np.sin(2 * math.pi * (frequency * across + rng.random()))
    hue = label * _GOLDEN + rng.normal(0, 0.02)
    colour = np.array(colorsys.hsv_to_rgb(hue % 1, rng.uniform(0.4, 0.9), 1.0))
    light, contrast = rng.uniform(90, 150), rng.uniform(30, 80)
    noise_HWC = rng.normal(0, 12, (height, width, 3))
    image_HWC = (light + contrast * wave_HW)[..., None] * colour + noise_HWC
    return np.clip(image_HWC, 0, 255).astype(np.uint8)
