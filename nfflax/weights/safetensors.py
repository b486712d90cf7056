"""safetensors files: a JSON header and raw arrays (github.com/huggingface/safetensors).

Files are read by its package, which checks every offset before any array is made. They are written
here: the package puts metadata into the header in random order, and equal weights should make equal
files.
"""

import json
import os
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from nfflax.weights.errors import WeightsError
from nfflax.weights.whole import whole_file

# The format's names of number types. Its 8-bit floats have no use in weights that train.
_NAMES = {
    np.dtype(kind): name
    for name, kind in {
        "F64": np.float64,
        "F32": np.float32,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "I64": np.int64,
        "I32": np.int32,
        "I16": np.int16,
        "I8": np.int8,
        "U64": np.uint64,
        "U32": np.uint32,
        "U16": np.uint16,
        "U8": np.uint8,
        "BOOL": np.bool_,
    }.items()
}
_HEADER = 100_000_000  # bytes: no reader takes a longer one
_ALIGNED = 8  # bytes: where the first array starts is a multiple, as in the package's files
_METADATA = "__metadata__"  # the header's one key that is no array


def read_safetensors(
    path: str | os.PathLike[str],
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(arrays by name, metadata) of a file. Anything that is not such a file: WeightsError."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        problem = 'Reading it needs the safetensors package: pip install "nfflax[hub]".'
        raise WeightsError(str(path), [problem]) from None
    try:
        with open(path, "rb") as file:  # the package's messages about files say less
            _refuse_others(str(path), file.read(64))
        with safe_open(path, framework="np") as file:
            types = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
            unknown = [
                f"The array {name!r:.200} holds {kind}, which is no type of weights."
                for name, kind in types.items()
                if kind not in _NAMES.values()
            ]
            if unknown:
                raise WeightsError(str(path), unknown)
            return {name: file.get_tensor(name) for name in types}, file.metadata() or {}
    except OSError as error:
        problem = f"The file cannot be read: {error.strerror or error}."
    except SafetensorError as error:
        problem = f"The file is no whole safetensors file ({error!s:.200}). Get it again."
    raise WeightsError(str(path), [problem])


def write_safetensors(
    path: str | os.PathLike[str],
    arrays: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a file in full or not at all, replacing one there. Equal content makes equal bytes."""
    ready = {str(name): _little_endian(np.asarray(array)) for name, array in arrays.items()}
    problems = [
        f"{name!r:.200}: {array.dtype} is no type that the format has"
        for name, array in ready.items()
        if array.dtype not in _NAMES
    ]
    if _METADATA in ready:
        problems.append(f"{_METADATA!r} is no name for an array: the format uses it")
    if problems:
        raise WeightsError(str(path), problems)
    # Wide numbers first, so that every array is aligned; then by name.
    order = sorted(ready, key=lambda name: (-ready[name].itemsize, name))
    header: dict[str, Any] = {}
    if metadata:
        header[_METADATA] = {str(key): str(metadata[key]) for key in sorted(metadata)}
    end = 0
    for name in order:
        start, end = end, end + ready[name].nbytes
        header[name] = {
            "dtype": _NAMES[ready[name].dtype],
            "shape": list(ready[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNED)
    if len(text) > _HEADER:
        raise WeightsError(str(path), [f"Its header would have {len(text):,} bytes: too many."])
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(ready[name].tobytes())  # in C order, however the array lies


def _little_endian(array: np.ndarray) -> np.ndarray:
    return array.astype(array.dtype.newbyteorder("<")) if array.dtype.byteorder == ">" else array


def _refuse_others(path: str, head: bytes) -> None:
    """Say what a file is that is loaded by mistake: the package would only call it damaged."""
    if not head:
        raise WeightsError(path, ["The file is empty. Get it again."])
    if head[8:9] == b"{":  # after a length, of which any byte may be any
        return
    if head.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        raise WeightsError(path, ["This is a pickle or a zip archive and no safetensors file."])
    if head.lstrip().startswith(b"<"):
        raise WeightsError(path, ["This is a web page or an error message. Get the file again."])
    if head.startswith(b"version https://git-lfs"):
        problem = "This is a git-lfs pointer, not the file itself: fetch it with `git lfs pull`."
        raise WeightsError(path, [problem])
