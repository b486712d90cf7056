"""No weight file runs anything, fills the memory, or crashes or stalls its reader."""

import copyreg
import os
import pickle
import struct
import tracemalloc
from collections import OrderedDict
from functools import partial

import numpy as np
import pytest
from hostile_pickles import (
    DEEP,
    NAMES,
    NOTHING_RAN,
    calls_of,
    nested,
    program,
    read_elsewhere,
    refusal_of,
    text,
)

from nfflax.weights.haiku_pickle import read_haiku_pickle


@pytest.fixture
def refuse(tmp_path):
    return partial(refusal_of, read_haiku_pickle, tmp_path / "F0_haiku.npz")


class Calls:
    """Pickles as a call, the way hostile files are made."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


# What a file may not ask for


def test_nothing_is_executed(refuse, tmp_path):
    made = tmp_path / "made"
    content = pickle.dumps({"m": {"w": Calls(os.mkdir, str(made))}})
    message = refuse(content)
    assert f"'{os.mkdir.__module__}.mkdir' is refused, and {NOTHING_RAN}" in message
    assert not made.exists()
    pickle.loads(content)  # as the file itself would have it
    assert made.is_dir()


@pytest.mark.parametrize(
    "name",
    [
        *NAMES,
        "dill._dill._create_type",
        "dill._dill._eval_repr",
        "haiku._src.data_structures.to_dict",
        "jax.numpy.array",
        "nfflax.weights.haiku_pickle.read_haiku_pickle",
        "torch._utils._rebuild_tensor_v2",
    ],
)
def test_unlisted_names(refuse, name):
    module, _, function = name.rpartition(".")
    looked_up = text(module) + b"\x85R" + text(function) + b"\x86R"
    by_dill = program(b"cdill._dill\n_get_attr\ncdill._dill\n_import_module\n", looked_up)
    for content in [*calls_of(name), by_dill]:
        assert f"'{name}' is refused, and {NOTHING_RAN}" in refuse(content)


@pytest.mark.parametrize(
    ("operations", "problem"),
    [
        (b"Ppid\n", "Pickle opcode PERSID is refused"),
        (b"NQ", "Pickle opcode BINPERSID is refused"),
        (b"\x82\x01", "Pickle opcode EXT1 is refused"),
        (b"\x83\x01\x00", "Pickle opcode EXT2 is refused"),
        (b"\x84\x01\x00\x00\x00", "Pickle opcode EXT4 is refused"),
        (b"cnumpy\nndarray\nK\x03\x85R", "A call of numpy.ndarray is refused"),
        (b"cnumpy\nndarray\n}b", "Setting attributes of numpy.ndarray is refused"),
        (b"cnumpy\ndtype\nN}\x86b", "Setting attributes of numpy.dtype is refused"),
        (b"c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00rot13\x86R", "to 'rot13' is"),
        (b"c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00utf-8\x86R", "to 'utf-8' is"),
        (b"Nr\xff\xff\xff\x0f", "Memo index 268435455, out of order, is refused"),
        (b"Np268435455\n", "Memo index 268435455, out of order, is refused"),
    ],
)
def test_refused_operations(refuse, operations, problem):
    message = refuse(program(operations))
    assert problem in message
    assert NOTHING_RAN in message


def test_registered_extension_codes_are_no_way_in(refuse):
    copyreg.add_extension("collections", "OrderedDict", 240)
    try:
        assert "EXT1 is refused" in refuse(pickle.dumps(OrderedDict))
    finally:
        copyreg.remove_extension("collections", "OrderedDict", 240)


def test_attributes_of_stand_ins_are_not_given(refuse):
    reached = b"cdill._dill\n_get_attr\ncnumpy\nndarray\n" + text("__subclasses__") + b"\x86R"
    assert "nothing in it was executed" in refuse(program(reached))


@pytest.mark.parametrize(
    ("array", "code"),
    [
        (np.array([None, 1], object), "O8"),
        (np.array(["text"]), "U4"),
        (np.array([b"bytes"]), "S5"),
        (np.zeros(2, "M8[s]"), "M8"),
        (np.zeros(2, [("x", "f4"), ("y", "f4")]), "V8"),
    ],
)
def test_arrays_of_no_numbers(refuse, array, code):
    message = refuse(pickle.dumps({"m": {"w": array}}))
    assert f"Array type '{code}', which is no number, is refused, and {NOTHING_RAN}" in message


# What would fill the memory


@pytest.mark.parametrize("shape", [(2**31,), (2**20, 2**20), (2**62, 2**62), (2**70,), (-1,), (1,)])
def test_shapes_that_the_bytes_do_not_fill(refuse, shape):
    class Array:
        def __reduce__(self):
            state = (1, shape, np.dtype("f4"), False, b"\0" * 8)
            return *np.ones(2).__reduce__()[:2], state  # type: ignore[misc]

    tracemalloc.start()
    try:
        assert "incomplete or damaged" in refuse(pickle.dumps({"m": {"w": Array()}}))
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "operations",
    [
        b"\x8e" + struct.pack("<Q", 2**40) + b"few",  # BINBYTES8
        b"\x96" + struct.pack("<Q", 2**62) + b"few",  # BYTEARRAY8
        b"\x95" + struct.pack("<Q", 2**62) + b"N",  # FRAME
        nested(b"N"),
        b"}" + text("m") + nested(b"N") + b"s",
        b"cnumpy\ndtype\n" + nested(b"N") + b"\x85R",
        b"cdill._dill\n_create_array\nNN(K\x01" + nested(b"N") + b"N\x89C\x00t\x87R",
        b"cdill._dill\n_get_attr\n" + nested(b"N") + text("x") + b"\x86R",
    ],
)
def test_small_files_that_declare_much(refuse, operations):
    assert refuse(program(operations))


def test_one_text_encoded_many_times(refuse):
    """The bytes of protocol 2: 2,000 calls on 100 kB would hold 200 MB."""
    encode = b"c_codecs\nencode\nq\x00" + text("x" * 100_000) + b"q\x01" + text("latin1") + b"q\x02"
    calls = b"h\x00h\x01h\x02\x86R" * 2_000
    tracemalloc.start()
    try:
        assert refuse(program(encode, calls))
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


# What would crash or stall

ENCODE, LATIN1 = b"c_codecs\nencode\n", text("latin1") + b"\x86R"
DTYPE = b"cnumpy\ndtype\n" + text("f4") + b"\x85R"
RECONSTRUCT = b"cnumpy.core.multiarray\n_reconstruct\nNNN\x87R"


def test_nothing_follows_what_a_file_nests(tmp_path):
    """To hash, say, would overflow C's stack or take 2**60 steps: hence in another process."""
    expected = {
        b"}" + DEEP + b"Ns": "(tuple): (NoneType): (NoneType) does not fit",
        b"}" + nested(b"N") + b"Ns": "(tuple): (NoneType): (NoneType) does not fit",
        b"}(" + text("m") + b"}" + nested(b"N") + b"Nsu": "'m': (tuple): (NoneType) does not fit",
        ENCODE + DEEP + LATIN1: "_codecs.encode of (tuple) to 'latin1' is refused",
        ENCODE + nested(b"N") + LATIN1: "_codecs.encode of (tuple) to 'latin1' is refused",
        b"\x8f(" + DEEP + b"\x90": "Pickle opcode EMPTY_SET is refused",
        b"(" + DEEP + b"\x91": "Pickle opcode FROZENSET is refused",
        DEEP + text("x") + b"\x93": "incomplete or damaged",
        b"cnumpy\ndtype\n" + DEEP + b"\x85R": "Array type (tuple), which is no number",
        DTYPE + b"N" + DEEP + b"\x86b": "an array type without a byte order",
        RECONSTRUCT + b"(N" + DEEP + DTYPE + b"\x89C\x00tb": "a shape that is not of lengths",
        (b"}" + text("m")) * 30_000 + b"N" + b"s" * 30_000: "'m': 'm': (dict) does not fit",
        b"]" * 30_000 + b"a" * 29_999: "holds (list)",
    }
    paths = [tmp_path / f"{number}.npz" for number in range(len(expected))]
    for path, operations in zip(paths, expected, strict=True):
        path.write_bytes(program(operations))
    for line, problem in zip(
        read_elsewhere(read_haiku_pickle, paths), expected.values(), strict=True
    ):
        assert problem in line


def shared_mapping(modules: int, parameters: int) -> bytes:
    inner = b"}\x94(" + b"".join(text(f"p{n}") + b"N" for n in range(parameters)) + b"u"
    return b"}(" + text("m") + inner + b"".join(text(f"m{n}") + b"h\x00" for n in range(modules))


@pytest.mark.parametrize(
    ("operations", "problem"),
    [
        (b"N" * 1_000_000, "A program of more than 1000000 operations is refused"),
        (shared_mapping(1_000, 1_000) + b"u", "A tree of more than 1000000 arrays is refused"),
        (b"}" + text("m" * 10_000) + b"}" + text("w") + b"Nss", "(str): 'w': (NoneType)"),
    ],
    ids=["operations", "arrays", "name"],
)
def test_more_than_any_network_has(refuse, operations, problem):
    assert problem in refuse(program(operations))


@pytest.mark.parametrize(
    "operations",
    [
        b"\x85",  # TUPLE1 of nothing
        b"N(\x85",  # beneath a mark
        b"t}",  # TUPLE without a mark
        b"\x94}",  # MEMOIZE
        b"h\x00",  # BINGET
        b"N}",  # two values at the end
        b"})R",  # a call of a dict
        b"}}b",  # a state for a dict
        b"}(Nu",  # a key without a value
        b")Na",  # APPEND to a tuple
    ],
)
def test_operations_that_do_not_fit_their_operands(refuse, operations):
    assert "incomplete or damaged" in refuse(program(operations))
