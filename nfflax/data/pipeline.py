"""Batches for one host. One integer, the step, is the position in the stream.

    shuffle -> repeat -> decode and augment -> this host's rows -> pieces -> workers -> batches

Everything before the workers is random access over global positions, each with its own random
numbers, so the stream is the same for any number of workers and hosts, and starts at any step.
Workers make pieces of a batch, not batches: the first batch comes soon, and memory stays bounded.
"""

import functools
import gc
import multiprocessing
import os
import threading
from collections.abc import Sequence
from typing import Any, TypeVar

import grain
import numpy as np

from nfflax.data.errors import DataError, ImageError
from nfflax.data.sources import Source
from nfflax.data.views import EvalView, TrainView
from nfflax.spec.data import Data
from nfflax.spec.errors import Problem

Batch = dict[str, np.ndarray]
Row = dict[str, Any]  # of a batch: arrays and numpy scalars
T = TypeVar("T")

MAX_SKIPPED = 64  # bad images in a row: by then the data is wrong, not an image
_FEW = 1 << 16  # images
_PIECE = 32  # images that a worker prepares at a time, at most


class Batches:
    """An endless (training) or finite (evaluation) iterator of batches; close it when done.

    Used in a `with` statement it closes itself.
    """

    def __init__(self, dataset: Any, steps: int | None, *, uses_processes: bool):
        self._iterator = iter(dataset)
        self._iterator.start_prefetch()
        self._steps = steps
        self._uses_processes = uses_processes
        self.skipped = 0
        """Images left out so far because they could not be decoded."""

    def __len__(self) -> int:
        """How many batches an evaluation has."""
        if self._steps is None:
            raise TypeError("training batches do not end")
        return self._steps

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch:
        try:
            batch = next(self._iterator)
        except (
            DataError
        ) as error:  # its traceback would keep the workers' memory, and tells nothing
            raise error.with_traceback(None) from None
        self.skipped += int(batch.pop("skipped").sum())
        return batch

    def close(self) -> None:
        """Stop the workers and free their memory."""
        self._iterator.close()
        if self._uses_processes:
            gc.collect()  # grain's iterators over processes hold shared memory in reference cycles

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def train_batches(
    source: Source,
    view: TrainView,
    *,
    batch_size: int,
    seed: int = 0,
    step: int = 0,
    partners: bool = False,
    host: int = 0,
    hosts: int = 1,
    data: Data = Data(),  # noqa: B008 (frozen)
) -> Batches:
    """This host's rows of the batches from `step` on: uint8 `images` (NHWC), int32 `labels`.

    Position p of the stream is image p mod N of a new permutation in every epoch; nothing is
    dropped, and a batch may straddle two epochs. With `partners` each row has a second image and
    label, `mix_images` and `mix_labels`, never the row's own image; a batch of B then draws 2B.
    """
    rows = _rows_of(batch_size, host, hosts)
    if partners and len(source) < 2:
        raise DataError([Problem("data", "partners", "need a source of at least 2 images")])
    # Seeds are spelled out: grain derives its own from the shape of the pipeline.
    shuffle_seed, view_seed = (int(s) for s in np.random.SeedSequence(seed).generate_state(2))
    indices = _shuffled(len(source), shuffle_seed).repeat()
    if partners:
        indices = indices.batch(2, drop_remainder=True)
    examples = indices.random_map(_TrainExample(source, view, data.on_error), seed=view_seed)
    return _batches(examples, rows, batch_size, step, None, data)


def eval_batches(
    source: Source,
    view: EvalView,
    *,
    batch_size: int,
    host: int = 0,
    hosts: int = 1,
    data: Data = Data(),  # noqa: B008 (frozen)
) -> Batches:
    """One pass in the source's order: `images`, `labels`, and bool `valid`.

    The last batch is filled up with zeros, which are not valid, as a skipped image is not; so every
    batch has the same shape on every host, and sums over valid rows are exact.
    """
    rows = _rows_of(batch_size, host, hosts)
    steps = -(-len(source) // batch_size)
    examples = grain.MapDataset.range(steps * batch_size).map(
        _EvalExample(source, view, data.on_error)
    )
    return _batches(examples, rows, batch_size, 0, steps, data)


def _rows_of(batch_size: int, host: int, hosts: int) -> range:
    """The rows of the global batch that a host has: contiguous, so that shards of it lie whole."""
    problems = []
    if batch_size < 1 or batch_size % hosts:
        allowed = f"a multiple of the number of hosts, {hosts}"
        problems.append(Problem("data", "batch_size", "does not divide", batch_size, allowed))
    if not 0 <= host < hosts:
        problems.append(Problem("data", "host", "is no host", host, f"0 to {hosts - 1}"))
    if problems:
        raise DataError(problems)
    rows = batch_size // hosts
    return range(host * rows, (host + 1) * rows)


def _batches(
    examples: Any,
    rows: range,
    batch_size: int,
    step: int,
    steps: int | None,
    data: Data,
) -> Batches:
    """The part that training and evaluation share: from examples by position to batches."""
    workers = _cores() if data.workers is None else data.workers
    piece = max(n for n in range(1, min(_PIECE, len(rows)) + 1) if len(rows) % n == 0)
    per_batch = len(rows) // piece
    # Nothing is left to drop, but grain computes other lengths in floats, which overflow.
    host_rows = _HostRows(examples, batch_size, rows)
    pieces = host_rows.batch(piece, drop_remainder=True, batch_fn=_stacked)
    pieces = pieces[step * per_batch :]
    ahead = max(data.prefetch * per_batch, workers)
    processes = workers if data.worker_kind == "process" else 0
    threads = workers - processes
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead if threads else 0)
    stream = pieces.to_iter_dataset(options)
    if processes:
        _make_flags_readable()
        each = -(-ahead // processes)
        options = grain.MultiprocessingOptions(processes, each)
        stream = stream.mp_prefetch(options, worker_init_fn=_end_with_parent)
    if processes or per_batch > 1:
        stream = stream.batch(per_batch, batch_fn=_joined)
    return Batches(stream, steps, uses_processes=bool(processes))


def _shuffled(count: int, seed: int) -> grain.MapDataset[int]:
    """0 to count - 1 in an order that is new in every epoch."""
    if count < _FEW:
        return _FewShuffled(count, seed)
    return grain.MapDataset.range(count).shuffle(seed=seed)


class _FewShuffled(grain.MapDataset[int]):
    """Whole permutations, kept: grain's shuffle takes 5 ms per image of a source of two.

    Grain computes each position by itself, which suits millions of images, but does so by walking
    through a range of 2^16 until it meets one of those there are.
    """

    def __init__(self, count: int, seed: int):
        super().__init__()
        self._count, self._seed = count, seed

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        epoch, place = divmod(index, self._count)
        return int(_permutation(self._count, self._seed, epoch)[place])


@functools.lru_cache(maxsize=8)
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)


class _HostRows(grain.MapDataset[T]):
    """Of every global batch of the parent, the given rows."""

    def __init__(self, parent: grain.MapDataset[T], batch_size: int, rows: range):
        super().__init__(parent)
        self._batch_size, self._rows = batch_size, rows

    def __len__(self) -> int:
        return len(self._parent) // self._batch_size * len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        step, row = divmod(index, len(self._rows))
        return self._parent[step * self._batch_size + self._rows[row]]


class _TrainExample(grain.transforms.RandomMap):
    """From one index, or an image's and its partner's, to one row of a training batch."""

    def __init__(self, source: Source, view: TrainView, on_error: str):
        self._source, self._view, self._on_error = source, view, on_error

    def random_map(self, element: Any, rng: np.random.Generator) -> Row:
        index, *partner = np.atleast_1d(element).tolist()
        index, row = self._first_good(index, rng)
        if partner:
            _, other = self._first_good(partner[0], rng, avoid=index)
            row |= {
                "mix_images": other["images"],
                "mix_labels": other["labels"],
                "skipped": row["skipped"] + other["skipped"],
            }
        return row

    def _first_good(
        self, index: int, rng: np.random.Generator, avoid: int | None = None
    ) -> tuple[int, Row]:
        """The view of the first image from this one on that is good and not the one to avoid."""
        skipped = 0
        while True:
            if index != avoid:
                try:
                    return index, _row(self._source, index, skipped, self._view, rng)
                except ImageError as error:
                    skipped += 1
                    if self._on_error == "raise" or skipped == MAX_SKIPPED:
                        raise _as_data_error(error, skipped) from None
            index = (index + 1) % len(self._source)


class _EvalExample(grain.transforms.Map):
    """From one index to one row of an evaluation batch; past the end there is nothing valid."""

    def __init__(self, source: Source, view: EvalView, on_error: str):
        self._source, self._view, self._on_error = source, view, on_error

    def map(self, element: int) -> Row:
        skipped = 0
        if element < len(self._source):
            try:
                row = _row(self._source, element, skipped, self._view)
                return row | {"valid": np.bool_(True)}
            except ImageError as error:
                skipped = 1
                if self._on_error == "raise":
                    raise _as_data_error(error, skipped) from None
        shape = (self._view.resolution, self._view.resolution, self._view.channels)
        return {
            "images": np.zeros(shape, np.uint8),
            "labels": np.int32(0),
            "skipped": np.int32(skipped),
            "valid": np.bool_(False),
        }


def _row(source: Source, index: int, skipped: int, view: Any, *rng: np.random.Generator) -> Row:
    """One image as the view shows it, with its label."""
    name = f"image {index}"
    try:
        record = source[index]
        name = record.name
        image = view(record.image, *rng)
    except ImageError as error:
        raise ImageError(error.reason, error.name or name) from None
    return {"images": image, "labels": np.int32(record.label), "skipped": np.int32(skipped)}


def _as_data_error(error: ImageError, skipped: int) -> DataError:
    in_a_row = f" (and {skipped - 1} before it are no better)" if skipped > 1 else ""
    allowed = "" if in_a_row else 'data.on_error = "skip" leaves such images out'
    return DataError([Problem(error.name, "", error.reason + in_a_row, allowed=allowed)])


def _stacked(rows: Sequence[Row]) -> Batch:
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def _joined(pieces: Sequence[Batch]) -> Batch:
    """Pieces as one batch, copied out of the workers' shared memory."""
    return {key: np.concatenate([np.asarray(p[key]) for p in pieces]) for key in pieces[0]}


def _cores() -> int:
    """How many CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _make_flags_readable() -> None:
    """Outside of absl apps nobody parses the flags that grain's worker processes read."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def _end_with_parent(*_: int) -> None:
    """In a worker process: end when the training process was killed and could not say so."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
