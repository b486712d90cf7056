"""Small sources and streams, for the tests of the host pipeline."""

import io

import numpy as np
from PIL import Image

from nfflax.data import (
    ArraySource,
    Data,
    EvalView,
    ImageError,
    Record,
    Source,
    TrainView,
    eval_batches,
    train_batches,
)
from nfflax.spec.schema import Preprocess

IMAGES, BATCH, STEPS = 37, 8, 12  # an odd number of images, two and a half epochs
VIEW = TrainView(6)
WHOLE = EvalView(4, Preprocess(crop_margin=0))
HERE = Data(workers=0)


def numbered(count: int) -> ArraySource:
    """Images whose every pixel is their number, and whose label it is too."""
    pixels = (
        np.ones((count, 9, 7, 3), np.uint8) * np.arange(count, dtype=np.uint8)[:, None, None, None]
    )
    return ArraySource(pixels, np.arange(count))


def jpegs(count: int) -> "FileSource":
    rng = np.random.default_rng(0)
    files = []
    for _ in range(count):
        file = io.BytesIO()
        pixels = rng.integers(0, 256, (40, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file, "JPEG")
        files.append(file.getvalue())
    return FileSource(files)


class FileSource:
    """Encoded images in memory."""

    class_names = ("only",)

    def __init__(self, files: list[bytes]):
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Record:
        if self.files[index] == b"unreadable":
            raise ImageError("cannot be read: No such file", f"{index}.jpeg")
        return Record(self.files[index], 0, f"{index}.jpeg")


SOURCE = jpegs(IMAGES)


def take(count: int = STEPS, source: Source = SOURCE, **options) -> list[dict[str, np.ndarray]]:
    options = {"batch_size": BATCH, "seed": 3, "partners": True, "data": HERE} | options
    with train_batches(source, VIEW, **options) as batches:
        return [next(batches) for _ in range(count)]


def assert_equal(stream, expected) -> None:
    for batch, other in zip(stream, expected, strict=True):
        assert batch.keys() == other.keys()
        for key in batch:
            assert batch[key].dtype == other[key].dtype
            np.testing.assert_array_equal(batch[key], other[key])


def evaluate(source: Source, **options) -> list[dict[str, np.ndarray]]:
    """One whole evaluation."""
    options = {"batch_size": BATCH, "data": HERE} | options
    with eval_batches(source, WHOLE, **options) as batches:
        stream = list(batches)
        assert len(batches) == len(stream)
    return stream
