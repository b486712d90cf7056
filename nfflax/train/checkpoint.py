"""A run's checkpoints: saved in the background, kept by rule, restored from the newest good one.

Orbax's CheckpointManager does the work of saving and deleting, and of coordinating processes. What
is on disk is defined in snapshot.py.
"""

import contextlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self, TypeVar, cast

import jax
import orbax.checkpoint as ocp

from nfflax.spec.errors import Problem
from nfflax.train.agree import all_hold, by_first
from nfflax.train.errors import CheckpointError, TrainError
from nfflax.train.snapshot import (
    ITEMS,
    DamagedError,
    Record,
    cause,
    lacks,
    misfits,
    quiet,
    read_arrays,
    read_record,
    record_of,
    stay_quiet,
    to_save,
    verify,
)

FOLDER = "checkpoints"
"""Where a run's checkpoints are, in its folder: one folder each, called by the step."""

State = Mapping[str, Any]
T = TypeVar("T")
Damage = tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class Restored:
    """A training state from disk."""

    state: Any
    """The arrays, in the structure that was asked for."""
    step: int
    metrics: Mapping[str, float]
    """How good the network was found to be before this was saved; empty where that was not done."""
    damaged: Damage
    """Newer checkpoints that are no good, and why."""


@dataclass(frozen=True)
class Weights:
    """What inference needs, from disk."""

    params: Any
    """The parameters: their moving average, where the run keeps one."""
    stats: Any
    """Statistics of BatchNorm; empty for all others."""
    about: Mapping[str, Any]
    """What the run said of itself."""
    step: int
    damaged: Damage
    """Newer checkpoints that are no good, and why."""


class Checkpoints:
    """The checkpoints in a run's folder.

        with Checkpoints(workdir, keep=2, keep_best=1) as checkpoints:
            restored = checkpoints.restore(abstract_state)
            ...
            checkpoints.save(step, state, about, {"top1": 0.7})

    One trainer at a time may open a folder: opening it removes what an earlier one left half
    written. In a run of several processes, all make the same calls.
    """

    def __init__(self, workdir: Path, *, keep: int, keep_best: int):
        """`keep` of the newest are kept and, besides, `keep_best` of those with the best top1."""
        self.folder = Path(workdir).absolute() / FOLDER
        self._keeper = _Keeper(keep, keep_best)
        self._under_way: int | None = None
        self._quiet = contextlib.ExitStack()
        self._quiet.enter_context(quiet())
        try:
            by_first(lambda: self.folder.mkdir(parents=True, exist_ok=True))
            self._sweep()
            self._manager = ocp.CheckpointManager(
                self.folder,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=self._keeper,
                    async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
                    lightweight_initialize=True,  # a damaged file must not keep the folder shut
                ),
            )
        except Exception as error:
            self._quiet.close()
            message = f"cannot be opened: {cause(error)}"
            raise CheckpointError([Problem(str(self.folder), "", message)]) from error
        for step in by_first(lambda: _numbered(self.folder)):
            try:
                self._keeper.add(step, read_record(self._at(step)).metrics)
            except DamagedError:
                self._keeper.damaged.add(step)

    def steps(self) -> list[int]:
        """The steps of which there is a whole checkpoint, as far as is known without reading it."""
        found = _numbered(self.folder)
        return [s for s in found if s not in self._keeper.damaged and not lacks(self._at(s))]

    def save(
        self,
        step: int,
        state: State,
        about: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Save a state in the background; it may be donated as soon as this returns.

        `about` is JSON: the run, for who reads the checkpoint without its run's folder. A step that
        was saved already, with the same numbers, is left as it is. Raises TrainError where this
        save or the one before it fails, on a full disk for instance.
        """
        self.wait()
        record = record_of(step, state, about, metrics or {})
        if by_first(lambda: self._holds(record)):
            if record.metrics:  # new ones are kept in mind; to save again would risk what is there
                self._keeper.add(step, record.metrics)
            return
        self._under_way = step
        try:
            if step in self._manager.all_steps():
                self._manager.delete(step)
            self._keeper.add(step, record.metrics)
            self._manager.save(step, args=to_save(state, record), force=True)
        except Exception as error:
            raise self._failed(error) from error

    def would_be_best(self, metrics: Mapping[str, float]) -> bool:
        """Whether a checkpoint with these metrics would be kept as the best one."""
        known = self._keeper.top1.values()
        return bool(self._keeper.keep_best) and metrics["top1"] > max(known, default=-1.0)

    def wait(self) -> None:
        """Wait for the save that is under way; raises TrainError when it fails."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._failed(error) from error
        self._under_way = None

    def restore(self, abstract: State, step: int | None = None) -> Restored | None:
        """The newest good checkpoint, or that of `step`; None where there never was one.

        `abstract` holds ShapeDtypeStructs with the shardings to restore to, of any mesh. Raises
        CheckpointError when no checkpoint is good, and when one does not fit `abstract`: it is of
        another network or optimiser then.
        """
        self.wait()
        there = by_first(lambda: _numbered(self.folder))
        if step is not None and step not in there:
            listed = ", ".join(map(str, there)) or "none"
            raise CheckpointError(
                [Problem(str(self.folder), "", "there is no such checkpoint", step, listed)]
            )
        if not there:
            return None
        chosen = there[::-1] if step is None else [step]
        (state, record), damaged = _newest_good(
            [self._at(s) for s in chosen],
            lambda folder, record: (_state(folder, record, abstract), record),
        )
        self._keeper.damaged |= {number for number, _ in damaged}
        return Restored(state, record.step, record.metrics, damaged)

    def close(self) -> None:
        """Wait for the save that is under way, and let go of the folder."""
        try:
            self.wait()
        finally:
            with contextlib.suppress(Exception):  # what matters, `wait` has told
                self._manager.close()
            self._sweep()  # again: threads of a save that failed may have gone on writing
            self._quiet.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        try:
            self.close()
        except TrainError as failure:
            if error is None:
                raise
            error.add_note(str(failure))  # the first error is the one to report

    def _at(self, step: int) -> Path:
        return self.folder / str(step)

    def _holds(self, record: Record) -> bool:
        """Whether these very arrays are on disk already."""
        if record.step not in self.steps():
            return False
        try:
            return read_record(self._at(record.step)).leaves == record.leaves
        except DamagedError:
            return False

    def _sweep(self) -> None:
        """Remove what a save that failed, or a process that was killed, has left."""
        if jax.process_index() == 0:
            for leftover in self.folder.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(leftover, ignore_errors=True)

    def _failed(self, error: Exception) -> TrainError:
        """What to raise for a save that failed, of which nothing is left behind."""
        step, self._under_way = self._under_way, None
        stay_quiet()
        self._sweep()
        steps = self.steps()
        if step in steps:
            what = "was saved, but older ones could not be removed from"
        else:
            what = "could not be saved in"
        kept = f"The last good one is that of step {steps[-1]}." if steps else "There is no other."
        return TrainError(
            f"the checkpoint of step {step} {what} {self.folder}: {cause(error)}. {kept}"
        )


@dataclass
class _Keeper(ocp.checkpoint_managers.PreservationPolicy):
    """Which checkpoints stay: the newest, and those with the best top1. Damaged ones never do."""

    keep: int
    keep_best: int
    top1: dict[int, float] = field(default_factory=dict)
    damaged: set[int] = field(default_factory=set)

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        self.damaged.discard(step)
        self.top1.pop(step, None)
        if "top1" in metrics:
            self.top1[step] = metrics["top1"]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        good = sorted({checkpoint.step for checkpoint in checkpoints} - self.damaged)
        ranked = sorted(self.top1.keys() & good, key=lambda step: (self.top1[step], step))
        kept = {*good[-self.keep :], *ranked[max(len(ranked) - self.keep_best, 0) :]}
        return [checkpoint.step in kept for checkpoint in checkpoints]


def load_weights(path: Path | str, abstract: State | None = None) -> Weights:
    """The weights of a run's folder, from its newest good checkpoint, or of one checkpoint's.

    They come as NumPy arrays in nested dicts or, with `abstract`, a tree {"params", "stats"} of
    ShapeDtypeStructs, in its structure and onto its shardings. Raises CheckpointError when no
    checkpoint is good, or when `abstract` is of another network. In a run of several processes all
    call this together.
    """
    folders = by_first(lambda: _checkpoint_folders(Path(path).absolute()))

    def read(folder: Path, record: Record) -> Weights:
        kind = "ema" if record.has_average else "params"
        if abstract is None:
            wanted = record.weights.abstract
        else:
            wanted = {kind: abstract["params"], "stats": abstract["stats"]}
        arrays = _state(folder, record.weights, wanted)
        return Weights(arrays[kind], arrays.get("stats", {}), record.about, record.step, ())

    weights, damaged = _newest_good(folders, read)
    return replace(weights, damaged=damaged)


def _newest_good(folders: Sequence[Path], read: Callable[[Path, Record], T]) -> tuple[T, Damage]:
    """What `read` gets from the first folder that is not damaged, and those that are."""
    damaged: list[tuple[Path, str]] = []
    for folder in folders:
        try:
            record = _together(lambda: read_record(folder))  # noqa: B023 - called at once
            found = read(folder, record)
        except DamagedError as error:
            damaged.append((folder, str(error)))
        else:
            return found, tuple((int(folder.name), reason) for folder, reason in damaged)
    raise CheckpointError([Problem(str(folder), "", reason) for folder, reason in damaged])


def _state(folder: Path, record: Record, abstract: Any) -> Any:
    """The verified arrays that `abstract` describes."""
    if problems := misfits(folder, record, abstract):
        raise CheckpointError(problems)
    arrays = _together(lambda: read_arrays(folder, record, abstract))
    _together(lambda: verify(record, arrays))
    return arrays


def _together(read: Callable[[], T]) -> T:
    """What `read` returns; DamagedError on all processes where it raises that on one."""
    try:
        result, damage = read(), None
    except DamagedError as error:
        result, damage = None, error
    if not all_hold(damage is None):
        raise damage or DamagedError("cannot be read by another process of this run")
    return cast(T, result)


def _checkpoint_folders(path: Path) -> list[Path]:
    """The checkpoints that a path stands for, the newest first."""
    if len(lacks(path)) < len(ITEMS):
        return [path]
    found = [path / FOLDER / str(step) for step in reversed(_numbered(path / FOLDER))]
    if not found:
        message = "holds no checkpoint" if path.exists() else "does not exist"
        allowed = f"a run's folder, or one of its checkpoints: RUN/{FOLDER}/STEP"
        raise CheckpointError([Problem(str(path), "", message, allowed=allowed)])
    return found


def _numbered(folder: Path) -> list[int]:
    """The steps that a folder has folders for, whatever they hold."""
    if not folder.is_dir():
        return []
    names = [entry.name for entry in folder.iterdir() if entry.is_dir()]
    return sorted(int(name) for name in names if name.isdecimal() and name == str(int(name)))
