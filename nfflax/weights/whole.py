"""Files and folders that are there in full or not at all.

Each is made beside its place, under a name of its own, and moved there when it is whole. What stops
in between, an error, a full disk or Ctrl-C, leaves the place as it was.
"""

import contextlib
import os
import secrets
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

from nfflax.weights.errors import WeightsError


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write to. It becomes `path`, replacing a file there, when the block ends well."""
    place = Path(path)
    new = _beside(place)
    with _as_weights_error(place):
        try:
            yield new
            os.replace(new, place)
        except BaseException:
            new.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def whole_folder(
    path: str | os.PathLike[str], *, overwrite: bool = False, ours: Collection[str] = ()
) -> Iterator[Path]:
    """An empty folder to fill, which becomes `path` when the block ends well.

    What stands there is treated as `require_free` says.
    """
    place = Path(os.path.abspath(path))
    require_free(place, overwrite=overwrite, ours=ours)
    new = _beside(place)
    with _as_weights_error(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        new.mkdir()
        try:
            yield new
            _move(new, place)
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise


def require_free(
    path: str | os.PathLike[str], *, overwrite: bool = False, ours: Collection[str] = ()
) -> None:
    """Raise WeightsError where something stands at `path` that must not be replaced.

    That is a file, or a folder with anything in it, unless `overwrite` is given. Where `ours` names
    what a folder written here can hold, a folder that holds anything else is never replaced.
    """
    place = Path(path)
    with _as_weights_error(place):
        present = sorted(entry.name for entry in place.iterdir()) if place.is_dir() else []
    others = [name for name in present if name not in ours] if ours else []
    if others:
        problem = f"The folder holds {', '.join(others[:3])}, which nfflax has not written there."
        raise WeightsError(str(path), [problem])
    if os.path.lexists(place) and not overwrite and (present or not place.is_dir()):
        kind = "The folder has files in it" if present else "The file exists"
        raise WeightsError(str(path), [f"{kind}. Take another name, or allow overwriting."])


def _beside(place: Path) -> Path:
    """A name that nothing has yet, in the same folder: a move there is one step."""
    return place.with_name(f".{place.name[:100]}.{secrets.token_hex(4)}.part")


def _move(new: Path, place: Path) -> None:
    """Put a folder in its place; what is there goes only when the new one has arrived."""
    if not os.path.lexists(place):
        os.replace(new, place)
        return
    old = _beside(place)
    os.replace(place, old)
    try:
        os.replace(new, place)
    except BaseException:
        os.replace(old, place)
        raise
    if old.is_dir() and not old.is_symlink():
        shutil.rmtree(old)
    else:
        old.unlink()


@contextlib.contextmanager
def _as_weights_error(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        problem = f"It cannot be written: {error.strerror or error}."
        raise WeightsError(str(place), [problem]) from error
