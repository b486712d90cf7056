"""A contact sheet: small images in rows, each with a caption, under a title. Drawn with Pillow."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_SMALLEST = 128  # pixels on the sheet that an image is scaled up to, in whole steps
_WIDE = 224  # images beyond this stand four in a row, not eight
_MARGIN, _GAP = 16, 10
_PAPER, _INK, _FAINT = (250, 250, 248), (25, 25, 25), (115, 115, 115)


class Caption(NamedTuple):
    """A line under an image: a name that may be shortened, and what stands to its right."""

    name: str
    value: str = ""


class Tile(NamedTuple):
    """An image of the sheet."""

    pixels_HWC: np.ndarray
    """uint8, square, 1 or 3 channels."""
    captions: Sequence[Caption]


def contact_sheet(title: str, notes: Sequence[str], tiles: Sequence[Tile]) -> Image.Image:
    """The sheet. Tiles have one size and one number of captions; pixels are never smoothed."""
    resolution = tiles[0].pixels_HWC.shape[0]
    side = resolution * max(-(-_SMALLEST // resolution), 1)
    columns = min(len(tiles), 8 if side <= _WIDE else 4)
    rows = -(-len(tiles) // columns)
    small = _font(min(max(side // 10, 12), 16))
    large = _font(22)
    line = _line_height(small)
    cell_width = side + _GAP
    cell_height = side + line * len(tiles[0].captions) + 4 + _GAP
    width = max(columns * cell_width - _GAP, 640) + 2 * _MARGIN
    text_width = width - 2 * _MARGIN
    lines = [part for note in notes for part in _wrapped(note, small, text_width)]
    top = _MARGIN + _line_height(large) + line * len(lines) + _GAP

    sheet = Image.new("RGB", (width, top + rows * cell_height - _GAP + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, _MARGIN), _shortened(title, large, text_width), _INK, large)
    for number, text in enumerate(lines):
        y = _MARGIN + _line_height(large) + line * number
        draw.text((_MARGIN, y), text, _FAINT, small)
    for index, tile in enumerate(tiles):
        row, column = divmod(index, columns)
        x, y = _MARGIN + column * cell_width, top + row * cell_height
        sheet.paste(_picture(tile.pixels_HWC, side), (x, y))
        for number, caption in enumerate(tile.captions):
            below = y + side + 4 + number * line
            value_width = small.getlength(caption.value)
            name = _shortened(caption.name, small, side - value_width - 6)
            draw.text((x, below), name, _INK, small)
            draw.text((x + side - value_width, below), caption.value, _FAINT, small)
    return sheet


def _picture(pixels_HWC: np.ndarray, side: int) -> Image.Image:
    pixels = pixels_HWC[..., 0] if pixels_HWC.shape[-1] == 1 else pixels_HWC
    return Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)


def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # so it is when a size is given
    return font


def _line_height(font: ImageFont.FreeTypeFont) -> int:
    return round(font.size * 1.3)


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    """The text in lines, broken between words."""
    lines: list[str] = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return [_shortened(line, font, width) for line in lines if line]


def _shortened(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """As much of the text as fits."""
    if font.getlength(text) <= width:
        return text
    length = len(text)
    while length and font.getlength(f"{text[:length]}…") > width:
        length -= 1
    return f"{text[:length]}…"
