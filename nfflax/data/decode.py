"""Decoding one image with Pillow: what is accepted, and one resampling of a region of it.

A JPEG is decoded at 1/2, 1/4 or 1/8 of its size where that is all a region needs. Images come out
upright, 8-bit, greyscale or RGB, whatever the file holds; files that cannot are refused by name.
"""

import io
import itertools
from typing import Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

from nfflax.data.errors import ImageError

Interpolation = Literal["bicubic", "bilinear", "nearest"]
Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels

# Other formats that Pillow reads are not used for photographs and only widen what may go wrong.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
# 8192 x 8192: 200 MB once decoded. A decompression bomb says its size in its header.
MAX_PIXELS = 1 << 26

_RESAMPLING = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "nearest": Image.Resampling.NEAREST,
}
_ORIENTATION = 0x0112  # the EXIF tag
# Orientation: whether the file's columns and rows run backwards, and whether rows are columns.
_FLIPS = {
    1: (False, False, False),
    2: (True, False, False),
    3: (True, True, False),
    4: (False, True, False),
    5: (False, False, True),
    6: (False, True, True),
    7: (True, True, True),
    8: (True, False, True),
}
# What undoes each of the three, in this order, and a mirror at last.
_TURNS = (
    Image.Transpose.FLIP_LEFT_RIGHT,
    Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSPOSE,
    Image.Transpose.FLIP_LEFT_RIGHT,
)
_GREY_MODES = ("1", "LA", "La")
_COLOUR_MODES = ("P", "PA", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")


class Picture:
    """An opened image: its upright size is known, its pixels are decoded when they are asked for.

    One picture gives one region: a JPEG is decoded for the size at which it is needed.
    """

    def __init__(self, image: bytes | np.ndarray):
        try:
            self._image = _from_array(image) if isinstance(image, np.ndarray) else _open(image)
            width, height = self._image.size
            self._flips = _FLIPS.get(_orientation(self._image), _FLIPS[1])
        except ImageError:
            raise
        except Exception as error:  # Pillow's parsers raise nearly anything on damaged bytes
            raise ImageError(_reason(error)) from None
        if self._flips[2]:
            width, height = height, width
        self.width, self.height = width, height
        self.kind = f"{self._image.format or 'array'} {self._image.mode}"

    def region(
        self,
        box: Box,
        size: int,
        *,
        channels: int = 3,
        interpolation: Interpolation = "bicubic",
        spare: float = 1.0,
        mirror: bool = False,
    ) -> np.ndarray:
        """A box of the upright image, resampled with antialias to uint8 (size, size, channels).

        `mirror` swaps left and right. A JPEG is decoded at reduced size as long as `spare` times
        as many pixels as are wanted remain along each side.
        """
        try:
            box = self._in_file(box)
            scale = self._reduce(box, size * spare, channels)
            pixels = _eight_bit(self._image)
            width, height = pixels.size
            left, top, right, bottom = (edge / scale for edge in box)
            inside = (max(left, 0.0), max(top, 0.0), min(right, width), min(bottom, height))
            resized = pixels.resize((size, size), _RESAMPLING[interpolation], box=inside)
            mode = "L" if channels == 1 else "RGB"
            wanted = resized if resized.mode == mode else resized.convert(mode)
            for turn in itertools.compress(_TURNS, (*self._flips, mirror)):
                wanted = wanted.transpose(turn)
        except ImageError:
            raise
        except Exception as error:
            raise ImageError(_reason(error)) from None
        return np.asarray(wanted).reshape(size, size, channels)

    def _in_file(self, box: Box) -> Box:
        """The box in the file's own coordinates."""
        left, top, right, bottom = box
        width, height = self._image.size
        backward_x, backward_y, transposed = self._flips
        if transposed:
            left, top, right, bottom = top, left, bottom, right
        if backward_x:
            left, right = width - right, width - left
        if backward_y:
            top, bottom = height - bottom, height - top
        return left, top, right, bottom

    def _reduce(self, box: Box, size: float, channels: int) -> int:
        """Ask the JPEG decoder for fewer pixels; returns how many times fewer along each side."""
        left, top, right, bottom = box
        ratio = min(right - left, bottom - top) / size
        scale = next((s for s in (8, 4, 2) if ratio >= s), 1)
        width, height = self._image.size
        if self._image.format not in ("JPEG", "MPO") or min(width, height) < scale:
            return 1
        self._image.draft("L" if channels == 1 else "RGB", (width // scale, height // scale))
        return scale


def _open(encoded: bytes) -> Image.Image:
    if not encoded:
        raise ImageError("is empty")
    image = Image.open(io.BytesIO(encoded), formats=_FORMATS)
    _refuse_bomb(*image.size)
    return image


def _from_array(array: np.ndarray) -> Image.Image:
    """A uint8 array (H, W), (H, W, 1) or (H, W, 3) as an image."""
    plain = array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array
    if array.dtype != np.uint8 or not (plain.ndim == 2 or plain.shape[2:] == (3,)):
        allowed = "uint8 of shape (H, W), (H, W, 1) or (H, W, 3)"
        raise ImageError(f"is {array.dtype} of shape {array.shape}; allowed: {allowed}")
    if not plain.size:
        raise ImageError(f"has no pixels: its shape is {array.shape}")
    _refuse_bomb(plain.shape[1], plain.shape[0])
    return Image.fromarray(np.ascontiguousarray(plain))


def _refuse_bomb(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ImageError(f"has {width} x {height} pixels, more than {MAX_PIXELS}: refused")


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation still to be applied; Pillow applies a TIFF's by itself."""
    return 1 if image.format == "TIFF" else image.getexif().get(_ORIENTATION, 1)


def _eight_bit(image: Image.Image) -> Image.Image:
    """The image as 8-bit grey or RGB: 16 bits lose the lower 8, alpha is dropped, as TF does."""
    image.load()
    if image.mode in ("L", "RGB"):
        return image
    if image.mode in _GREY_MODES:
        return image.convert("L")
    if image.mode in _COLOUR_MODES:
        return image.convert("RGB")
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    raise ImageError(f"has pixels of kind {image.mode!r}, which have no 8-bit meaning")


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"is no image of a known format ({', '.join(_FORMATS)})"
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"has more than {MAX_PIXELS} pixels: refused"
    return f"is damaged: {error or type(error).__name__}"
