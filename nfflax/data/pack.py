"""Packing a source into ArrayRecord files: large files read faster than a million small ones.

A file is written under a temporary name and renamed when it is whole; the manifest comes last. A
packing that was interrupted goes on after the last whole file.
"""

import hashlib
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from nfflax.data.errors import DataError, ImageError
from nfflax.data.records import FORMAT, checksum, pack_record
from nfflax.data.sources import Record, Source
from nfflax.spec.errors import Problem

SHARD_IMAGES = 8192  # about 900 MB of ImageNet
_SAMPLED = 32  # records that a source is known again by
# One record per chunk can be read by itself, and JPEGs do not compress further.
_WRITER_OPTIONS = "group_size:1,uncompressed"


def pack_split(
    source: Source,
    folder: Path,
    split: str,
    *,
    shard_images: int = SHARD_IMAGES,
    progress: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """Write a split's records and return its manifest; `progress` hears of each image packed.

    Goes on where an earlier call with the same source stopped; a finished split is left as it is.
    """
    plan = {
        "format": FORMAT,
        "class_names": list(source.class_names),
        "images": len(source),
        "fingerprint": _fingerprint(source),
        "shard_images": shard_images,
    }
    folder.mkdir(parents=True, exist_ok=True)
    manifest, partial = folder / f"{split}.json", folder / f"{split}.json.partial"
    earlier = _earlier(partial if partial.exists() else manifest, plan)
    whole = {shard["file"]: shard for shard in earlier if _is_whole(folder, shard)}
    shards = []
    for start in range(0, len(source), shard_images):
        indices = range(start, min(start + shard_images, len(source)))
        file = f"{split}-{start // shard_images:05d}.arrayrecord"
        if file in whole:
            shards.append(whole[file])
            progress(len(indices))
        else:
            shards.append(_write_shard(source, folder / file, indices, progress))
            rest = [shard for name, shard in whole.items() if name > file]
            _write_json(partial, plan | {"shards": shards + rest})
    _write_json(manifest, plan | {"shards": shards})
    partial.unlink(missing_ok=True)
    return plan | {"shards": shards}


def _write_shard(
    source: Source, path: Path, indices: range, progress: Callable[[int], None]
) -> dict[str, Any]:
    from array_record.python.array_record_module import ArrayRecordWriter

    temporary = path.with_suffix(".tmp")
    writer = ArrayRecordWriter(str(temporary), _WRITER_OPTIONS)
    try:
        for index in indices:
            writer.write(pack_record(_encoded(source, index)))
            progress(1)
    finally:
        writer.close()
    os.replace(temporary, path)
    size = path.stat().st_size
    return {"file": path.name, "images": len(indices), "bytes": size, "sha256": checksum(path)}


def _encoded(source: Source, index: int) -> Record:
    """The record with its image as a file's bytes; pixels become a PNG, which loses nothing."""
    try:
        record = source[index]
    except ImageError as error:
        raise DataError([Problem(error.name or f"image {index}", "", error.reason)]) from None
    if isinstance(record.image, bytes):
        return record
    pixels = record.image[..., 0] if record.image.shape[2:] == (1,) else record.image
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, format="PNG")
    return record._replace(image=file.getvalue())


def _earlier(manifest: Path, plan: dict[str, Any]) -> list[dict[str, Any]]:
    """The files that an earlier packing of the same source finished."""
    if not manifest.exists():
        return []
    try:
        earlier = json.loads(manifest.read_text("utf-8"))
        different = [key for key, value in plan.items() if earlier.get(key) != value]
        shards = list(earlier["shards"])
    except (ValueError, AttributeError, KeyError, TypeError):
        different, shards = ["format"], []
    if different:
        message = f"holds another packing, with other {', '.join(different)}"
        allowed = "an empty folder, or the same source and options as before"
        raise DataError([Problem(str(manifest), "", message, allowed=allowed)])
    return shards


def _fingerprint(source: Source) -> str:
    """A checksum of a few records all over the source, to know it again."""
    digest = hashlib.sha256()
    for index in range(0, len(source), max(len(source) // _SAMPLED, 1)):
        digest.update(pack_record(_encoded(source, index)))
    return digest.hexdigest()


def _is_whole(folder: Path, shard: dict[str, Any]) -> bool:
    path = folder / shard["file"]
    return path.is_file() and path.stat().st_size == shard["bytes"]


def _write_json(path: Path, data: dict[str, Any]) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(json.dumps(data, indent=1), encoding="utf-8")
    os.replace(temporary, path)
