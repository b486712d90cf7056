"""Reads the state dict in a file of torch.save's, without torch, and executes nothing in it.

The file is a state dict, or a training checkpoint around one. Its pickle runs on the machine of
nfflax.weights.pickle_machine, where a tensor becomes a note of which numbers it is made of. Only
the tensors of the state dict are then made, as views of the mapped file.
"""

import functools
import mmap
import os
import re
from dataclasses import dataclass
from math import prod
from typing import Any, Self

import ml_dtypes
import numpy as np

from nfflax.weights.pickle_machine import (
    LONG,
    NUMPY,
    RefusedError,
    StandIn,
    StandIns,
    array_of,
    mapped,
    refusal,
    run,
    shown,
)
from nfflax.weights.torch_archive import MAGIC_BYTES, Archive, Storage, open_archive

# Where training checkpoints keep their state dict. An average comes before what it averages, in
# the order of timm (timm/models/_helpers.py, load_state_dict); `net` is older code's.
_HOLDERS = ("state_dict_ema", "model_ema", "state_dict", "model", "net")

# What DistributedDataParallel and torch.compile put before each name.
_WRAPPERS = ("module.", "_orig_mod.")

# Tensors may share storages, and so take more than the file does; but not many times more.
_SHARED, _SMALL = 8, 2**20

_AXES = 32  # all that numpy 1 can have

_STRANGERS = {
    rb".{257}ustar": "This is a tar archive, as torch's first releases wrote. Load it with torch,"
    " and save its state dict again.",
    rb"\x1f\x8b|BZh|\xfd7zXZ": "The file is compressed. Decompress it first.",
    rb"\x93NUMPY": "This is an array of numpy's, and no file of torch.save's.",
    rb"\x89HDF": "This is an HDF5 file, such as Keras writes, and no file of torch.save's.",
    rb"version https://git-lfs": "This is a Git LFS pointer in place of the file. Fetch the file.",
    rb"\x08[\x00-\x20]\x12": "This is an ONNX model, and no file of torch.save's.",
    # A Haiku pickle, say. A pickle by torch opens with a number; a zip archive is judged within.
    rb"(?!PK)(?=\x80[\x02-\x05])(?!.{,16}" + re.escape(MAGIC_BYTES) + rb")": (
        "This is a pickle that torch.save did not write, such as DeepMind's weights for Haiku."
        " Give those to load_deepmind."
    ),
    rb"(?!PK\x03\x04|\x80[\x02-\x05])": "This is no file of torch.save's.",
}

_ADVICE = (
    "State dicts of plain tensors and timm's training checkpoints need no such thing. If you trust"
    " the file, save its state dict alone with torch; else leave it."
)


def read_torch_pickle(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The state dict in a .pth, .pt or .bin file, as read-only arrays. Else: WeightsError.

    Of a training checkpoint it is the averaged weights where there are any. The prefixes of
    DistributedDataParallel and torch.compile are gone. bfloat16 is ml_dtypes'. The arrays are the
    mapped file's bytes: copy them before you write to the file.
    """
    with mapped(path, _STRANGERS) as file:
        archive = open_archive(file, _load)
        tensors = _state_dict(archive.saved)
        total = sum(tensor.nbytes for tensor in tensors.values())
        if total > max(_SHARED * len(file), _SMALL):
            raise refusal(f"A state dict of {total} bytes in a file of {len(file)}")
        return {
            name: tensor.array(archive) if isinstance(tensor, Tensor) else tensor
            for name, tensor in tensors.items()
        }


def _load(program: bytes | mmap.mmap) -> tuple[Any, dict[str, Storage]]:
    storages: dict[str, Storage] = {}

    def find_storage(pid: Any) -> Storage:
        storage = _storage(pid)
        if storages.setdefault(storage.key, storage) != storage:
            raise ValueError(f"two kinds of storage under the key {shown(storage.key)}")
        return storage

    try:
        return run(program, _STAND_INS, _OPERATIONS | {"BINPERSID": find_storage}), storages
    except RefusedError as error:
        raise RefusedError(f"{error} {_ADVICE}") from None


def _state_dict(saved: Any) -> dict[str, "Tensor | np.ndarray"]:
    """The tensors by name. What else lies between them, such as an epoch's number, stays out."""
    mappings = [saved, *(saved.get(key) for key in _HOLDERS)] if isinstance(saved, dict) else []
    # The holders first: a checkpoint may have a tensor or two beside them.
    for mapping in [*mappings[1:], *mappings[:1]]:
        tensors = _tensors(mapping) if isinstance(mapping, dict) else {}
        if tensors:
            return tensors
    held = shown(saved)
    if isinstance(saved, dict):
        entries = [f"{shown(key)}: {shown(value)}" for key, value in list(saved.items())[:8]]
        held = f"a dict of {len(saved)} ({', '.join(entries)})"
    where = ", ".join(map(repr, _HOLDERS))
    raise RefusedError(f"The file holds {held}, and no state dict by itself or under {where}.")


def _tensors(mapping: dict[Any, Any]) -> dict[str, "Tensor | np.ndarray"]:
    tensors = {}
    for key, value in mapping.items():
        tensor = value if isinstance(value, Tensor) else array_of(value)
        if tensor is None:
            continue
        if not isinstance(key, str):
            raise RefusedError(f"A tensor's name is {shown(key)}, not text of up to {LONG}.")
        for wrapper in _WRAPPERS:
            key = key.removeprefix(wrapper)
        if key in tensors:
            raise RefusedError(f"Two tensors have the name {shown(key)}.")
        tensors[key] = tensor
    return tensors


@dataclass(frozen=True, eq=False)
class Tensor:
    """A tensor as its pickle describes it: every `stride`th number of a storage, in each axis."""

    storage: Storage
    dtype: np.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def __post_init__(self):
        if not isinstance(self.storage, Storage):
            raise ValueError("a tensor without a storage")
        for lengths in ((self.offset,), self.size, self.stride):
            if not isinstance(lengths, tuple) or len(lengths) > _AXES:
                raise ValueError("a tensor whose size or strides are no tuple of lengths")
            if not all(type(length) is int and 0 <= length < 2**63 for length in lengths):
                raise ValueError("a tensor with an offset, size or stride that is no length")
        last = sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True))
        end = self.offset + last + 1
        if self.nbytes and end * self.dtype.itemsize > self.storage.nbytes:
            raise refusal("A tensor that reaches beyond its storage")

    @property
    def nbytes(self) -> int:
        return prod(self.size) * self.dtype.itemsize

    def array(self, archive: Archive) -> np.ndarray:
        """Its numbers: a view of the file, or a copy where those are unaligned or swapped."""
        # ml_dtypes knows no byte orders, so bfloat16 travels as whole numbers.
        carrier = np.dtype("u2") if self.dtype == ml_dtypes.bfloat16 else self.dtype
        width = carrier.itemsize
        array = np.ndarray(
            self.size,
            carrier.newbyteorder(archive.byte_order),
            archive.bytes_of(self.storage.key),
            self.offset * width if self.nbytes else 0,
            [step * width for step in self.stride] if self.nbytes else None,
        )
        if not (array.flags.aligned and array.dtype.isnative):
            array = array.astype(carrier)
        array = array.view(self.dtype)
        array.setflags(write=False)
        return array


def _in(module: str, names: str) -> list[str]:
    return [f"{module}.{name}" for name in names.split()]


# Numbers by torch's names: those of storages, and those of dtypes that have no storage's name.
_STORAGES = {
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch.BoolStorage": np.dtype("?"),
    "torch.ByteStorage": np.dtype("u1"),
    "torch.CharStorage": np.dtype("i1"),
    "torch.ComplexDoubleStorage": np.dtype("c16"),
    "torch.ComplexFloatStorage": np.dtype("c8"),
    "torch.DoubleStorage": np.dtype("f8"),
    "torch.FloatStorage": np.dtype("f4"),
    "torch.HalfStorage": np.dtype("f2"),
    "torch.IntStorage": np.dtype("i4"),
    "torch.LongStorage": np.dtype("i8"),
    "torch.ShortStorage": np.dtype("i2"),
    "torch.storage.UntypedStorage": np.dtype("u1"),
}
_QUANTISED = _in("torch", "QInt8Storage QInt32Storage QUInt8Storage QUInt4x2Storage")
_DTYPES = {f"torch.uint{bits}": np.dtype(f"u{bits // 8}") for bits in (16, 32, 64)}


def _storage(pid: Any) -> Storage:
    """A storage from ('storage', class, key, device, length), and a view's place in old files."""
    if not isinstance(pid, tuple) or len(pid) not in (5, 6):
        raise refusal(f"Persistent id {shown(pid)}")
    kind, storage_class, key, _device, length, *view = pid
    if not isinstance(kind, str) or kind != "storage":
        raise refusal(f"A persistent id of {shown(kind)}")
    if not isinstance(storage_class, StandIn):
        raise refusal(f"A storage of {shown(storage_class)}")
    if storage_class.name not in _STORAGES:
        what = "quantised tensor" if storage_class.name in _QUANTISED else "storage"
        raise refusal(f"A {what} ({storage_class.name})")
    if not isinstance(key, str) or len(key) > LONG or type(length) is not int or length < 0:
        raise ValueError("a storage without a key or a length")
    if any(part is not None for part in view):
        raise refusal("A view of a storage (torch 0.3 or older)")
    return Storage(key, _STORAGES[storage_class.name], length)


def _tensor(
    storage: Any, offset: Any, size: Any, stride: Any, _grad: Any, _hooks: Any, flags: Any = None
) -> Tensor:
    if flags:  # whether to conjugate or negate
        raise refusal("A lazily conjugated or negated tensor")
    return Tensor(storage, storage.dtype, offset, size, stride)


def _tensor_of_dtype(
    storage: Any, offset: Any, size: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any, *_: Any
) -> Tensor:
    if dtype.name not in _DTYPES:
        raise refusal(f"A tensor of {dtype.name}")
    return Tensor(storage, _DTYPES[dtype.name], offset, size, stride)


def _parameter(data: Any, *_: Any) -> Tensor:
    if not isinstance(data, Tensor):
        raise ValueError("a parameter that is no tensor")
    return data


class _Mapping(dict):
    """collections.OrderedDict and the like. A state dict's has an attribute, its versions."""

    def __init__(self, *_factory: Any):
        super().__init__()

    def build(self, state: Any) -> Self:
        if not isinstance(state, dict) or list(state) != ["_metadata"]:
            raise refusal("Setting attributes of a mapping")
        return self


class _Aside:
    """A plain value beside the weights, which nothing reads."""

    def __init__(self, *_: Any):
        pass

    def build(self, _state: Any) -> Self:
        return self


def _no(what: str) -> Any:
    def refuse(*_: Any) -> Any:
        raise refusal(what)

    return refuse


_BUILTINS = ("builtins", "__builtin__")  # the second in protocol 2

# What training checkpoints hold beside their weights: arguments, schedules and scores.
_BESIDE = [
    "argparse.Namespace",
    "torch.Size",
    "torch.device",
    "torch.serialization._get_layout",
    *(name for module in _BUILTINS for name in _in(module, "bytearray complex frozenset set")),
    *_in("pathlib", "PosixPath PurePosixPath WindowsPath PureWindowsPath"),
    *_in("pathlib._local", "PosixPath PurePosixPath WindowsPath PureWindowsPath"),  # Python 3.13
]

# What is only named there: the types of tensors and of a defaultdict's values.
_NAMED = [
    *(name for module in _BUILTINS for name in _in(module, "bool dict float int list str")),
    *_in("torch", "bfloat16 bool complex64 complex128 float16 float32 float64 float8_e4m3fn"),
    *_in("torch", "float8_e5m2 int8 int16 int32 int64 uint8"),
]

_OPERATIONS = {
    "NEWOBJ": lambda made, arguments: made.call(*arguments),
    # Sets, in protocol 4. To fill one would hash.
    "EMPTY_SET": _Aside,
    "FROZENSET": _Aside,
    "ADDITEMS": lambda values, *_: values,
}

_STAND_INS: StandIns = {
    **NUMPY,
    **dict.fromkeys([*_STORAGES, *_QUANTISED, *_DTYPES, *_NAMED], None),
    **dict.fromkeys(_BESIDE, _Aside),
    "__builtin__.bytes": lambda: b"",  # how protocol 2 writes it
    "collections.Counter": _Mapping,
    "collections.OrderedDict": _Mapping,
    "collections.defaultdict": _Mapping,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_tensor": functools.partial(_tensor, _grad=False, _hooks=None),
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_dtype,
    # Tensors of other kinds
    "torch._utils._rebuild_meta_tensor_no_storage": _no("A tensor without numbers (meta device)"),
    "torch._utils._rebuild_nested_tensor": _no("A nested tensor"),
    "torch._utils._rebuild_qtensor": _no("A quantised tensor"),
    "torch._utils._rebuild_sparse_tensor": _no("A sparse tensor"),
}
