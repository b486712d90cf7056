"""What the network sees of an image: a random crop in training, the preset's crop in evaluation.

The geometry is that of the official code (nfnets/dataset.py), which is TensorFlow's.
"""

import math
from dataclasses import dataclass

import numpy as np

from nfflax.data.decode import Box, Interpolation, Picture
from nfflax.spec.data import Data
from nfflax.spec.schema import Preprocess, Spec

_ATTEMPTS = 10
_CENTRE_MARGIN = 32  # of the centre crop that stands in when no random crop was found
# The official call asks TensorFlow for min_object_covered = 0.1 of the whole image, so a crop of
# less than a tenth is drawn anew although area goes down to 0.08.
_LEAST_COVER = 0.1


@dataclass(frozen=True)
class TrainView:
    """A random crop with a random horizontal flip, resampled to a square."""

    resolution: int
    """Side of the result."""
    channels: int = 3
    """1: greyscale; 3: RGB."""
    interpolation: Interpolation = "bicubic"
    """Resampling filter."""
    area: float = 0.08
    """The crop covers between this share of the image and all of it; 1: always the whole image."""
    ratio: float = 4 / 3
    """The crop's width / height lies between 1 / ratio and ratio."""
    flip: bool = True
    """Mirror every other image, by a coin."""

    @classmethod
    def of(cls, spec: Spec, data: Data) -> "TrainView":
        """What a run trains a network on."""
        return cls(
            spec.resolution.train,
            spec.stem.in_channels,
            spec.preprocess.interpolation,
            data.crop_area,
            data.crop_ratio,
            data.flip,
        )

    def __call__(self, image: bytes | np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The view of an encoded or decoded image: uint8 (resolution, resolution, channels)."""
        picture = Picture(image)
        box = self.box(picture.height, picture.width, rng)
        return picture.region(
            box,
            self.resolution,
            channels=self.channels,
            interpolation=self.interpolation,
            mirror=self.flip and rng.random() < 0.5,
        )

    def box(self, height: int, width: int, rng: np.random.Generator) -> Box:
        """The part of an image to show."""
        whole = (0, 0, width, height)
        if self.area == 1:
            return whole
        crops = (self._crop(height, width, rng) for _ in range(_ATTEMPTS))
        box = next((crop for crop in crops if crop), whole)
        return _centre(height, width, self.resolution) if box == whole else box

    def _crop(self, height: int, width: int, rng: np.random.Generator) -> Box | None:
        """One attempt, as TensorFlow's SampleDistortedBoundingBox makes it: heights are uniform."""
        ratio = rng.uniform(1 / self.ratio, self.ratio)
        least, most = self.area * height * width, height * width
        low = round(math.sqrt(least / ratio))
        high = round(math.sqrt(most / ratio))
        if round(high * ratio) > width:
            high = int((width + 0.5 - 1e-7) / ratio)
            high -= round(high * ratio) > width
        high = min(high, height)
        low = min(low, high)
        crop_height = int(rng.integers(low, high + 1))
        if crop_height * round(crop_height * ratio) < least:  # rounding went past a bound
            crop_height += 1
        if crop_height * round(crop_height * ratio) > most:
            crop_height -= 1
        crop_width = round(crop_height * ratio)
        area = crop_height * crop_width
        fits = 0 < crop_height <= height and 0 < crop_width <= width
        if not fits or area < max(least, _LEAST_COVER * most):
            return None
        # TensorFlow's bounds exclude the last offset.
        top = int(rng.integers(height - crop_height)) if crop_height < height else 0
        left = int(rng.integers(width - crop_width)) if crop_width < width else 0
        return left, top, left + crop_width, top + crop_height


@dataclass(frozen=True)
class EvalView:
    """The centre of the resized image, as a model spec's [preprocess] table says."""

    resolution: int
    """Side of the result."""
    preprocess: Preprocess
    """Which resize, and how much of it is cut away."""
    channels: int = 3
    """1: greyscale; 3: RGB."""

    @classmethod
    def of(cls, spec: Spec) -> "EvalView":
        """What a network is evaluated on."""
        return cls(spec.resolution.test, spec.preprocess, spec.stem.in_channels)

    def __call__(self, image: bytes | np.ndarray) -> np.ndarray:
        """The view of an encoded or decoded image: uint8 (resolution, resolution, channels)."""
        picture = Picture(image)
        return picture.region(
            self.box(picture.height, picture.width),
            self.resolution,
            channels=self.channels,
            interpolation=self.preprocess.interpolation,
            spare=2.0,  # keeps reduced-size decoding out of sight where accuracy is measured
        )

    def box(self, height: int, width: int) -> Box:
        """The part of an image that remains when it is resized and its centre cut out."""
        target = int(self.resolution / self.preprocess.crop_fraction) + self.preprocess.crop_margin
        if self.preprocess.crop == "squash":
            resized_height = resized_width = target
            offsets = [(target - self.resolution + 1) // 2] * 2  # odd rests round up (official)
        else:
            short = min(height, width)
            resized_height, resized_width = (int(target * n / short) for n in (height, width))
            # Python rounds halves to even, as torchvision's centre crop does.
            rests = resized_height - self.resolution, resized_width - self.resolution
            offsets = [round(rest / 2) for rest in rests]
        y, x = height / resized_height, width / resized_width
        top, left = offsets[0] * y, offsets[1] * x
        return left, top, left + self.resolution * x, top + self.resolution * y


def _centre(height: int, width: int, resolution: int) -> Box:
    """The official stand-in for a random crop: a centre square, scaled so that 32 px remain."""
    scale = min(height, width) / (resolution + _CENTRE_MARGIN)
    side = max(int(scale * resolution), 1)
    top, left = (height - side + 1) // 2, (width - side + 1) // 2
    return left, top, left + side, top + side
