"""One checkpoint on disk: what its folder holds, and how what comes back is known to be right.

Three items. `params` is all that inference needs: the parameters, or their moving average where
there is one, and the statistics. `train` is the rest of the state. `about` is JSON: what the writer
says of the run, and each array's shape, dtype and fingerprint, with a checksum over all of it.
Orbax writes and reads the items. Arrays are stored under their plain paths, so that no class of
optax is part of the format.
"""

import contextlib
import functools
import hashlib
import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path as Folder
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from nfflax.optim.roles import Path, dotted, leaves_by_path
from nfflax.spec.errors import Problem
from nfflax.train.fingerprint import fingerprints

T = TypeVar("T")
ITEMS = ("params", "train", "about")
_LOGGERS = (logging.getLogger("absl"), logging.getLogger("asyncio"))  # that Orbax writes to
_SHOWN = 200  # characters of what Orbax says; some of its messages run over pages


class DamagedError(Exception):
    """A checkpoint that is not what was saved."""


class Leaf(NamedTuple):
    """What is known of an array before it is read."""

    dtype: str
    shape: tuple[int, ...]
    fingerprint: str


class Record(NamedTuple):
    """The `about` of a checkpoint."""

    step: int
    about: Mapping[str, Any]
    """What the writer says of the run."""
    metrics: Mapping[str, float]
    """How good the network is at this step, as far as that was known."""
    leaves: Mapping[str, Leaf]
    """The arrays of the training state, by dotted path."""

    @property
    def has_average(self) -> bool:
        """Whether `params` holds a moving average."""
        return any(name.startswith("ema.") for name in self.leaves)

    @property
    def weights(self) -> "Record":
        """The same, of the arrays that inference needs."""
        starts = ("ema." if self.has_average else "params.", "stats.")
        chosen = {name: leaf for name, leaf in self.leaves.items() if name.startswith(starts)}
        return self._replace(leaves=chosen)

    def place(self, path: Path) -> tuple[str, Path]:
        """The item that holds an array of the training state, and its path in there."""
        kind, *rest = path
        if kind == ("ema" if self.has_average else "params"):
            return "params", ("params", *map(str, rest))
        return "params" if kind == "stats" else "train", tuple(map(str, path))

    @property
    def abstract(self) -> dict[Any, Any]:
        """The arrays as shapes and dtypes, in nested dicts; a list's places are numbers."""
        places = {
            tuple(int(key) if key.isdigit() else key for key in name.split(".")): leaf
            for name, leaf in self.leaves.items()
        }
        return _nested({k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in places.items()})


def record_of(
    step: int, state: Any, about: Mapping[str, Any], metrics: Mapping[str, float]
) -> Record:
    """The record of a training state that is about to be saved."""
    marks = fingerprints(state)
    leaves = {
        dotted(path): Leaf(str(leaf.dtype), tuple(leaf.shape), marks[path])
        for path, leaf in leaves_by_path(state).items()
    }
    return Record(step, about, {name: float(value) for name, value in metrics.items()}, leaves)


def to_save(state: Any, record: Record) -> ocp.args.Composite:
    """The items of a checkpoint, as Orbax takes them."""
    items = _by_item(record, leaves_by_path(state))
    arrays = {item: ocp.args.PyTreeSave(_nested(leaves)) for item, leaves in items.items()}
    content = record._asdict()
    about = ocp.args.JsonSave(content | {"sha256": _checksum(content)})
    return ocp.args.Composite(about=about, **arrays)


def lacks(folder: Folder) -> list[str]:
    """The items that are missing in a checkpoint's folder."""
    return [item for item in ITEMS if not (folder / item).is_dir()]


def read_record(folder: Folder) -> Record:
    """The record of the checkpoint in this folder; raises DamagedError."""
    if missing := lacks(folder):
        raise DamagedError(f"lacks {' and '.join(missing)}")
    return _undamaged("`about` cannot be read", lambda: _parsed(folder / "about"))


def misfits(folder: Folder, record: Record, abstract: Any) -> list[Problem]:
    """Every array that the checkpoint has and `abstract` has not, or not alike, or the reverse."""
    wanted = {dotted(path): leaf for path, leaf in leaves_by_path(abstract).items()}
    problems = []
    for name in sorted(wanted.keys() | record.leaves.keys()):
        if name not in record.leaves:
            message = f"the checkpoint lacks this array, {_described(wanted[name])}"
        elif name not in wanted:
            message = f"this run has no such array, {_described(record.leaves[name])}"
        elif (there := _described(record.leaves[name])) != (here := _described(wanted[name])):
            message = f"is {there} in the checkpoint, and {here} in this run"
        else:
            continue
        problems.append(Problem(str(folder), name, message))
    return problems


def read_arrays(folder: Folder, record: Record, abstract: Any) -> Any:
    """The arrays that `abstract` describes, not yet verified; raises DamagedError.

    A leaf with a sharding comes onto its devices, one without as a NumPy array.
    """
    wanted = leaves_by_path(abstract)
    items = _by_item(record, wanted).items()

    def read() -> list[Any]:
        found = {item: _restored(folder / item, leaves) for item, leaves in items if leaves}
        return [found[item][inside] for item, inside in map(record.place, wanted)]

    arrays = _undamaged("its arrays cannot be read", read)
    return jax.tree.unflatten(jax.tree.structure(abstract), arrays)


def verify(record: Record, arrays: Any) -> None:
    """Compare arrays that were read with the record; raises DamagedError."""
    marks = {dotted(path): mark for path, mark in fingerprints(arrays).items()}
    wrong = [name for name, mark in marks.items() if mark != record.leaves[name].fingerprint]
    if wrong:
        others = f" and {len(wrong) - 1} other arrays" if len(wrong) > 1 else ""
        raise DamagedError(f"{wrong[0]}{others} came back with other numbers than were saved")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without Orbax's messages: what they say that matters, its exceptions say too."""

    def is_of_others(message: logging.LogRecord) -> bool:  # a new one each time, as uses overlap
        return _is_of_others(message)

    _ignore_late_complaints()
    for logger in _LOGGERS:
        logger.addFilter(is_of_others)
    try:
        yield
    finally:
        for logger in _LOGGERS:
            logger.removeFilter(is_of_others)


def stay_quiet() -> None:
    """From now on: of a save that has failed, some threads may fail, and say so, later."""
    for logger in _LOGGERS:
        logger.addFilter(_is_of_others)


def _is_of_others(message: logging.LogRecord) -> bool:
    """Whether a message, and the error that it tells of, have not come from Orbax."""
    error = message.exc_info[1] if message.exc_info else None
    frames = traceback.extract_tb(error.__traceback__) if error else []
    files = [message.pathname, *(frame.filename for frame in frames)]
    return not any("orbax" in Folder(file).parts for file in files)


@functools.cache
def _ignore_late_complaints() -> None:
    """Do not print what comes of a failure that has long been dealt with.

    At the first failure Orbax closes the event loop that TensorStore's threads report to, and drops
    the coroutines that wait for them. Python prints both, at any time after.
    """
    before = sys.unraisablehook

    def pass_on(unraisable: Any) -> None:
        is_loop = unraisable.object is None and str(unraisable.exc_value) == "Event loop is closed"
        code = getattr(unraisable.object, "cr_code", None)
        is_dropped = code is not None and "orbax" in Folder(code.co_filename).parts
        if not is_loop and not is_dropped:
            before(unraisable)

    sys.unraisablehook = pass_on


def cause(error: BaseException) -> str:
    """What went wrong, in one line: what the operating system says, if it was that."""
    chain, link = [error], error
    while link := link.__cause__ or link.__context__:
        chain.append(link)
    for link in chain:
        if isinstance(link, OSError) and link.strerror:
            return link.strerror
    text = str(error).strip()
    if code := re.search(r"os_error_code='(\d+)'", text):  # TensorStore, which writes the arrays
        return os.strerror(int(code[1]))
    line = (text.splitlines() or [type(error).__name__])[0]
    return line if len(line) <= _SHOWN else f"{line[:_SHOWN]}…"


def _undamaged(what: str, read: Callable[[], T]) -> T:
    """What `read` returns. All that it raises is damage, as Orbax's errors have no common type."""
    try:
        with quiet():
            return read()
    except Exception as error:
        raise DamagedError(f"{what}: {cause(error)}") from error


def _parsed(folder: Folder) -> Record:
    content = dict(ocp.JsonCheckpointHandler().restore(epath.Path(folder)))
    if content.pop("sha256", "") != _checksum(content):
        raise ValueError("its checksum is wrong")
    leaves = {k: Leaf(d, tuple(s), mark) for k, (d, s, mark) in content.pop("leaves").items()}
    return Record(leaves=leaves, **content)


def _restored(folder: Folder, leaves: Mapping[Path, jax.ShapeDtypeStruct]) -> dict[Path, Any]:
    arguments = ocp.args.PyTreeRestore(
        _nested(leaves), restore_args=_nested({k: _target(leaf) for k, leaf in leaves.items()})
    )
    handler = ocp.PyTreeCheckpointHandler()
    try:
        return leaves_by_path(handler.restore(epath.Path(folder), args=arguments))
    finally:
        handler.close()


def _target(leaf: jax.ShapeDtypeStruct) -> ocp.RestoreArgs:
    if leaf.sharding is None:
        return ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype)
    return ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype)


def _by_item(record: Record, leaves: Mapping[Path, Any]) -> dict[str, dict[Path, Any]]:
    """Leaves of the training state by the item that holds them, and by their paths in there."""
    items: dict[str, dict[Path, Any]] = {"params": {}, "train": {}}
    for path, leaf in leaves.items():
        item, inside = record.place(path)
        items[item][inside] = leaf
    return items


def _nested(leaves: Mapping[Path, Any]) -> dict[Any, Any]:
    tree: dict[Any, Any] = {}
    for path, leaf in leaves.items():
        *above, last = path
        branch = tree
        for key in above:
            branch = branch.setdefault(key, {})
        branch[last] = leaf
    return tree


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _described(leaf: Any) -> str:
    return f"{leaf.dtype} {list(leaf.shape)}"
