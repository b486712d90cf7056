"""Where images come from: one small interface, arrays in memory, and finding a source by its name.

A source gives any record at any time, in any thread or process, so the pipeline over it needs no
state but a position.
"""

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from nfflax.data.errors import DataError
from nfflax.spec.data import Data
from nfflax.spec.errors import Problem, nearest

TEST_DIGITS = 360  # of scikit-learn's 1797, drawn once and for all


class Record(NamedTuple):
    """One labelled image."""

    image: bytes | np.ndarray
    """An encoded file, or uint8 (H, W), (H, W, 1) or (H, W, 3)."""
    label: int
    """Its class, from 0."""
    name: str
    """What to call it in messages: a path or a number."""


class Source(Protocol):
    """Labelled images with random access. Anything of this form can be trained on."""

    @property
    def class_names(self) -> Sequence[str]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


class ArraySource:
    """Images in memory: uint8 (N, H, W), (N, H, W, 1) or (N, H, W, 3), and N labels."""

    def __init__(
        self, images: np.ndarray, labels: np.ndarray, class_names: Sequence[str] | None = None
    ):
        """Without `class_names` the classes are called by their numbers, up to the largest."""
        self._images, self._labels = np.asarray(images), np.asarray(labels)
        problems = []
        if self._images.dtype != np.uint8 or self._images.shape[3:] not in ((), (1,), (3,)):
            found = f"{self._images.dtype} {self._images.shape}"
            allowed = "uint8 (N, H, W), (N, H, W, 1) or (N, H, W, 3)"
            problems.append(Problem("arrays", "images", "has the wrong form", found, allowed))
        if self._labels.shape != self._images.shape[:1] or self._labels.dtype.kind not in "iu":
            found = f"{self._labels.dtype} {self._labels.shape}"
            allowed = f"whole numbers, {self._images.shape[:1]}"
            problems.append(Problem("arrays", "labels", "has the wrong form", found, allowed))
        elif self._labels.size:
            classes = int(self._labels.max()) + 1 if class_names is None else len(class_names)
            class_names = class_names or [str(i) for i in range(max(classes, 0))]
            if self._labels.min() < 0 or self._labels.max() >= classes:
                found = f"{self._labels.min()} to {self._labels.max()}"
                allowed = f"0 to {classes - 1}"
                problems.append(Problem("arrays", "labels", "are out of range", found, allowed))
        if problems:
            raise DataError(problems)
        self.class_names = tuple(class_names or ())

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Record:
        return Record(self._images[index], int(self._labels[index]), f"image {index}")


def open_source(data: Data, split: str) -> Source:
    """The source that a [data] table names, at one of its splits."""
    kind, name = kind_of(data.source)
    source = _OPENERS[kind](data, name, split)
    if not len(source):
        raise DataError([Problem(data.source, split, "holds no images")])
    return source


def splits_of(data: Data) -> tuple[str, ...]:
    """The splits a source is known to have; those of a library are only known to it."""
    kind, name = kind_of(data.source)
    if kind == "digits":
        return ("train", "test")
    if kind == "folder":
        from nfflax.data.folder import splits_in

        return splits_in(Path(name))
    if kind == "records":
        from nfflax.data.records import splits_in

        return splits_in(Path(name))
    return (data.train,)


def kind_of(reference: str) -> tuple[str, str]:
    """What kind of source a reference means, and its name: `digits`, `tfds:NAME`, or a path."""
    prefix, colon, name = reference.partition(":")
    if colon and prefix in ("tfds", "hf"):
        return prefix, name
    if reference == "digits":
        return "digits", reference
    path = Path(reference).expanduser()
    if not path.is_dir():
        message = "is a file, not a folder" if path.exists() else "no such folder"
        allowed = "digits, tfds:NAME, hf:NAME, or a folder of images or of packed records"
        near = nearest(reference, ["digits"])
        raise DataError([Problem("data", "source", message, reference, allowed, near)])
    from nfflax.data.records import splits_in

    return "records" if splits_in(path) else "folder", str(path)


def unknown_split(source: str, split: str, known: Sequence[str]) -> DataError:
    """The error for a split that a source does not have."""
    allowed, near = ", ".join(known), nearest(split, known)
    return DataError([Problem(source, "split", "no such split", split, allowed, near)])


def need(module: str, extra: str, key: str) -> Any:
    """Import a module of an optional extra, or say which extra it is."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if (error.name or "").partition(".")[0] != package:
            raise
        message = f"needs the package {package}, which is not installed"
        allowed = f'pip install "nfflax[{extra}]"'
        raise DataError([Problem("data", "source", message, key, allowed)]) from None


def _open_digits(_: Data, name: str, split: str) -> Source:
    """scikit-learn's 1797 handwritten digits of 8 x 8 pixels.

    They come in the order of their writers, so the test split is a random part, always the same:
    all writers are in both.
    """
    if split not in ("train", "test"):
        raise unknown_split(name, split, ("train", "test"))
    digits = need("sklearn.datasets", "demo", name).load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)  # 17 grey levels
    is_test = np.zeros(len(images), bool)
    is_test[np.random.default_rng(0).permutation(len(images))[:TEST_DIGITS]] = True
    part = is_test if split == "test" else ~is_test
    return ArraySource(images[part], digits.target[part], [str(n) for n in range(10)])


def _open_folder(data: Data, name: str, split: str) -> Source:
    from nfflax.data.folder import FolderSource

    classes = Path(data.classes) if data.classes else None
    return FolderSource(Path(name), split, classes=classes, labels_of=data.train)


def _open_records(_: Data, name: str, split: str) -> Source:
    from nfflax.data.records import RecordSource

    return RecordSource(Path(name), split)


def _open_tfds(data: Data, name: str, split: str) -> Source:
    from nfflax.data.hubs import tfds_source

    return tfds_source(name, split, data.image_key, data.label_key)


def _open_hf(data: Data, name: str, split: str) -> Source:
    from nfflax.data.hubs import hf_source

    return hf_source(name, split, data.image_key, data.label_key)


_OPENERS: dict[str, Callable[[Data, str, str], Source]] = {
    "digits": _open_digits,
    "folder": _open_folder,
    "records": _open_records,
    "tfds": _open_tfds,
    "hf": _open_hf,
}
