"""Reads DeepMind's released NFNet weights as data: nothing that a file names is imported or run.

F0_haiku.npz to F6_haiku.npz are no npz archives but dill pickles of a Haiku parameter tree
(github.com/google-deepmind/deepmind-research, nfnets/utils.py). A pickle is a program for a stack
machine. This is that machine with no more operations than such a tree needs, and each name that a
program can call is a stand-in defined here. Nothing follows what a file nests, to hash it, compare
it or print it, and the operations are counted: no file crashes or stalls its reader.
"""

import functools
import os
import pickletools
import re
from collections.abc import Callable, Iterable
from typing import Any, Self

import ml_dtypes
import numpy as np

from nfflax.weights.errors import WeightsError

_ENOUGH = 1_000_000  # operations, or arrays. F6 takes 50,000 for its 1,500 arrays.
_LONG = 200  # characters. Official names have some 50.

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
            head = file.read(64)
            for start, problem in _NO_PICKLE.items():
                if re.match(start, head, re.DOTALL):
                    raise _RefusedError(problem)
            file.seek(0)
            return _as_arrays(_run(pickletools.genops(file)))
    except _RefusedError as error:
        problems = error.args
    except OSError as error:
        problems = [f"The file cannot be read: {error.strerror or error}."]
    # A damaged program fails in whatever operation does not fit its operands.
    except Exception as error:
        what = f"The file is incomplete or damaged ({type(error).__name__}: {error!s:.200})"
        problems = [f"{what}, and nothing in it was executed. Download it again."]
    raise WeightsError(str(path), problems)


class _RefusedError(Exception):
    """The file is no Haiku parameter tree; `args` are the problems."""


def _refusal(what: str) -> _RefusedError:
    return _RefusedError(f"{what} is refused, and nothing in the file was executed.")


def _shown(value: Any) -> str:
    """Text quoted and cut, all else by its type: the repr of hostile data need never end."""
    if isinstance(value, str):
        return f"{value[:_LONG]!r:.{_LONG}}"
    return f"({(value if isinstance(value, type) else type(value)).__name__})"


def _as_arrays(tree: Any) -> dict[str, dict[str, np.ndarray]]:
    if not isinstance(tree, dict):
        raise _RefusedError(f"The file holds {_shown(tree)} and no modules with parameters.")
    # Modules may share one mapping, so there can be far more arrays than operations.
    if sum(len(inner) for inner in tree.values() if isinstance(inner, dict)) > _ENOUGH:
        raise _refusal(f"A tree of more than {_ENOUGH} arrays")
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


def _run(program: Iterable[tuple[pickletools.OpcodeInfo, Any, Any]]) -> Any:
    """The value that a program leaves on its stack."""
    stack: list[Any] = []
    marks = [0]  # heights of the stack
    memo: list[Any] = []
    encode = _StandIn("_codecs.encode", functools.partial(_latin1, {}))

    def find(*names: str) -> Any:
        return encode if names == ("_codecs", "encode") else _find(*names)

    operations = _OPERATIONS | {"STACK_GLOBAL": find}
    for count, (opcode, argument, _) in enumerate(program):
        if count == _ENOUGH:
            raise _refusal(f"A program of more than {_ENOUGH} operations")
        if opcode.arg is pickletools.stringnl_noescape_pair:  # the two lines of a name
            argument = find(*argument.split(" "))
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                marks.append(len(stack))
            case "MEMOIZE" | "BINPUT" | "LONG_BINPUT" | "PUT":
                index = len(memo) if argument is None else argument
                if not 0 <= index <= len(memo):  # picklers count up from 0
                    raise _refusal(f"Memo index {index}, out of order,")
                memo[index : index + 1] = [stack[-1]]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case name if name in operations:
                taken = opcode.stack_before  # values, and then maybe a mark and all above it
                end = marks.pop() + 2 if pickletools.stackslice in taken else len(stack)
                start = end - len(taken)
                if start < marks[-1]:
                    raise ValueError(f"{name} without its operands")
                operands = stack[start:] if argument is None else [*stack[start:], argument]
                stack[start:] = [operations[name](*operands)]
            case name:
                raise _refusal(f"Pickle opcode {name}")
    (value,) = stack
    return value


class _StandIn:
    """What a listed name becomes: something to call, closed to BUILD."""

    def __init__(self, name: str, function: Callable[..., Any] | None):
        self.name, self._function = name, function

    def call(self, *arguments: Any) -> Any:
        if self._function is None:
            raise _refusal(f"A call of {self.name}")
        return self._function(*arguments)

    def build(self, _state: Any) -> Any:
        raise _refusal(f"Setting attributes of {self.name}")


class _DType:
    """numpy.dtype: its code now, its byte order by BUILD."""

    def __init__(self, code: Any, _align: Any = False, _copy: Any = False):
        code = code.name if isinstance(code, _StandIn) else code
        if not isinstance(code, str) or code not in _NUMBERS:
            raise _refusal(f"Array type {_shown(code)}, which is no number,")
        self.dtype = _NUMBERS[code]

    def build(self, state: Any) -> Self:
        order = state[1]  # version, order, fields, sizes, flags
        if order not in ("<", ">", "|", "="):
            raise ValueError("an array type without a byte order")
        self.dtype = self.dtype.newbyteorder(order)
        return self


class _Array:
    """numpy.ndarray: empty now, its state by BUILD. It stays the file's bytes, uncopied."""

    value = np.empty(0, np.int8)  # what numpy's _reconstruct returns

    def build(self, state: Any) -> Self:
        _version, shape, dtype, is_fortran, data = state
        if not all(type(length) is int and length >= 0 for length in shape):
            raise ValueError("an array with a shape that is not of lengths")
        if not isinstance(data, bytes | bytearray):  # without them, numpy would claim memory
            raise _refusal(f"An array made from {_shown(data)}")
        self.value = np.ndarray(shape, dtype.dtype, data, order="F" if is_fortran else "C")
        if self.value.nbytes != len(data):
            raise ValueError(f"{len(data)} bytes for an array of {self.value.nbytes}")
        self.value.setflags(write=False)
        return self


def _find(*names: str) -> _StandIn:
    full_name = ".".join(names)
    if full_name not in _STAND_INS:
        raise _refusal(_shown(full_name))
    return _StandIn(full_name, _STAND_INS[full_name])


def _latin1(known: dict[str, bytes], text: Any, encoding: Any) -> bytes:
    """How protocol 2 writes bytes. With what is `known`, one long text stays one object."""
    if not isinstance(text, str) or encoding != "latin1":
        raise _refusal(f"_codecs.encode of {_shown(text)} to {_shown(encoding)}")
    if text not in known:
        known[text] = text.encode("latin1")
    return known[text]


def _fill(mapping: Any, *items: Any) -> Any:
    for key, value in zip(items[::2], items[1::2], strict=True):
        # Only names are hashed. Any other key is kept as its type, for the message.
        mapping[key if isinstance(key, str) and len(key) <= _LONG else type(key)] = value
    return mapping


# By pickletools' names. Each gets what it takes from the stack and its argument in the file.
_OPERATIONS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys("BINUNICODE SHORT_BINUNICODE BINUNICODE8".split(), lambda text: text),
    **dict.fromkeys("BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8".split(), lambda data: data),
    **dict.fromkeys("BININT BININT1 BININT2 LONG1 BINFLOAT".split(), lambda number: number),
    **dict.fromkeys("EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3".split(), lambda *items: items),
    **dict.fromkeys(["SETITEM", "SETITEMS"], _fill),
    **dict.fromkeys(["APPEND", "APPENDS"], lambda values, *more: list.__iadd__(values, more)),
    **dict.fromkeys(["GLOBAL", "STOP"], lambda value: value),
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "REDUCE": lambda function, arguments: function.call(*arguments),
    "BUILD": lambda value, state: value.build(state),
}


def _array(*state: Any) -> _Array:
    return _Array().build(state)


def _wrapped(_function: Any, _arguments: Any, state: Any, _attributes: Any) -> _Array:
    return _array(*state)


_STAND_INS: dict[str, Callable[..., Any] | None] = {
    "collections.OrderedDict": {}.copy,  # called without arguments, and filled by SETITEMS
    # Haiku's mappings, each around a dict. FlatMap (since June 2021) still pickles as FlatMapping;
    # until August 2020 there was frozendict (haiku/_src/data_structures.py).
    "haiku._src.data_structures.FlatMapping": lambda mapping: mapping,
    "haiku._src.data_structures.frozendict": lambda mapping: mapping,
    # Each around numpy's own function, arguments and state. Until 2022 JAX had no wrapper.
    "dill._dill._create_array": _wrapped,
    "jax._src.array._reconstruct_array": _wrapped,
    "jax._src.device_array.reconstruct_device_array": _wrapped,
    # dill 0.3.3 looked numpy's functions up in their module. F0_haiku.npz has the length for it.
    "dill._dill._get_attr": _find,
    "dill._dill._import_module": lambda name: name,
    "ml_dtypes.bfloat16": None,
    "numpy.dtype": _DType,
    "numpy.ndarray": None,
}
for _core in ("numpy.core", "numpy._core"):  # the second since numpy 2
    for _module in (f"{_core}.multiarray", f"{_core}._multiarray_umath"):
        _STAND_INS[f"{_module}._reconstruct"] = lambda _class, _shape, _code: _Array()
        _STAND_INS[f"{_module}.scalar"] = lambda dtype, data: _array(1, (), dtype, False, data)
    _STAND_INS[f"{_core}.numeric._frombuffer"] = lambda data, dtype, shape, order: _array(
        1, shape, dtype, order == "F", data
    )
