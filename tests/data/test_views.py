"""What the network sees: the official crops, in training and in evaluation."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from nfflax.data.views import EvalView, TrainView
from nfflax.spec.data import Data
from nfflax.spec.load import load_spec
from nfflax.spec.schema import Preprocess

SIDES = st.integers(1, 80)
BICUBIC = Image.Resampling.BICUBIC


def photo(width: int, height: int) -> Image.Image:
    """Noise without black and white, which resampling would clip."""
    noise = np.random.default_rng(0).integers(60, 196, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def assert_same(view: np.ndarray, expected: np.ndarray) -> None:
    """Equal but for rounding between the two passes of a resize."""
    np.testing.assert_allclose(view.astype(int), expected.astype(int), atol=1)


def crops(view: TrainView, height: int, width: int, count: int) -> np.ndarray:
    rng = np.random.default_rng(1)
    return np.array([view.box(height, width, rng) for _ in range(count)])


# Evaluation


@pytest.mark.parametrize(("width", "height"), [(50, 70), (64, 64), (200, 100)])
@pytest.mark.parametrize("margin", [32, 31, 0])
def test_squash_is_the_official_resize_and_crop(width: int, height: int, margin: int):
    image, size = photo(width, height), 40
    view = EvalView(size, Preprocess(crop="squash", crop_margin=margin))
    offset = (margin + 1) // 2
    resized = image.resize((size + margin, size + margin), BICUBIC)
    expected = np.asarray(resized)[offset : offset + size, offset : offset + size]
    assert_same(view(np.asarray(image)), expected)


@pytest.mark.parametrize(("width", "height"), [(50, 75), (64, 64), (200, 100)])
@pytest.mark.parametrize("fraction", [0.9, 0.875, 1.0])
def test_center_is_torchvisions_resize_and_crop(width: int, height: int, fraction: float):
    image, size = photo(width, height), 32
    view = EvalView(size, Preprocess(crop="center", crop_fraction=fraction, crop_margin=0))
    short = int(size / fraction)
    long = int(short * max(width, height) / min(width, height))
    resized = image.resize((short, long) if width <= height else (long, short), BICUBIC)
    top, left = round((resized.height - size) / 2), round((resized.width - size) / 2)
    expected = np.asarray(resized)[top : top + size, left : left + size]
    assert_same(view(np.asarray(image)), expected)


def test_views_of_a_run():
    spec = load_spec("nfnet_f0", {"stem.in_channels": 1, "preprocess.interpolation": "bilinear"})
    assert TrainView.of(spec, Data(crop_area=0.5, crop_ratio=2, flip=False)) == TrainView(
        192, 1, "bilinear", area=0.5, ratio=2, flip=False
    )
    assert EvalView.of(spec) == EvalView(256, spec.preprocess, 1)


# Training


@given(SIDES, SIDES, st.floats(0.01, 0.99), st.floats(1, 4), st.integers(0, 2**32))
def test_crops_lie_within_the_image(height, width, area, ratio, seed):
    view = TrainView(16, area=area, ratio=ratio)
    left, top, right, bottom = view.box(height, width, np.random.default_rng(seed))
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


def test_crops_have_the_official_areas_and_ratios():
    left, top, right, bottom = crops(TrainView(192), 375, 500, 4000).T
    width, height = right - left, bottom - top
    area = width * height / (375 * 500)
    assert 0.1 <= area.min() < 0.11  # min_object_covered, above the least area
    assert area.max() > 0.95
    ratio = width / height
    assert 0.75 - 0.01 < ratio.min() < 0.77
    assert 1.31 < ratio.max() < 4 / 3 + 0.01
    assert abs((left + right).mean() / 2 - 250) < 6
    assert abs((top + bottom).mean() / 2 - 187.5) < 6


def test_heights_are_uniform_as_tensorflows():
    """At ratio 1 every height from sqrt(0.1) of the side on is as likely; the whole image is not
    shown, but its official stand-in."""
    boxes = crops(TrainView(32, ratio=1.0), 100, 100, 20_000)
    heights = (boxes[:, 3] - boxes[:, 1]).astype(int)
    counts = np.bincount(heights, minlength=101)
    stand_in = 100 * 32 // 64
    assert counts[:32].sum() == counts[100] == 0
    assert abs(counts[stand_in] / counts[40:60].mean() - 2) < 0.5  # its own share and the whole's
    rest = np.delete(counts[32:100], stand_in - 32)
    chi_square = ((rest - rest.mean()) ** 2 / rest.mean()).sum()
    assert chi_square < 66 + 4 * np.sqrt(2 * 66)


def test_an_image_too_narrow_for_a_crop_is_shown_in_its_centre():
    assert (crops(TrainView(32), 10, 1000, 20) == [498, 3, 503, 8]).all()


def test_without_a_crop_the_whole_image_is_squashed():
    image = photo(60, 40)
    view = TrainView(24, area=1.0, flip=False)
    expected = np.asarray(image.resize((24, 24), BICUBIC))
    np.testing.assert_array_equal(view(np.asarray(image), np.random.default_rng(0)), expected)


def test_half_of_the_images_are_mirrored():
    array = np.asarray(photo(24, 24))
    view = TrainView(24, area=1.0)
    shown = [view(array, np.random.default_rng(seed)) for seed in range(200)]
    mirrored = sum(np.array_equal(image, array[:, ::-1]) for image in shown)
    assert sum(np.array_equal(image, array) for image in shown) == 200 - mirrored
    assert 70 < mirrored < 130


def test_the_same_numbers_give_the_same_view():
    file = io.BytesIO()
    photo(64, 48).save(file, "JPEG")
    view = TrainView(16)
    first, second = (view(file.getvalue(), np.random.default_rng(5)) for _ in range(2))
    np.testing.assert_array_equal(first, second)
