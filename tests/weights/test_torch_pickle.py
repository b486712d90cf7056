"""Files of torch.save come out equal, and whatever else a file holds is a WeightsError.

tests/golden/torch_pickles/README.md says how the files were made.
"""

import argparse
import io
import json
import pickle
import struct
import tarfile
import zipfile
from collections import Counter, OrderedDict, defaultdict
from functools import partial
from pathlib import Path, PurePosixPath

import ml_dtypes
import numpy as np
import pytest
from hostile_pickles import NOTHING_RAN, mutated, program, read_as, refusal_of, text
from hypothesis import given, settings

from nfflax.weights.errors import WeightsError
from nfflax.weights.torch_pickle import read_torch_pickle

GOLDEN = Path(__file__).parents[1] / "golden"
FILES = GOLDEN / "torch_pickles"
SHAPES = json.loads((FILES / "shapes.json").read_text())


@pytest.fixture
def read(tmp_path):
    return partial(read_as, read_torch_pickle, tmp_path / "weights.pth")


@pytest.fixture
def refuse(tmp_path):
    return partial(refusal_of, read_torch_pickle, tmp_path / "weights.pth")


def written(saved: bytes, **records: bytes) -> bytes:
    """The zip format: a pickle, storages (data_0 and so on) and other records."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        for name, content in {"data.pkl": saved, **records}.items():
            file.writestr(f"weights/{name.replace('data_', 'data/')}", content)
    return archive.getvalue()


def formula(shapes: dict, start: int = 0, dtype: type = np.float32) -> dict[str, np.ndarray]:
    return {
        name: (((np.arange(np.prod(shape, dtype=int)) * 7 + n + start) % 31 - 15) / 8)
        .reshape(shape)
        .astype(dtype)
        for n, (name, shape) in enumerate(shapes.items())
    }


def assert_same(arrays, expected):
    assert type(arrays) is dict
    assert list(arrays) == list(expected)
    for name, array in arrays.items():
        assert type(array) is np.ndarray
        assert (array.dtype, array.shape) == (expected[name].dtype, expected[name].shape)
        assert array.dtype.isnative
        assert array.flags.aligned
        assert not array.flags.writeable
        assert array.tobytes() == expected[name].tobytes()


# What is read


def test_state_dict_in_the_legacy_format():
    arrays = read_torch_pickle(FILES / "dm_nfnet_legacy.pth")
    assert_same(arrays, formula(SHAPES["dm_nfnet"]))


def test_prefixes_of_wrappers_are_gone():
    arrays = read_torch_pickle(str(FILES / "nf_regnet_half_wrapped.bin"))
    assert_same(arrays, formula(SHAPES["nf_regnet"], dtype=np.float16))


def test_averaged_weights_come_before_what_they_average():
    """Beside them lie the weights, an optimizer's state, an argparse.Namespace and a score."""
    arrays = read_torch_pickle(FILES / "timm_checkpoint.pth.tar")
    assert_same(arrays, formula(SHAPES["nf_resnet"], start=100))


@pytest.mark.parametrize("name", ["odd_zip", "odd_legacy", "odd_legacy_protocol4"])
def test_odd_tensors(name):
    base = np.arange(24, dtype=np.float32)
    expected = {
        "transposed": base.reshape(4, 6).T,
        "part": base[5:11:2],
        "shared": base,
        "again": base,
        "expanded": np.array([[1] * 5, [2] * 5], np.float32),
        "empty": np.zeros((0, 3), np.float32),
        "scalar": np.array(2.5),
        "parameter": base[:2],
        "bfloat16": base[:5].astype(ml_dtypes.bfloat16),
        "half": base[:5].astype(np.float16),
        "complex64": np.array([1 + 2j], np.complex64),
        "complex128": np.array([3 - 4j]),
        "bool": np.array([True, False, True]),
        "uint8": np.arange(3, dtype=np.uint8),
        "int8": np.arange(-2, 1, dtype=np.int8),
        "int16": np.arange(-2, 1, dtype=np.int16),
        "int32": np.arange(-2, 1, dtype=np.int32),
        "int64": np.arange(-2, 1),
        "uint16": np.array([1, 65535], np.uint16),
    }
    assert_same(read_torch_pickle(FILES / f"{name}.pt"), expected)


def tensor(length: int, storage: str = "Float", key: str = "0") -> bytes:
    """The operations that make a vector from a whole storage."""
    of = b"(" + text("storage") + f"ctorch\n{storage}Storage\n".encode() + text(key) + text("cpu")
    place = b"K\x00" + b"K%c\x85" % length + b"K\x01\x85" + b"\x89N"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + of + b"K%ctQ" % length + place + b"tR"


def dict_of(**entries: bytes) -> bytes:
    return b"}(" + b"".join(text(name) + value for name, value in entries.items()) + b"u"


@pytest.mark.parametrize(
    ("storage", "dtype", "swapped"),
    [
        ("Float", np.dtype("f4"), ">f4"),
        ("BFloat16", np.dtype(ml_dtypes.bfloat16), ">u2"),
        ("ComplexFloat", np.dtype("c8"), ">c8"),
        ("Byte", np.dtype("u1"), "u1"),
    ],
)
def test_big_endian_files(read, storage, dtype, swapped):
    expected = np.array([1, 2, 200]).astype(dtype)
    whole = expected.view("u2") if storage == "BFloat16" else expected
    content = written(
        program(dict_of(w=tensor(3, storage))),
        data_0=whole.astype(swapped).tobytes(),
        byteorder=b"big",
    )
    assert_same(read(content), {"w": expected})


@pytest.mark.parametrize("holder", ["state_dict_ema", "model_ema", "state_dict", "model", "net"])
def test_holders_come_in_timms_order(read, holder):
    order = ["state_dict_ema", "model_ema", "state_dict", "model", "net"]
    later = order[order.index(holder) :][::-1]
    found = {name: dict_of(**{name: tensor(1)}) for name in later}
    absent = {name: b"N" for name in order if name not in later}
    content = written(program(dict_of(**found, **absent, epoch=b"K\x07")), data_0=b"\0\0\x80\x3f")
    assert_same(read(content), {holder: np.ones(1, np.float32)})


def test_values_between_the_tensors_stay_out(read):
    content = written(program(dict_of(w=tensor(1), epoch=b"K\x07", n=b"]")), data_0=b"\0\0\x80\x3f")
    assert_same(read(content), {"w": np.ones(1, np.float32)})


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    "value",
    [
        argparse.Namespace(lr=0.1, size=(1, 2), path=PurePosixPath("/data"), kind={"a", "b"}),
        {0: {"step": 1, "exp": -(2**40)}, 1: None},
        defaultdict(dict, {0: {"step": 1.5}}),
        Counter("abba"),
        OrderedDict(a=1, b=frozenset([2])),
        [1 + 2j, bytearray(b"x"), b"", b"\xff", True],
        np.float64(71.5),
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_beside_the_weights_are_read(read, value, protocol):
    operations = pickle.dumps(value, protocol)[2:-1]
    operations = operations[9:] if operations[:1] == b"\x95" else operations  # its FRAME
    content = dict_of(args=operations, state_dict=dict_of(w=tensor(1)))
    assert_same(read(written(program(content), data_0=b"\0\0\x80\x3f")), {"w": np.ones(1, "f4")})


def test_tensors_of_the_first_releases(read):
    """_rebuild_tensor took no flags."""
    old = tensor(2).replace(b"_rebuild_tensor_v2", b"_rebuild_tensor").replace(b"\x89NtR", b"tR")
    content = written(program(dict_of(w=old)), data_0=np.arange(2, dtype="f4").tobytes())
    assert_same(read(content), {"w": np.arange(2, dtype="f4")})


@pytest.mark.parametrize("protocol", [2, 4])
def test_arrays_of_numpy_are_tensors_too(read, protocol):
    arrays = {"w": np.arange(3.0), "b": np.float32(2)}
    expected = {"w": np.arange(3.0), "b": np.array(2, np.float32)}
    assert_same(read(written(pickle.dumps(arrays, protocol))), expected)


# What is no such file


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("quantised", "A quantised tensor (torch.QInt8Storage) is refused"),
        ("sparse", "A sparse tensor is refused"),
        ("meta", "A tensor without numbers (meta device) is refused"),
        ("conjugated", "A lazily conjugated or negated tensor is refused"),
        ("module", "'torch.nn.modules.linear.Linear' is refused"),
        ("torchscript", "This is a TorchScript program (torch.jit.save), which holds code, and"),
    ],
)
def test_tensors_of_other_kinds(name, problem):
    with pytest.raises(WeightsError) as caught:
        read_torch_pickle(FILES / f"refused_{name}.pt")
    assert problem in str(caught.value)
    assert NOTHING_RAN in str(caught.value)


def npz() -> bytes:
    archive = io.BytesIO()
    np.savez(archive, w=np.ones(3))
    return archive.getvalue()


def tar() -> bytes:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w", format=tarfile.USTAR_FORMAT) as file:
        file.addfile(tarfile.TarInfo("storages"))
    return archive.getvalue()


def plain_zip() -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("weights/notes.txt", "none")
    return archive.getvalue()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "empty. Download it again"),
        (npz(), "This is an .npz of numpy's"),
        (plain_zip(), "holds no data.pkl, so torch.save did not write it"),
        (tar(), "tar archive, as torch's first releases wrote"),
        (b"\n<!DOCTYPE html><html>", "web page or an error message. Download"),
        (struct.pack("<Q", 640) + b'{"w":{"dtype":"F32"', "This is a safetensors file"),
        (b"\x08\x08\x12\x07pytorch\x1a\x06", "This is an ONNX model"),
        (b"\x89HDF\r\n\x1a\n", "HDF5"),
        (b"\x93NUMPY\x01\x00", "This is an array of numpy's"),
        (b"\x1f\x8b\x08\x00", "compressed. Decompress it first"),
        (b"version https://git-lfs.github.com/spec/v1", "Git LFS pointer in place of the file"),
        (pickle.dumps({"w": 1}), "pickle that torch.save did not write, such as DeepMind's"),
        (b"cos\nsystem\n(S'true'\ntR.", "This is no file of torch.save's"),
        (b"\x80\x06N.", "This is no file of torch.save's"),
        (b"PK\x05\x06" + bytes(18), "This is no file of torch.save's"),
    ],
)
def test_other_kinds_of_file(refuse, content, problem):
    assert problem in refuse(content)


def test_weights_of_haiku_are_told_apart(refuse):
    for path in (GOLDEN / "haiku_pickles").glob("*.pkl"):
        assert "such as DeepMind's weights for Haiku" in refuse(path.read_bytes())


def test_file_that_is_not_there(tmp_path):
    with pytest.raises(WeightsError, match=r"none\.pth: 1 problem\n.*No such file"):
        read_torch_pickle(tmp_path / "none.pth")


@pytest.mark.parametrize(
    ("saved", "problem"),
    [
        (b"]", "The file holds (list), and no state dict by itself or under 'state_dict_ema', "),
        (b"}", "The file holds a dict of 0 ()"),
        (dict_of(generator=dict_of(epoch=b"K\x01")), "a dict of 1 ('generator': (dict))"),
        (tensor(1), "The file holds (Tensor)"),
        (b"}K\x01" + tensor(1) + b"s", "A tensor's name is (int), not text of up to 200"),
        (dict_of(**{"w": tensor(1), "module.w": tensor(1)}), "Two tensors have the name 'w'"),
        (dict_of(**{"w" * 201: tensor(1)}), "A tensor's name is (str), not text of up to 200"),
    ],
)
def test_files_without_a_state_dict(refuse, saved, problem):
    assert problem in refuse(written(program(saved), data_0=b"\0\0\x80\x3f"))


@pytest.mark.parametrize(
    "records",
    [
        {},
        {"data_0": bytes(11)},
        {"data_0": bytes(13)},
        {"data_1": bytes(12)},
        {"data_0": bytes(12), "byteorder": b"middle"},
    ],
)
def test_records_that_do_not_fit(refuse, records):
    assert "incomplete or damaged" in refuse(written(program(dict_of(w=tensor(3))), **records))


def test_damaged_numbers(refuse):
    content = bytearray((FILES / "odd_zip.pt").read_bytes())
    content[content.index(np.arange(24, dtype=np.float32).tobytes()) + 7] ^= 1
    assert "do not fit their checksum" in refuse(bytes(content))


@pytest.mark.parametrize("name", ["odd_zip", "odd_legacy"])
def test_truncation(refuse, name):
    content = (FILES / f"{name}.pt").read_bytes()
    for length in range(4, len(content), 29):
        message = refuse(content[:length])
        assert "incomplete or damaged" in message or "torch.save did not write" in message


# What chance makes of a file

ODD = (FILES / "odd_zip.pt").read_bytes()
LEGACY = (FILES / "odd_legacy.pt").read_bytes()
with zipfile.ZipFile(io.BytesIO(ODD)) as _archive:
    RECORDS = {name.partition("/")[2]: _archive.read(name) for name in _archive.namelist()}
SAVED = RECORDS.pop("data.pkl")
WRAPPED = mutated([SAVED]).map(lambda saved: written(saved, **RECORDS))  # with fitting checksums


def assert_valid_or_refused(path: Path, content: bytes):
    path.write_bytes(content)
    try:
        arrays = read_torch_pickle(path)
    except WeightsError:
        return
    for name, array in arrays.items():
        assert isinstance(name, str)
        assert type(array) is np.ndarray
        assert array.nbytes <= 8 * len(content) + 2**20
        array.tobytes()


@settings(max_examples=60)
@given(content=mutated([ODD, LEGACY]) | WRAPPED)
def test_mutated_files_are_valid_or_refused(tmp_path_factory, content):
    assert_valid_or_refused(tmp_path_factory.getbasetemp() / "mutated.pth", content)


@pytest.mark.slow
@settings(max_examples=2000)
@given(content=mutated([ODD, LEGACY]) | WRAPPED)
def test_many_mutated_files_are_valid_or_refused(tmp_path_factory, content):
    assert_valid_or_refused(tmp_path_factory.getbasetemp() / "mutated.pth", content)
