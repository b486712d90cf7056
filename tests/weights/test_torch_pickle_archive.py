"""No zip archive given as torch.save's leads its reader outside the file or fills the memory."""

import stat
import struct
import tracemalloc
import zipfile
from functools import partial

import pytest
from hostile_pickles import program, refusal_of, written

from nfflax.weights.torch_pickle import read_torch_pickle

SAVED = program(b"}")


@pytest.fixture
def refuse(tmp_path):
    return partial(refusal_of, read_torch_pickle, tmp_path / "weights.pth")


def link() -> zipfile.ZipInfo:
    record = zipfile.ZipInfo("w/data/0")
    record.external_attr = (stat.S_IFLNK | 0o777) << 16
    return record


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ("../data/0", "Record '../data/0', outside the archive, is refused"),
        ("w/../../data/0", "Record 'w/../../data/0', outside the archive, is refused"),
        ("/w/data/0", "Record '/w/data/0', outside the archive, is refused"),
        ("w/data\\0", "outside the archive, is refused"),
        (link(), "Record 'w/data/0', a symbolic link, is refused"),
        ("x/data.pkl", "Record 'data.pkl', which the archive has twice, is refused"),
        ("w/code/__torch__.py", "This is a TorchScript program"),
        ("w/constants.pkl", "This is a TorchScript program"),
    ],
)
def test_records(refuse, record, problem):
    assert problem in refuse(written(SAVED, (record, bytes(16))))


def test_two_pickles(refuse):
    with pytest.warns(UserWarning, match="Duplicate name"):
        content = written(SAVED, ("w/data.pkl", SAVED))
    assert "Record 'data.pkl', which the archive has twice, is refused" in refuse(content)


def test_a_compressed_bomb(refuse):
    """100 MB of zeros in 100 kB."""
    zeros = ("w/data/0", bytes(10**8))
    content = written(SAVED, zeros, compression=zipfile.ZIP_DEFLATED, compresslevel=1)
    tracemalloc.start()
    try:
        assert "which is compressed as torch.save never does, is refused" in refuse(content)
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


def test_a_record_with_two_names(refuse):
    content = written(SAVED)
    at = content.index(b"w/data.pkl")  # in its header; the directory at the end has the other
    hidden = content[:at] + b"w/more.pkl" + content[at + 10 :]
    assert "which has another name in its header, is refused" in refuse(hidden)


@pytest.mark.parametrize("size", [2**20, 2**32 - 2])
def test_a_record_that_ends_beyond_the_file(refuse, size):
    content = bytearray(written(SAVED))
    at = content.rindex(b"PK\x01\x02") + 20  # the sizes in the directory
    content[at : at + 8] = struct.pack("<2L", size, size)
    assert "record that ends beyond the file" in refuse(bytes(content))
