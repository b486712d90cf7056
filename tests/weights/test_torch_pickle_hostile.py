"""No file of torch.save's runs anything, fills the memory, or crashes or stalls its reader."""

import os
import pickle
import struct
import tracemalloc
from functools import partial

import pytest
from hostile_pickles import (
    DEEP,
    NAMES,
    NOTHING_RAN,
    calls_of,
    legacy,
    nested,
    program,
    read_elsewhere,
    refusal_of,
    text,
    written,
)

from nfflax.weights.torch_pickle import read_torch_pickle

DAMAGED = "incomplete or damaged"


@pytest.fixture
def refuse(tmp_path):
    return partial(refusal_of, read_torch_pickle, tmp_path / "weights.pth")


def number(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def numbers(*values: int) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


FLOATS = b"ctorch\nFloatStorage\n"


def storage(length: int = 4, of: bytes = FLOATS, kind: bytes = b"", key: bytes = b"") -> bytes:
    key = key or text("0")
    return b"(" + (kind or text("storage")) + of + key + text("cpu") + number(length) + b"tQ"


def tensor(of: bytes, offset: bytes, size: bytes, stride: bytes, rest: bytes = b"\x89N") -> bytes:
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + of + offset + size + stride + rest + b"tR"


ZERO = number(0)
W = tensor(storage(), ZERO, numbers(4), numbers(1))


def in_dict(value: bytes) -> bytes:
    return program(b"}" + text("w") + value + b"s")


# What a file may not ask for


class Calls:
    """Pickles as a call, the way hostile files are made."""

    def __reduce__(self):
        return os.mkdir, (self.path,)

    def __init__(self, path: str):
        self.path = path


@pytest.mark.parametrize("wrap", [written, legacy])
def test_nothing_is_executed(refuse, tmp_path, wrap):
    made = tmp_path / "made"
    hostile = pickle.dumps({"state_dict": {}, "args": Calls(str(made))}, 2)
    message = refuse(wrap(hostile))
    assert f"'{os.mkdir.__module__}.mkdir' is refused, and {NOTHING_RAN}" in message
    assert not made.exists()
    pickle.loads(hostile)  # as the file itself would have it
    assert made.is_dir()


@pytest.mark.parametrize(
    "name",
    [
        *NAMES,
        "torch.load",
        "torch.hub.load",
        "torch.jit.load",
        "torch.jit._serialization.load",
        "torch.storage._load_from_bytes",
        "torch._utils._rebuild_device_tensor_from_numpy",
        "torch._tensor._rebuild_from_type_v2",
        "torch.serialization.load",
        "torch.nn.modules.linear.Linear",
        "haiku._src.data_structures.FlatMapping",
        "argparse.FileType",
        "pathlib.Path.unlink",
        "collections.namedtuple",
        "builtins.__import__",
        "nfflax.weights.torch_pickle.read_torch_pickle",
    ],
)
def test_unlisted_names(refuse, name):
    for content in calls_of(name):
        for wrapped in (written(content), legacy(content)):
            assert f"'{name}' is refused, and {NOTHING_RAN}" in refuse(wrapped)


@pytest.mark.parametrize("where", ["magic", "keys"])
def test_the_other_pickles_of_the_legacy_format_name_nothing(refuse, where):
    call = b"\x80\x02cos\nsystem\n" + text("true") + b"\x85R."
    whole = legacy(program(b"}"), keys=call)
    if where == "magic":  # after the first bytes, by which the format is known
        whole = whole.replace(b"\x80\x02M\xe9\x03.", call)
    assert f"'os.system' is refused, and {NOTHING_RAN}" in refuse(whole)


@pytest.mark.parametrize(
    ("operations", "problem"),
    [
        (b"Ppid\n", "Pickle opcode PERSID is refused"),
        (b"NQ", "Persistent id (NoneType) is refused"),
        (text("pid") + b"Q", "Persistent id 'pid' is refused"),
        (b")Q", "Persistent id (tuple) is refused"),
        (DEEP + b"Q", "Persistent id (tuple) is refused"),
        (storage(kind=text("module")), "A persistent id of 'module' is refused"),
        (storage(kind=DEEP), "A persistent id of (tuple) is refused"),
        (storage(of=b"cos\nsystem\n"), "'os.system' is refused"),
        (storage(of=b"N"), "A storage of (NoneType) is refused"),
        (storage(of=text("torch.FloatStorage")), "A storage of 'torch.FloatStorage' is refused"),
        (storage(of=b"cargparse\nNamespace\n"), "A storage (argparse.Namespace) is refused"),
        (storage(of=b"ctorch\nQInt8Storage\n"), "A quantised tensor (torch.QInt8Storage)"),
        (storage()[:-2] + text("view") + b"tQ", "A view of a storage"),
        (b"\x82\x01", "Pickle opcode EXT1 is refused"),
        (b"\x83\x01\x00", "Pickle opcode EXT2 is refused"),
        (b"\x84\x01\x00\x00\x00", "Pickle opcode EXT4 is refused"),
        (b"\x8b\x01\x00\x00\x00\x01", "Pickle opcode LONG4 is refused"),
        (b"S'text'\n", "Pickle opcode STRING is refused"),
        (FLOATS + b")R", "A call of torch.FloatStorage is refused"),
        (FLOATS + b")\x81", "A call of torch.FloatStorage is refused"),
        (FLOATS + b"}b", "Setting attributes of torch.FloatStorage is refused"),
        (b"c__builtin__\ndict\n)R", "A call of __builtin__.dict is refused"),
        (b"cargparse\nNamespace\n}b", "Setting attributes of argparse.Namespace is refused"),
        (b"ccollections\nOrderedDict\n)R}b", "Setting attributes of a mapping is refused"),
        (
            b"ccollections\nOrderedDict\n)R}" + text("__class__") + b"Nsb",
            "Setting attributes of a mapping is refused",
        ),
        (b"c_codecs\nencode\n" + text("a") + text("rot13") + b"\x86R", "to 'rot13' is refused"),
        (b"Nr\xff\xff\xff\x0f", "Memo index 268435455, out of order, is refused"),
        (tensor(storage(), ZERO, numbers(4), numbers(1), b"\x89N\x88"), "conjugated or negated"),
        (
            b"ctorch._utils\n_rebuild_tensor_v3\n("
            + storage(of=b"ctorch.storage\nUntypedStorage\n")
            + (ZERO + numbers(4) + numbers(1) + b"\x89Nctorch\nfloat8_e4m3fn\ntR"),
            "A tensor of torch.float8_e4m3fn is refused",
        ),
    ],
)
def test_refused_operations(refuse, operations, problem):
    for content in (written(program(operations)), legacy(program(operations))):
        message = refuse(content)
        assert problem in message
        assert NOTHING_RAN in message


# What would read or take memory outside the file


@pytest.mark.parametrize(
    "place",
    [
        ZERO + numbers(5) + numbers(1),
        number(1) + numbers(4) + numbers(1),
        ZERO + numbers(2, 2) + numbers(3, 1),
        ZERO + numbers(2) + numbers(2**62),
        ZERO + numbers(2**62) + numbers(2**62),
        number(2**62) + numbers(1) + numbers(1),
    ],
)
def test_tensors_beyond_their_storage(refuse, place):
    value = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage() + place + b"\x89NtR"
    assert "reaches beyond its storage" in refuse(written(in_dict(value), ("w/data/0", bytes(16))))


@pytest.mark.parametrize(
    "place",
    [
        number(-1) + numbers(4) + numbers(1),
        number(3) + numbers(4) + numbers(-1),
        ZERO + numbers(-4) + numbers(1),
        ZERO + numbers(4) + numbers(1, 1),
        ZERO + numbers(2**64) + numbers(0),
        ZERO + numbers(*[1] * 33) + numbers(*[1] * 33),
        ZERO + text("4") + text("1"),
        ZERO + DEEP + DEEP,
        b"N" + numbers(4) + numbers(1),
        b"\x88" + numbers(3) + numbers(1),
    ],
)
def test_places_that_are_no_lengths(refuse, place):
    value = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage() + place + b"\x89NtR"
    assert DAMAGED in refuse(written(in_dict(value), ("w/data/0", bytes(16))))


@pytest.mark.parametrize(
    ("length", "size"), [(4, (2**40,)), (4, (2**31, 2**31)), (1, (2**62, 2**62)), (4, (10**6,))]
)
def test_stride_zero_is_no_memory_bomb(refuse, length, size):
    value = tensor(storage(length), ZERO, numbers(*size), numbers(*[0] * len(size)))
    tracemalloc.start()
    try:
        message = refuse(written(in_dict(value), ("w/data/0", bytes(4 * length))))
        assert "A state dict of" in message
        assert NOTHING_RAN in message
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


def test_many_views_of_one_storage_are_no_memory_bomb(refuse):
    """2,000 tensors of 40 kB in a file of 180 kB."""
    first = tensor(storage(10_000), ZERO, numbers(10_000), numbers(1)) + b"q\x00"
    more = b"".join(text(str(n)) + b"h\x00" for n in range(2_000))
    saved = program(b"}(" + text("w") + first + more + b"u")
    assert "A state dict of" in refuse(written(saved, ("w/data/0", bytes(40_000))))


@pytest.mark.parametrize("length", [-1, 3, 5, 2**40, 2**62, 2**70])
def test_storages_of_another_length(refuse, length):
    value = tensor(storage(length), ZERO, numbers(2), numbers(1))
    assert DAMAGED in refuse(written(in_dict(value), ("w/data/0", bytes(16))))
    keys = program(b"]" + text("0") + b"a")
    with_length = struct.pack("<q", length) if length < 2**63 else struct.pack("<q", -1)
    for first in (with_length, struct.pack("<q", 4)):
        assert DAMAGED in refuse(legacy(in_dict(value), keys, first + bytes(8)))


@pytest.mark.parametrize(
    "keys", [b"]", b"N", text("0"), b"]Na", b"]" + DEEP + b"a", b"]" + text("1") + b"a"]
)
def test_keys_that_do_not_fit(refuse, keys):
    assert DAMAGED in refuse(legacy(in_dict(W), program(keys), struct.pack("<q", 4) + bytes(16)))


@pytest.mark.parametrize(
    "saved",
    [
        in_dict(tensor(b"N", ZERO, numbers(4), numbers(1))),
        in_dict(W + b"}b"),
        in_dict(storage(key=b"K\x00")),
        in_dict(storage(key=DEEP)),
        in_dict(storage(key=text("k" * 201))),
        program(b"}(" + text("a") + storage(4) + text("b") + storage(5) + b"u"),
        in_dict(b"ctorch._utils\n_rebuild_parameter\nN\x88N\x87R"),
        in_dict(b"ctorch._utils\n_rebuild_tensor_v2\n)R"),
        in_dict(b"ctorch._utils\n_rebuild_tensor_v3\n(" + storage() + b"NNN\x89NNtR"),
        in_dict(b"c__builtin__\nbytes\n" + number(2**40) + b"\x85R"),
        program(b"\x8e" + struct.pack("<Q", 2**62) + b"few"),
        program(b"X\xff\xff\xff\x7ffew"),
    ],
)
def test_operations_that_do_not_fit_their_operands(refuse, saved):
    tracemalloc.start()
    try:
        for content in (written(saved, ("w/data/0", bytes(16))), legacy(saved)):
            assert DAMAGED in refuse(content)
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


# What would crash or stall


def test_nothing_follows_what_a_file_nests(tmp_path):
    """To hash, say, would overflow C's stack or take 2**60 steps: hence in another process."""
    ordered = b"ccollections\nOrderedDict\n"
    expected = {
        b"}" + DEEP + b"Ns": "a dict of 1 ((tuple): (NoneType))",
        b"}" + nested(b"N") + W + b"s": "A tensor's name is (tuple)",
        b"}" + text("state_dict") + DEEP + b"s": "a dict of 1 ('state_dict': (tuple))",
        DEEP: "holds (tuple), and no state dict",
        ordered + b")R" + DEEP + b"b": "Setting attributes of a mapping is refused",
        ordered + b")R}" + text("_metadata") + DEEP + b"sb": "holds a dict of 0 ()",
        b"cargparse\nNamespace\n)\x81" + DEEP + b"b": "holds (_Aside)",
        b"c__builtin__\nset\n]" + DEEP + b"a\x85R": "holds (_Aside)",
        b"\x8f(" + DEEP + b"\x90": "holds (_Aside)",
        b"(" + DEEP + b"\x91": "holds (_Aside)",
        storage(key=DEEP): "a storage without a key",
        storage(of=DEEP): "A storage of (tuple) is refused",
        tensor(storage(), ZERO, numbers(4), DEEP): DAMAGED,
        tensor(storage(), ZERO, nested(b"N"), nested(b"N")): DAMAGED,
        tensor(storage(), ZERO, numbers(4), numbers(1), DEEP + DEEP + DEEP): "conjugated",
    }
    paths = [tmp_path / f"{n}.pth" for n in range(len(expected))]
    for path, operations in zip(paths, expected, strict=True):
        path.write_bytes(written(program(operations), ("w/data/0", bytes(16))))
    lines = read_elsewhere(read_torch_pickle, paths)
    for line, problem in zip(lines, expected.values(), strict=True):
        assert problem in line
