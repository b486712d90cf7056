"""A folder of image files, sorted into classes by subfolder or by a list of files."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from nfflax.data.errors import DataError, ImageError
from nfflax.data.sources import Record, unknown_split
from nfflax.spec.errors import Problem, nearest

_EXTENSIONS = ("jpeg", "jpg", "png", "webp", "gif", "bmp", "tif", "tiff")
IS_IMAGE = re.compile(rf"\.({'|'.join(_EXTENSIONS)})$", re.IGNORECASE)
# A line of a list: a path, and its class (a name or a number) unless that is the path's folder.
_LINE = re.compile(rf"(.+?\.(?:{'|'.join(_EXTENSIONS)}))(?:\s+(\S.*))?", re.IGNORECASE)
_MAX_BYTES = 1 << 28  # of an image file; larger ones are something else


class FolderSource:
    """Image files under `root`, of one split.

    A split is a subfolder with one folder per class, or a text file that lists image paths relative
    to `root`, each followed by its class unless that is the name of its folder.
    """

    def __init__(
        self, root: Path, split: str, *, classes: Path | None = None, labels_of: str | None = None
    ):
        """The labels follow the lines of the file `classes` (a class's folder stands first), or
        else the sorted class names of the split `labels_of` (by default, this one's)."""
        place, model = root / split, root / (labels_of or split)
        if not place.exists():
            raise unknown_split(str(root), split, splits_in(root))
        if classes is not None:
            self.class_names, folders = _read_index(classes)
        else:
            self.class_names = _class_names(model if model.exists() else place)
            folders = {name: label for label, name in enumerate(self.class_names)}
        found = (
            sorted(_images_below(place, folders, root))
            if place.is_dir()
            else _listed(place, folders)
        )
        self._root = root
        # Fixed-width bytes: a million paths are one array, cheap to send to a worker process.
        self._paths = np.array([os.fsencode(path) for path, _ in found], dtype=np.bytes_)
        self._labels = np.array([label for _, label in found], dtype=np.int32)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Record:
        path = self._root / os.fsdecode(bytes(self._paths[index]))
        try:
            if path.stat().st_size > _MAX_BYTES:
                raise ImageError(f"has more than {_MAX_BYTES} bytes: refused", str(path))
            return Record(path.read_bytes(), int(self._labels[index]), str(path))
        except OSError as error:
            raise ImageError(f"cannot be read: {error.strerror or error}", str(path)) from None


def splits_in(root: Path) -> tuple[str, ...]:
    """The subfolders and file lists that may be splits."""
    return tuple(sorted(p.name for p in root.iterdir() if p.is_dir() or p.suffix == ".txt"))


def _class_names(place: Path) -> tuple[str, ...]:
    """The class names of a split, sorted; those of a list that numbers its classes are numbers."""
    if place.is_dir():
        return tuple(sorted(entry.name for entry in os.scandir(place) if entry.is_dir()))
    names = {_class_of(line, place, number)[1] for number, line in _lines(place)}
    if all(map(str.isdigit, names)):
        return tuple(map(str, range(max(map(int, names), default=-1) + 1)))
    return tuple(sorted(names))


def _read_index(index: Path) -> tuple[tuple[str, ...], dict[str, int]]:
    """A class index: per line a folder's name and, after a space, what to call the class."""
    folders: dict[str, int] = {}
    names: list[str] = []
    problems = []
    for number, line in _lines(index):
        folder, _, title = line.partition(" ")
        if folder in folders:
            problems.append(Problem(str(index), f"line {number}", "stands there twice", folder))
        folders.setdefault(folder, len(folders))
        names.append(title.strip() or folder)
    if not folders:
        problems.append(Problem(str(index), "", "names no classes"))
    if problems:
        raise DataError(problems)
    return tuple(names), folders


def _images_below(place: Path, folders: dict[str, int], root: Path) -> Iterator[tuple[str, int]]:
    """Path relative to root, and label, of every image file in every class's folder."""
    found = {entry.name for entry in os.scandir(place) if entry.is_dir()}
    unknown = sorted(found - folders.keys())
    if unknown:
        message = "is no class of the index"
        raise DataError(
            [
                Problem(str(place / name), "", message, nearest=nearest(name, folders))
                for name in unknown
            ]
        )
    for folder in found:
        for parent, _, files in os.walk(place / folder, followlinks=True):
            below = os.path.relpath(parent, root)
            for file in files:
                if IS_IMAGE.search(file) and not file.startswith("."):
                    yield os.path.join(below, file), folders[folder]


def _listed(listing: Path, folders: dict[str, int]) -> list[tuple[str, int]]:
    """Path and label of every line of a list of files."""
    found, problems = [], []
    for number, line in _lines(listing):
        path, name = _class_of(line, listing, number)
        label = folders.get(name, int(name) if name.isdigit() else -1)
        if not 0 <= label < len(folders):
            place = f"line {number}"
            near = nearest(name, folders)
            problems.append(Problem(str(listing), place, "no such class", name, nearest=near))
        found.append((path, label))
    if problems:
        raise DataError(problems)
    return found


def _class_of(line: str, listing: Path, number: int) -> tuple[str, str]:
    match = _LINE.fullmatch(line)
    if not match:
        allowed = f"a path that ends in {', '.join(_EXTENSIONS)}, and perhaps a class"
        message = "names no image file"
        raise DataError([Problem(str(listing), f"line {number}", message, line, allowed)])
    path, name = match.groups()
    return path, name or Path(path).parent.name


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """The lines that say something, with their numbers."""
    try:
        text = file.read_text("utf-8")
    except OSError as error:
        message = f"cannot be read: {error.strerror or error}"
        raise DataError([Problem(str(file), "", message)]) from None
    except UnicodeDecodeError as error:
        raise DataError([Problem(str(file), "", f"is not UTF-8 text: {error.reason}")]) from None
    stripped = ((number, line.strip()) for number, line in enumerate(text.splitlines(), 1))
    return ((number, line) for number, line in stripped if line)
