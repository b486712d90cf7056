"""safetensors files: what is written is what their own package reads; what is wrong is said."""

import json
import resource
import struct

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from golden_data import assert_equal

from nfflax.weights import WeightsError
from nfflax.weights.safetensors import read_safetensors, write_safetensors

GRID = np.arange(12, dtype=np.float32).reshape(3, 4)
ARRAYS = {
    "kernel": GRID,
    "transposed": GRID.T,
    "every second": GRID[:, ::2],
    "fortran": np.asfortranarray(GRID),
    "scalar": np.asarray(np.float32(0.5)),  # as timm's skipinit_gain
    "empty": np.zeros((0, 3), np.float32),
    "half": GRID.astype(np.float16),
    "bfloat16": GRID.astype(ml_dtypes.bfloat16),
    "double": GRID.astype(np.float64),
    "big endian": GRID.astype(">f4"),
    "int64": np.arange(3),
    "uint8": np.arange(3, dtype=np.uint8),
    "bool": np.array([True, False]),
    "ünïcode": np.ones(2, np.float32),
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def test_everything_comes_back(path):
    write_safetensors(path, ARRAYS, {"format": "nfflax", "ä": "ö"})
    arrays, metadata = read_safetensors(path)
    assert metadata == {"format": "nfflax", "ä": "ö"}
    assert_equal(arrays, {name: np.array(array) for name, array in ARRAYS.items()})
    for name, array in arrays.items():
        assert array.dtype == ARRAYS[name].dtype.newbyteorder("=")


def test_arrays_are_copies(path):
    """A file that changes later changes nothing that was read."""
    write_safetensors(path, {"a": GRID})
    arrays, _ = read_safetensors(path)
    path.write_bytes(b"\xff" * path.stat().st_size)
    assert_equal(arrays["a"], GRID)


def test_arrays_of_jax_and_no_metadata(path):
    write_safetensors(path, {"a": jnp.ones(3)})
    arrays, metadata = read_safetensors(path)
    assert_equal(arrays, {"a": np.ones(3, np.float32)})
    assert metadata == {}


def test_equal_content_makes_equal_bytes(path):
    metadata = {str(number): "x" for number in range(8)}
    write_safetensors(path, ARRAYS, metadata)
    first = path.read_bytes()
    write_safetensors(path, dict(reversed(ARRAYS.items())), dict(reversed(metadata.items())))
    assert path.read_bytes() == first
    start = 8 + int.from_bytes(first[:8], "little")
    assert start % 8 == 0  # arrays lie aligned, for readers that map them


def file_of(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(start, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"PK\x03\x04 and so on", "a pickle or a zip"),
        (b"\x80\x02}q\x00.", "a pickle or a zip"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
        (b"hello", "no whole safetensors file"),
        (struct.pack("<Q", 1 << 60) + b"{", "no whole safetensors file"),  # a huge header
        (file_of({"a": entry(0, 8)}, b"\0" * 7), "no whole safetensors file"),  # truncated
        (file_of({"a": entry(0, 8)}, b"\0" * 9), "no whole safetensors file"),  # bytes left over
        (file_of({"a": entry(0, 8), "b": entry(4, 12)}, b"\0" * 12), "no whole safetensors"),
        (file_of({"a": entry(0, 8, [1 << 40, 1 << 40])}, b"\0" * 8), "no whole safetensors"),
        (file_of(b'{"a": [}'), "no whole safetensors file"),
        (file_of({"a": entry(0, 2, dtype="F8_E4M3")}, b"\0" * 2), "'a' holds F8_E4M3"),
    ],
)
def test_what_is_no_such_file(path, content, message):
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=message) as caught:
        read_safetensors(path)
    assert len(caught.value.problems) == 1
    assert caught.value.source == str(path)


def test_a_header_may_begin_like_another_kind_of_file(path):
    """Its first bytes are a length: 60 is "<", with which web pages begin."""
    text = json.dumps({"a": entry(0, 8)}, separators=(",", ":")).encode().ljust(0x3C)
    path.write_bytes(file_of(text, np.ones(2, np.float32).tobytes()))
    assert path.read_bytes()[:1] == b"<"
    assert_equal(read_safetensors(path)[0], {"a": np.ones(2, np.float32)})


def test_no_file_and_a_folder(path):
    with pytest.raises(WeightsError, match="No such file"):
        read_safetensors(path)
    with pytest.raises(WeightsError, match="Is a directory"):
        read_safetensors(path.parent)


def test_what_cannot_be_written_is_said_and_leaves_nothing(path):
    with pytest.raises(WeightsError) as caught:
        write_safetensors(path, {"a": GRID, "b": np.array(["x"]), "__metadata__": GRID})
    assert len(caught.value.problems) == 2
    with pytest.raises(WeightsError, match="No such file"):
        write_safetensors(path / "below" / "nothing", {"a": GRID})
    assert list(path.parent.iterdir()) == []


def test_a_disk_without_room_keeps_the_old_file(path):
    write_safetensors(path, {"a": GRID})
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(WeightsError, match="cannot be written: File too large"):
            write_safetensors(path, {"a": np.zeros(1000, np.float32)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_without_the_package_the_extra_is_named(path, monkeypatch):
    write_safetensors(path, {"a": GRID})
    monkeypatch.setitem(__import__("sys").modules, "safetensors", None)
    with pytest.raises(WeightsError, match=r'pip install "nfflax\[hub\]"'):
        read_safetensors(path)
