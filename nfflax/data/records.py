"""Packed records: a split as a few ArrayRecord files and a manifest that says what is in them.

`<split>.json` names the classes and, for every file, its records, bytes and checksum. A record is
the label (int32), the length of the name (uint16), both little-endian, the name, and the image.
"""

import hashlib
import json
import struct
from pathlib import Path
from typing import Any, NamedTuple

from nfflax.data.errors import DataError, ImageError
from nfflax.data.sources import Record, unknown_split
from nfflax.spec.errors import Problem

FORMAT = "nfflax records 1"
_HEADER = struct.Struct("<iH")
_BLOCK = 1 << 20


class _File(NamedTuple):
    """What array_record calls a FileInstruction: a file of known length need not be opened yet."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


class RecordSource:
    """One split that `nfflax data pack` wrote."""

    def __init__(self, folder: Path, split: str):
        from grain.sources import ArrayRecordDataSource

        manifest = read_manifest(folder, split)
        self.class_names = tuple(manifest["class_names"])
        self._images = sum(shard["images"] for shard in manifest["shards"])
        self._checksums = {folder / s["file"]: s["sha256"] for s in manifest["shards"]}
        problems = []
        for path, shard in zip(self._checksums, manifest["shards"], strict=True):
            size = path.stat().st_size if path.is_file() else None
            if size != shard["bytes"]:
                message = "is missing" if size is None else f"has {size} bytes: it was cut short"
                allowed = f"{shard['bytes']} bytes; packing again mends it"
                problems.append(Problem(str(path), "", message, allowed=allowed))
        if problems:
            raise DataError(problems)
        counts = [shard["images"] for shard in manifest["shards"]]
        files: list[Any] = [
            _File(str(path), 0, count, count)
            for path, count in zip(self._checksums, counts, strict=True)
        ]
        self._records = ArrayRecordDataSource(files)

    def __len__(self) -> int:
        return self._images

    def __getitem__(self, index: int) -> Record:
        try:
            return unpack_record(self._records[index])
        except RuntimeError as error:  # a record's own checksum does not match
            raise ImageError(f"is damaged: {error}", f"record {index}") from None

    def damaged_shards(self) -> list[Problem]:
        """Every file whose checksum is not the one that it was packed with."""
        message = "is damaged: its checksum is not the manifest's"
        allowed = "delete the file and pack again: only what is missing is packed"
        return [
            Problem(str(path), "", message, allowed=allowed)
            for path, packed in self._checksums.items()
            if checksum(path) != packed
        ]


def pack_record(record: Record) -> bytes:
    """A record with an encoded image as bytes."""
    assert isinstance(record.image, bytes)
    name = record.name.encode()[-0xFFFF:]
    return _HEADER.pack(record.label, len(name)) + name + record.image


def unpack_record(packed: bytes) -> Record:
    """The record that `pack_record` packed."""
    label, length = _HEADER.unpack_from(packed)
    end = _HEADER.size + length
    return Record(packed[end:], label, packed[_HEADER.size : end].decode(errors="replace"))


def splits_in(folder: Path) -> tuple[str, ...]:
    """The splits packed in a folder."""
    manifests = (path for path in sorted(folder.glob("*.json")) if path.is_file())
    return tuple(path.stem for path in manifests if _is_manifest(path))


def read_manifest(folder: Path, split: str) -> dict[str, Any]:
    """What a packed split says of itself."""
    path = folder / f"{split}.json"
    if split not in (known := splits_in(folder)):
        raise unknown_split(str(folder), split, known)
    return json.loads(path.read_text("utf-8"))


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _is_manifest(path: Path) -> bool:
    try:
        data = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(data, dict) and data.get("format") == FORMAT
