"""Runs pickles as data: nothing that a file names is imported or executed.

A pickle is a program for a stack machine. This is that machine with no more operations than weight
files need, and each name that a program can call is a stand-in: numpy's here, the others beside the
reader of their format. Nothing follows what a file nests, to hash it, compare it or print it, and
the operations are counted: no file crashes or stalls its reader, or takes memory beyond its size.
"""

import contextlib
import functools
import mmap
import os
import pickletools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any, Self, cast

import ml_dtypes
import numpy as np

from nfflax.weights.errors import WeightsError

ENOUGH = 1_000_000  # operations, or arrays. F6 takes 50,000 for its 1,500 arrays.
LONG = 200  # characters. Official names have some 50.

StandIns = Mapping[str, Callable[..., Any] | None]

# Under the names that pickled dtypes give them.
_NUMBERS = {code: np.dtype(code) for code in "b1 i1 i2 i4 i8 u1 u2 u4 u8 f2 f4 f8 c8 c16".split()}
_NUMBERS["ml_dtypes.bfloat16"] = np.dtype(ml_dtypes.bfloat16)

# First bytes of what is loaded by mistake. A safetensors file opens with a length in 8 bytes.
_NO_PICKLE = {
    rb"\Z": "The file is empty. Download it again.",
    rb"(\xef\xbb\xbf)?\s*<": "This is a web page or an error message. Download the file again.",
    rb".{6}\0\0\{": "This is a safetensors file. Use the safetensors package.",
}


class RefusedError(Exception):
    """The file is not what its reader reads; `args` are the problems."""


def refusal(what: str) -> RefusedError:
    """The error for what a file asks and does not get."""
    return RefusedError(f"{what} is refused, and nothing in the file was executed.")


def shown(value: Any) -> str:
    """Text quoted and cut, all else by its type: the repr of hostile data need never end."""
    if isinstance(value, str):
        return f"{value[:LONG]!r:.{LONG}}"
    return f"({(value if isinstance(value, type) else type(value)).__name__})"


@contextlib.contextmanager
def mapped(path: str | os.PathLike[str], strangers: Mapping[bytes, str]) -> Iterator[mmap.mmap]:
    """The bytes of a file, which is read within: what fails there becomes a WeightsError.

    `strangers` are the other kinds of file that the reader knows: first bytes, and what to say.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(512)
            for start, problem in (_NO_PICKLE | dict(strangers)).items():
                if re.match(start, head, re.DOTALL):
                    raise RefusedError(problem)
            yield mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            return
    except RefusedError as error:
        problems = error.args
    except OSError as error:
        problems = [f"The file cannot be read: {error.strerror or error}."]
    # A damaged program fails in whatever operation does not fit its operands.
    except Exception as error:
        what = f"The file is incomplete or damaged ({type(error).__name__}: {error!s:.200})"
        problems = [f"{what}, and nothing in it was executed. Download it again."]
    raise WeightsError(str(path), problems)


def run(
    program: bytes | mmap.mmap,
    stand_ins: StandIns,
    operations: Mapping[str, Callable[..., Any]] | None = None,
) -> Any:
    """The value that a program leaves on its stack; a mapped file is left at the program's end.

    `operations` are a format's own, under pickletools' names, beside those of every format.
    """
    stack: list[Any] = []
    marks = [0]  # heights of the stack
    memo: list[Any] = []
    find_name = functools.partial(
        find, {**stand_ins, "_codecs.encode": functools.partial(_latin1, {})}
    )
    known = _OPERATIONS | {"STACK_GLOBAL": find_name} | dict(operations or {})
    steps: Iterator[tuple[pickletools.OpcodeInfo, Any, Any]]
    steps = pickletools.genops(cast(IO[bytes], program))  # a map has the methods that it calls
    argument: Any
    for count, (opcode, argument, _) in enumerate(steps):
        if count == ENOUGH:
            raise refusal(f"A program of more than {ENOUGH} operations")
        if opcode.arg is pickletools.stringnl_noescape_pair:  # the two lines of a name
            argument = find_name(*argument.split(" "))
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                marks.append(len(stack))
            case "MEMOIZE" | "BINPUT" | "LONG_BINPUT" | "PUT":
                index = len(memo) if argument is None else argument
                if not 0 <= index <= len(memo):  # picklers count up from 0
                    raise refusal(f"Memo index {index}, out of order,")
                memo[index : index + 1] = [stack[-1]]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case name if name in known:
                taken = opcode.stack_before  # values, and then maybe a mark and all above it
                end = marks.pop() + 2 if pickletools.stackslice in taken else len(stack)
                start = end - len(taken)
                if start < marks[-1]:
                    raise ValueError(f"{name} without its operands")
                operands = stack[start:] if argument is None else [*stack[start:], argument]
                stack[start:] = [known[name](*operands)]
            case name:
                raise refusal(f"Pickle opcode {name}")
    (value,) = stack
    return value


class StandIn:
    """What a listed name becomes: something to call, closed to BUILD."""

    def __init__(self, name: str, function: Callable[..., Any] | None):
        self.name, self._function = name, function

    def call(self, *arguments: Any) -> Any:
        if self._function is None:
            raise refusal(f"A call of {self.name}")
        return self._function(*arguments)

    def build(self, _state: Any) -> Any:
        raise refusal(f"Setting attributes of {self.name}")


def find(stand_ins: StandIns, *names: str) -> StandIn:
    """What a file gets for a module and a name in it."""
    full_name = ".".join(names)
    if full_name not in stand_ins:
        raise refusal(shown(full_name))
    return StandIn(full_name, stand_ins[full_name])


def array_of(value: Any) -> np.ndarray | None:
    """The read-only array that a program has made, if the value is one."""
    return value.value if isinstance(value, _Array) else None


class _DType:
    """numpy.dtype: its code now, its byte order by BUILD."""

    def __init__(self, code: Any, _align: Any = False, _copy: Any = False):
        code = code.name if isinstance(code, StandIn) else code
        if not isinstance(code, str) or code not in _NUMBERS:
            raise refusal(f"Array type {shown(code)}, which is no number,")
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
            raise refusal(f"An array made from {shown(data)}")
        self.value = np.ndarray(shape, dtype.dtype, data, order="F" if is_fortran else "C")
        if self.value.nbytes != len(data):
            raise ValueError(f"{len(data)} bytes for an array of {self.value.nbytes}")
        self.value.setflags(write=False)
        return self


def make_array(*state: Any) -> _Array:
    """An array from its state: version, shape, dtype, whether in Fortran's order, bytes."""
    return _Array().build(state)


def _latin1(known: dict[str, bytes], text: Any, encoding: Any) -> bytes:
    """How protocol 2 writes bytes. With what is `known`, one long text stays one object."""
    if not isinstance(text, str) or encoding != "latin1":
        raise refusal(f"_codecs.encode of {shown(text)} to {shown(encoding)}")
    if text not in known:
        known[text] = text.encode("latin1")
    return known[text]


def _fill(mapping: Any, *items: Any) -> Any:
    for key, value in zip(items[::2], items[1::2], strict=True):
        # Only names are hashed. Any other key is kept as its type, for the message.
        mapping[key if isinstance(key, str) and len(key) <= LONG else type(key)] = value
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


def _numpy() -> Iterator[tuple[str, Callable[..., Any] | None]]:
    yield "ml_dtypes.bfloat16", None
    yield "numpy.dtype", _DType
    yield "numpy.ndarray", None
    for core in ("numpy.core", "numpy._core"):  # the second since numpy 2
        for module in (f"{core}.multiarray", f"{core}._multiarray_umath"):
            yield f"{module}._reconstruct", lambda _class, _shape, _code: _Array()
            yield f"{module}.scalar", lambda dtype, data: make_array(1, (), dtype, False, data)
        yield (
            f"{core}.numeric._frombuffer",
            lambda data, dtype, shape, order: make_array(1, shape, dtype, order == "F", data),
        )


NUMPY: StandIns = dict(_numpy())
