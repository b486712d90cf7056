"""The two formats of torch.save: a pickle, and the bytes of the storages that it speaks of.

Since torch 1.6 a file is an uncompressed zip archive: NAME/data.pkl, NAME/data/KEY for each storage
and NAME/byteorder. Before, and today with _use_new_zipfile_serialization=False, it is a sequence:
three pickles that say what it is, the pickle itself, a pickle of the keys, and then for each key a
count of numbers and the numbers (torch/serialization.py).
"""

import functools
import mmap
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import IO, Any, Literal, cast

import numpy as np

from nfflax.weights.pickle_machine import RefusedError, refusal, run, shown

MAGIC = 0x1950A86A20F9469CFC6C  # opens the legacy format, and nothing else
MAGIC_BYTES = MAGIC.to_bytes(10, "little")

_LEGACY_VERSION = 1001
_ENCRYPTED, _UTF8 = 0x1, 0x800  # flags of a zip record
_LOCAL_HEADER = struct.Struct("<4s22x2H")  # before each record: its mark, 2 lengths that follow


@dataclass(frozen=True)
class Storage:
    """Numbers in a row, which tensors are views of."""

    key: str
    dtype: np.dtype
    length: int

    @property
    def nbytes(self) -> int:
        return self.length * self.dtype.itemsize


@dataclass(frozen=True)
class Archive:
    """What torch.save was given, and the bytes of its storages, in one byte order."""

    saved: Any
    bytes_of: Callable[[str], memoryview]
    byte_order: Literal["<", ">"]


# Runs a pickle: its value, and the storages that it speaks of, by key.
Load = Callable[[bytes | mmap.mmap], tuple[Any, Mapping[str, Storage]]]


def open_archive(file: mmap.mmap, load: Load) -> Archive:
    """Either format."""
    return _open_zip(file, load) if file[:2] == b"PK" else _open_legacy(file, load)


def _open_zip(file: mmap.mmap, load: Load) -> Archive:
    records = _records(file)
    saved, storages = load(bytes(_content(file, records["data.pkl"])))
    order = b"little"  # of the files of older releases, which do not say
    if "byteorder" in records:
        order = bytes(_content(file, records["byteorder"]))
    if order not in (b"little", b"big"):
        raise ValueError("a byte order that is neither little nor big")

    @functools.cache
    def bytes_of(key: str) -> memoryview:
        content = _content(file, records[f"data/{key}"])
        if content.nbytes != storages[key].nbytes:
            raise ValueError(f"{content.nbytes} bytes for a storage of {storages[key].nbytes}")
        return content

    return Archive(saved, bytes_of, "<" if order == b"little" else ">")


def _records(file: mmap.mmap) -> dict[str, zipfile.ZipInfo]:
    """The zip archive's records under their names in its one folder."""
    with zipfile.ZipFile(cast(IO[bytes], file)) as archive:
        infos = archive.infolist()
    names = [info.filename for info in infos]
    inner = {name.partition("/")[2] for name in names}
    if names and all(name.endswith(".npy") for name in names):
        raise RefusedError("This is an .npz of numpy's, and no file of torch.save's.")
    if "constants.pkl" in inner or any(name.startswith("code/") for name in inner):
        raise RefusedError(
            "This is a TorchScript program (torch.jit.save), which holds code, and nothing in the"
            " file was executed. If you trust it, save its weights alone:"
            " torch.save(torch.jit.load(path).state_dict(), new_path)."
        )
    if "data.pkl" not in inner:
        raise RefusedError("This zip archive holds no data.pkl, so torch.save did not write it.")
    records = {}
    for info in infos:
        folder, _, name = info.filename.partition("/")
        if stat.S_ISLNK(info.external_attr >> 16):
            raise refusal(f"Record {shown(info.filename)}, a symbolic link,")
        if not folder or ".." in info.filename.split("/") or "\\" in info.filename:
            raise refusal(f"Record {shown(info.filename)}, outside the archive,")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & _ENCRYPTED:
            how = "encrypted" if info.flag_bits & _ENCRYPTED else "compressed"
            what = f"Record {shown(info.filename)}, which is {how} as torch.save never does,"
            raise refusal(what)
        if name in records:
            raise refusal(f"Record {shown(name)}, which the archive has twice,")
        records[name] = info
    return records


def _content(file: mmap.mmap, info: zipfile.ZipInfo) -> memoryview:
    """A record's bytes, uncopied."""
    start = info.header_offset + _LOCAL_HEADER.size
    mark, name_length, extra_length = _LOCAL_HEADER.unpack(file[info.header_offset : start])
    name = file[start : start + name_length]
    if mark != b"PK\x03\x04" or len(name) != name_length:
        raise zipfile.BadZipFile("a record without its header")
    if name.decode("utf-8" if info.flag_bits & _UTF8 else "cp437") != info.orig_filename:
        raise refusal(f"Record {shown(info.filename)}, which has another name in its header,")
    start += name_length + extra_length
    content = memoryview(file)[start : start + info.file_size]
    if content.nbytes != info.file_size:
        raise zipfile.BadZipFile("a record that ends beyond the file")
    # torch.serialization.set_crc32_options(False) writes zeros.
    if info.CRC and zlib.crc32(content) != info.CRC:
        raise zipfile.BadZipFile(f"bytes of {shown(info.filename)} that do not fit their checksum")
    return content


def _open_legacy(file: mmap.mmap, load: Load) -> Archive:
    magic, version, _system = (run(file, {}) for _ in range(3))
    if (type(magic), type(version)) != (int, int) or (magic, version) != (MAGIC, _LEGACY_VERSION):
        raise ValueError("a file of torch.save's without its magic number or version")
    saved, storages = load(file)
    keys = run(file, {})
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise ValueError("storages under keys that are no text")
    contents, start = {}, file.tell()
    for key in keys:
        (length,) = struct.unpack("<q", file[start : start + 8])
        if length != storages[key].length:
            raise ValueError(f"{length} numbers for a storage of {storages[key].length}")
        contents[key] = memoryview(file)[start + 8 : start + 8 + storages[key].nbytes]
        start += 8 + storages[key].nbytes
    if start > len(file):
        raise EOFError("storages that end beyond the file")
    return Archive(saved, contents.__getitem__, "<")  # big-endian machines swap what they write
