"""Any file becomes upright 8-bit grey or RGB, or is refused by name; none crashes or hangs."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from nfflax.data.decode import MAX_PIXELS, Picture
from nfflax.data.errors import ImageError


def encoded(image: Image.Image, form: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def smooth(width: int, height: int) -> Image.Image:
    """A picture without symmetry, which JPEG keeps well."""
    y, x = np.mgrid[:height, :width]
    channels = 255 * x / width, 255 * y / height, 128 + 90 * np.sin(3 * x / width + 5 * y / height)
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


def whole(data: bytes | np.ndarray, size: int = 8, **options) -> np.ndarray:
    picture = Picture(data)
    return picture.region((0, 0, picture.width, picture.height), size, **options)


PHOTO = smooth(40, 24)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_upright(form: str, orientation: int):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(PHOTO, form, exif=exif)
    picture = Picture(data)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert (picture.width, picture.height) == upright.size
    box = (3, 5, upright.width - 1, upright.height - 7)
    size = 15  # too large for decoding at reduced size
    resized = upright.convert("RGB").resize((size, size), Image.Resampling.BICUBIC, box=box)
    expected = np.asarray(resized)
    for mirror in (False, True):
        region = Picture(data).region(box, size, mirror=mirror)
        turned = expected[:, ::-1] if mirror else expected
        np.testing.assert_allclose(region.astype(int), turned.astype(int), atol=1)


@pytest.mark.parametrize(
    ("image", "form"),
    [
        (PHOTO.convert("L"), "JPEG"),
        (PHOTO.convert("CMYK"), "JPEG"),
        (PHOTO.convert("P", palette=Image.Palette.ADAPTIVE), "GIF"),
        (PHOTO.convert("P", palette=Image.Palette.ADAPTIVE), "PNG"),
        (PHOTO.convert("LA"), "PNG"),
        (PHOTO.convert("RGBA"), "WEBP"),
        (PHOTO.convert("1"), "PNG"),
        (PHOTO, "BMP"),
    ],
    ids=lambda value: getattr(value, "mode", value),
)
def test_all_kinds_of_pixels(image: Image.Image, form: str):
    data = encoded(image, form)
    expected = np.asarray(image.convert("RGB").resize((8, 8), Image.Resampling.BICUBIC))
    rgb, grey = whole(data), whole(data, channels=1)
    assert (rgb.shape, grey.shape, rgb.dtype, grey.dtype) == ((8, 8, 3), (8, 8, 1), *["uint8"] * 2)
    tolerance = 40 if form == "GIF" else 16
    np.testing.assert_allclose(rgb.astype(int), expected.astype(int), atol=tolerance)
    luma = rgb @ np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(grey[..., 0].astype(int), luma, atol=6)


def test_alpha_is_dropped_and_the_colour_under_it_kept():
    clear = Image.new("RGBA", (4, 4), (200, 100, 50, 0))
    assert whole(encoded(clear), 2).tolist() == [[[200, 100, 50]] * 2] * 2


def test_sixteen_bits_lose_the_lower_eight():
    values = np.array([[0, 255, 256], [0x1234, 0x8000, 0xFFFF]], np.uint16)
    data = encoded(Image.fromarray(values).resize((3, 2)))
    grey = Picture(data).region((0, 0, 3, 2), 6, channels=1, interpolation="nearest")
    assert grey[::3, ::2, 0].tolist() == (values >> 8).tolist()


def test_arrays_are_images_too():
    array = np.asarray(PHOTO)
    np.testing.assert_array_equal(whole(array), whole(encoded(PHOTO)))
    assert whole(array[..., :1]).shape == (8, 8, 3)
    np.testing.assert_array_equal(
        whole(array[..., 0], channels=1), whole(array[..., :1], channels=1)
    )


@pytest.mark.parametrize("size", [8, 30, 60, 150, 400])
def test_reduced_size_decoding_shows_the_same(size: int):
    photo = smooth(640, 480)
    box = (100.0, 40.0, 600.0, 470.0)
    data = encoded(photo, "JPEG", quality=95)
    expected = photo.resize((size, size), Image.Resampling.BICUBIC, box=box)
    for channels, reference in ((3, expected), (1, expected.convert("L"))):
        region = Picture(data).region(box, size, channels=channels)
        difference = np.abs(region.astype(int) - np.asarray(reference).reshape(region.shape))
        assert difference.mean() < 1.5
        assert difference.max() < 12


def png(width: int, height: int) -> bytes:
    """A PNG that only says it has this many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checked = kind + data
        return struct.pack(">I", len(data)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"")), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


JPEG = encoded(PHOTO, "JPEG")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is empty"),
        (b"no image", "is no image of a known format (JPEG, PNG, WEBP, GIF, BMP, TIFF)"),
        (JPEG[:-40], "is damaged: image file is truncated"),
        (JPEG[:10], "is"),
        (encoded(Image.fromarray(np.ones((4, 4), np.int32)), "TIFF"), "has pixels of kind 'I'"),
        (encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "has pixels of kind 'F'"),
        (encoded(PHOTO, "PPM"), "is no image of a known format"),
        (png(MAX_PIXELS // 1024 + 1, 1024), f"has {MAX_PIXELS // 1024 + 1} x 1024 pixels, more"),
        (png(100_000, 100_000), f"has more than {MAX_PIXELS} pixels: refused"),
        (np.ones((4, 4, 3), np.float32), "is float32 of shape (4, 4, 3); allowed: uint8"),
        (np.ones((4, 4, 5), np.uint8), "is uint8 of shape (4, 4, 5); allowed: uint8"),
        (np.ones((0, 4, 3), np.uint8), "has no pixels"),
    ],
)
def test_what_is_refused(data: bytes | np.ndarray, reason: str):
    with pytest.raises(ImageError) as caught:
        whole(data)
    assert str(caught.value).startswith(reason)


def mutants(count: int) -> list[bytes]:
    """Small JPEG and PNG files with bytes changed, cut off, repeated or put in."""
    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    files = [
        encoded(PHOTO, "JPEG", exif=exif),
        encoded(PHOTO, "JPEG", progressive=True),
        encoded(PHOTO.convert("CMYK"), "JPEG"),
        encoded(PHOTO),
        encoded(PHOTO.convert("P")),
    ]
    found = []
    for number in range(count):
        data = bytearray(files[number % len(files)])
        for _ in range(rng.integers(1, 9)):
            # half of all changes hit the headers, where the sizes stand
            at = int(rng.integers(len(data) if rng.random() < 0.5 else 64))
            kind = rng.integers(4)
            if kind < 2:
                data[min(at, len(data) - 1)] = rng.integers(256)
            elif kind == 2:
                data[at:at] = rng.bytes(int(rng.integers(1, 9)))
            else:
                del data[at : at + int(rng.integers(1, 40))]
        found.append(bytes(data[: int(rng.integers(len(data)))] if rng.random() < 0.2 else data))
    return found


def test_damaged_files_never_crash():
    good, reasons = 0, set()
    for data in mutants(800):
        try:
            assert whole(data).shape == (8, 8, 3)
            good += 1
        except ImageError as error:
            reasons.add(error.reason)
    assert good > 50  # a changed pixel is no damage that anyone could see
    assert len(reasons) > 10
