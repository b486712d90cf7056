"""The contact sheet: it shows the run's own batch, and is laid out so that it can be read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from nfflax.data import open_source
from nfflax.data.augment import normalize
from nfflax.data.feed import augmentation, train_feed
from nfflax.data.preview import captions, preview, visible
from nfflax.data.sheet import Caption, Tile, contact_sheet
from nfflax.spec.load import load_run
from nfflax.spec.schema import Preprocess

RUN = load_run(
    "digits",
    {
        "model.spec": "nfnet_tiny",
        "train.batch_size": 12,
        "data.crop_area": 0.8,
        "data.workers": 0,
    },
)


def pixels(sheet: Image.Image) -> np.ndarray:
    return np.asarray(sheet)


def is_shown(tile_HWC: np.ndarray, sheet_HWC: np.ndarray) -> bool:
    """Whether the tile stands somewhere on the sheet, pixel for pixel."""
    height, width, _ = tile_HWC.shape
    first = np.argwhere((sheet_HWC == tile_HWC[0, 0]).all(-1))
    candidates = (sheet_HWC[y : y + height, x : x + width] for y, x in first)
    return any(np.array_equal(candidate, tile_HWC) for candidate in candidates)


def test_what_is_visible_is_what_was_normalised():
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    for preprocess in (Preprocess(), Preprocess(mean=(0.5,), std=(0.25,))):
        normalized = np.asarray(normalize(jnp.asarray(images), preprocess))
        np.testing.assert_array_equal(visible(normalized, preprocess), images)


def test_the_sheet_shows_the_batch_of_the_step():
    said = []
    sheet = preview(RUN, step=5, count=3, say=said.append)
    assert said == ["opening digits", "reading images", "compiling the augmentation"]
    with train_feed(RUN, open_source(RUN.data, "train"), step=5) as batches:
        seen = jax.jit(augmentation(RUN))(next(batches), 5)
    shown = visible(np.asarray(seen["images"]), RUN.spec.preprocess)
    scaled = shown.repeat(4, axis=1).repeat(4, axis=2)  # 32 px become 128, never smoothed
    found = [is_shown(tile, pixels(sheet)) for tile in scaled]
    assert found == [True] * 3 + [False] * 9


def test_of_a_large_batch_only_a_few_rows_are_read():
    """12 of 49,152 images, with the crops that the whole batch has."""
    changes = {"train.batch_size": 49_152, "augment.mixup": 0, "augment.cutmix": False}
    large = load_run(RUN, changes)
    with train_feed(large, open_source(RUN.data, "train"), hosts=4096) as batches:
        images = next(batches)["images"]
    sheet = pixels(preview(large, count=10))
    scaled = images.repeat(4, axis=1).repeat(4, axis=2)
    assert [is_shown(tile, sheet) for tile in scaled] == [True] * 10 + [False] * 2


@pytest.mark.parametrize(
    ("resolution", "count", "columns", "side"),
    [(8, 20, 8, 128), (100, 3, 3, 200), (192, 9, 8, 192), (300, 5, 4, 300)],
)
def test_layout(resolution, count, columns, side):
    tile = np.full((resolution, resolution, 3), 7, np.uint8)
    sheet = contact_sheet("run", ["note"], [Tile(tile, [Caption("name")])] * count)
    rows = -(-count // columns)
    assert sheet.width == max(columns * (side + 10) - 10, 640) + 32
    assert rows * side < sheet.height < rows * (side + 60) + 120
    assert (pixels(sheet) == 7).all(-1).sum() >= count * side**2


def test_long_texts_stay_within_their_place():
    tile = np.full((128, 128, 1), 99, np.uint8)
    tiles = [Tile(tile, [Caption("an endless name of a class " * 9, "0.50")])] * 2
    sheet = pixels(contact_sheet("t" * 999, ["word " * 200, "x" * 999], tiles))
    is_ink = np.any(sheet < 200, axis=-1)
    assert not is_ink[:, :16].any()
    assert not is_ink[:, -16:].any()
    assert not is_ink[-40:, 144:154].any()  # between the captions
    assert is_ink[-40:, 16:144].any()


def test_captions_name_the_classes_and_their_shares():
    labels, others, shares = np.array([1, 2]), np.array([0, 3]), np.array([1.0, 0.126])
    names = ["owl", "red fox", "Eule λ"]

    def lines(*, is_mixed: bool) -> list[list[tuple[str, ...]]]:
        found = captions(labels, others, shares, class_names=names, is_mixed=is_mixed)
        return [[tuple(caption) for caption in each] for each in found]

    # Pillow's own font knows English letters only, and class 3 has no name.
    assert lines(is_mixed=False) == [[("red fox", "")], [("class 2", "")]]
    assert lines(is_mixed=True) == [
        [("red fox", "1.00"), ("owl", "0.00")],
        [("class 2", "0.13"), ("class 3", "0.87")],
    ]
