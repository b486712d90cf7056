"""Reads DeepMind's released NFNet weights as data: nothing that a file names is imported or run.

F0_haiku.npz to F6_haiku.npz are no npz archives but dill pickles of a Haiku parameter tree
(github.com/google-deepmind/deepmind-research, nfnets/utils.py). A pickle is a program that can only
call what it names. Each name that such a tree needs is a stand-in defined here; no other passes.
"""

import functools
import os
import pickle
import pickletools
import re
from collections.abc import Callable
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from nfflax.weights.errors import WeightsError

# Under the names that pickled dtypes give them.
_NUMBERS = {code: np.dtype(code) for code in "b1 i1 i2 i4 i8 u1 u2 u4 u8 f2 f4 f8 c8 c16".split()}
_NUMBERS["ml_dtypes.bfloat16"] = np.dtype(ml_dtypes.bfloat16)

# First bytes of what is loaded by mistake. A safetensors file opens with a length in 8 bytes.
_NO_PICKLE = {
    rb"\Z": "The file is empty. Download it again.",
    rb"PK\x03\x04": "This is a true .npz (a zip archive), as DeepMind's are not. Use numpy.load.",
    rb"(\xef\xbb\xbf)?\s*<": "This is a web page or an error message. Download the file again.",
    rb".{6}\0\0\{": "This is a safetensors file. Use the safetensors package.",
    rb"(?!\x80[\x02-\x05])": "This is no pickle of protocol 2 to 5, as Haiku weights are.",
}


def read_haiku_pickle(path: str | os.PathLike[str]) -> dict[str, dict[str, np.ndarray]]:
    """The tree {module: {parameter: read-only array}} in a file. Anything else: WeightsError."""
    try:
        with open(path, "rb") as file:
            _check(file)
            file.seek(0)
            return _as_arrays(_TreeUnpickler(file).load())
    except _RefusedError as error:
        problems = error.args
    except OSError as error:
        problems = [f"The file cannot be read: {error.strerror or error}."]
    # Python's documentation leaves open what else a damaged pickle raises.
    except Exception as error:
        what = f"The file is incomplete or damaged ({error!r:.200})"
        problems = [f"{what}, and nothing in it was executed. Download it again."]
    raise WeightsError(str(path), problems)


class _RefusedError(Exception):
    """The file is no Haiku parameter tree; `args` are the problems."""


def _refusal(what: str) -> _RefusedError:
    return _RefusedError(f"{what} is refused, and nothing in the file was executed.")


def _shown(value: Any) -> str:
    """Text quoted and cut, all else by its type: the repr of hostile data need never end."""
    return repr(value[:200]) if isinstance(value, str) else f"({type(value).__name__})"


def _check(file: BinaryIO) -> None:
    """Walks the file and builds nothing: what it declares beyond its end is an error here."""
    head = file.read(64)
    for start, problem in _NO_PICKLE.items():
        if re.match(start, head, re.DOTALL):
            raise _RefusedError(problem)
    file.seek(0)
    memoized = 0
    for opcode, argument, _ in pickletools.genops(file):
        # These fetch objects by other ways than find_class.
        if opcode.name in ("EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID"):
            raise _refusal(f"Pickle opcode {opcode.name}")
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            # Picklers count up from 0. The memo is an array, so one wild index would claim 64 GB.
            if argument is not None and argument > memoized:
                raise _refusal(f"Memo index {argument}, out of order,")
            memoized += 1


def _as_arrays(tree: Any) -> dict[str, dict[str, np.ndarray]]:
    if not isinstance(tree, dict):
        raise _RefusedError(f"The file holds {_shown(tree)} and no modules with parameters.")
    arrays, problems = {}, []
    for module, parameters in tree.items():
        inner = parameters if isinstance(parameters, dict) else {None: parameters}
        for name, leaf in inner.items():
            if isinstance(module, str) and isinstance(name, str) and isinstance(leaf, _Array):
                arrays.setdefault(module, {})[name] = leaf.value
            else:
                found = f"{_shown(module)}: {_shown(name)}: {_shown(leaf)}"
                problems.append(f"{found} does not fit {{module: {{parameter: array}}}}.")
    if problems:
        raise _RefusedError(*problems)
    return arrays


class _TreeUnpickler(pickle.Unpickler):
    def __init__(self, file: BinaryIO):
        super().__init__(file)
        # How protocol 2 writes bytes. Uncached, many calls on one long text would fill memory.
        self._encode = functools.cache(_latin1)

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if (module_name, global_name) == ("_codecs", "encode"):
            return _StandIn("_codecs.encode", self._encode)
        return _find(module_name, global_name)


class _StandIn:
    """What a listed name becomes: callable, and closed to BUILD, which sets attributes."""

    def __init__(self, name: str, call: Callable[..., Any] | None):
        self.name, self._call = name, call

    def __call__(self, *arguments: Any) -> Any:
        if self._call is None:
            raise _refusal(f"A call of {self.name}")
        return self._call(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise _refusal(f"Setting attributes of {self.name}")


class _DType:
    """numpy.dtype: its code now, its byte order by BUILD."""

    def __init__(self, code: Any, _align: Any = False, _copy: Any = False):
        code = code.name if isinstance(code, _StandIn) else code
        if not isinstance(code, str) or code not in _NUMBERS:
            raise _refusal(f"Array type {_shown(code)}, which is no number,")
        self.dtype = _NUMBERS[code]

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])  # version, order, fields, sizes, flags


class _Array:
    """numpy.ndarray: empty now, its state by BUILD. It stays the file's bytes, uncopied."""

    value = np.empty(0, np.int8)  # what numpy's _reconstruct returns

    def __init__(self, state: Any = None):
        if state is not None:
            self.__setstate__(state)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _version, shape, dtype, is_fortran, data = state
        if not all(type(length) is int and length >= 0 for length in shape):
            raise ValueError("an array with a shape that is not of lengths")
        if not isinstance(data, bytes | bytearray):  # without them, numpy would claim memory
            raise _refusal(f"An array made from {_shown(data)}")
        self.value = np.ndarray(shape, dtype.dtype, data, order="F" if is_fortran else "C")
        if self.value.nbytes != len(data):
            raise ValueError(f"{len(data)} bytes for an array of {self.value.nbytes}")
        self.value.setflags(write=False)


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise _refusal(f"_codecs.encode to {_shown(encoding)}")
    return text.encode("latin1")


def _find(module: str, name: str) -> _StandIn:
    full_name = ".".join((module, name))
    if full_name not in _STAND_INS:
        raise _refusal(_shown(full_name))
    return _StandIn(full_name, _STAND_INS[full_name])


_STAND_INS: dict[str, Callable[..., Any] | None] = {
    "collections.OrderedDict": {}.copy,  # called without arguments, and filled by SETITEMS
    # Haiku's mappings, each around a dict. FlatMap (since June 2021) still pickles as FlatMapping;
    # until August 2020 there was frozendict (haiku/_src/data_structures.py).
    "haiku._src.data_structures.FlatMapping": lambda mapping: mapping,
    "haiku._src.data_structures.frozendict": lambda mapping: mapping,
    # Each around numpy's own function, arguments and state. Until 2022 JAX had no wrapper.
    "dill._dill._create_array": lambda *parts: _Array(parts[2]),
    "jax._src.array._reconstruct_array": lambda *parts: _Array(parts[2]),
    "jax._src.device_array.reconstruct_device_array": lambda *parts: _Array(parts[2]),
    # dill 0.3.3 looked numpy's functions up in their module. F0_haiku.npz has the length for it.
    "dill._dill._get_attr": _find,
    "dill._dill._import_module": lambda name: name,
    "ml_dtypes.bfloat16": None,
    "numpy.dtype": _DType,
    "numpy.ndarray": None,
}
for _core in ("numpy.core", "numpy._core"):  # the second since numpy 2
    for _module in (f"{_core}.multiarray", f"{_core}._multiarray_umath"):
        _STAND_INS[f"{_module}._reconstruct"] = lambda *_: _Array()
        _STAND_INS[f"{_module}.scalar"] = lambda dtype, data: _Array((1, (), dtype, False, data))
    _STAND_INS[f"{_core}.numeric._frombuffer"] = lambda data, dtype, shape, order: _Array(
        (1, shape, dtype, order == "F", data)
    )
