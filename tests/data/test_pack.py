"""Packed records: what comes back, what an interruption leaves, and that damage is seen."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nfflax.data import ArraySource, Data, DataError, ImageError, Record, open_source, pack_split
from nfflax.data.records import RecordSource
from nfflax.data.sources import splits_of


class Files:
    """Records of bytes, one of which may not be readable."""

    class_names = ("even", "odd")

    def __init__(self, count: int, fails_at: int | None = None):
        self._count, self.fails_at = count, fails_at

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Record:
        if index == self.fails_at:
            raise ImageError("cannot be read", f"{index}.jpeg")
        return Record(bytes([index]) * (index + 1), index % 2, f"dir/é{index}.jpeg")


def opened(folder: Path, split: str = "train") -> RecordSource:
    source = open_source(Data(source=str(folder)), split)
    assert isinstance(source, RecordSource)
    return source


def damage(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_what_is_packed_comes_back(tmp_path):
    seen = []
    manifest = pack_split(Files(25), tmp_path, "train", shard_images=10, progress=seen.append)
    assert sum(seen) == 25
    assert [shard["images"] for shard in manifest["shards"]] == [10, 10, 5]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "train-00000.arrayrecord",
        "train-00001.arrayrecord",
        "train-00002.arrayrecord",
        "train.json",
    ]
    source = opened(tmp_path)
    assert (len(source), source.class_names) == (25, ("even", "odd"))
    assert [source[index] for index in range(25)] == [Files(25)[index] for index in range(25)]
    assert splits_of(Data(source=str(tmp_path))) == ("train",)
    assert source.damaged_shards() == []
    with pytest.raises(DataError, match="did you mean: train"):
        opened(tmp_path, "trian")


def test_arrays_are_packed_without_loss(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 7, 1), dtype=np.uint8)
    pack_split(ArraySource(pixels, np.array([0, 1, 0])), tmp_path, "test")
    record = opened(tmp_path, "test")[1]
    assert isinstance(record.image, bytes)
    np.testing.assert_array_equal(
        np.asarray(Image.open(io.BytesIO(record.image))), pixels[1, ..., 0]
    )
    assert record.label == 1


def test_an_interrupted_packing_goes_on(tmp_path):
    packed = []

    def stop(_: int) -> None:
        packed.append(1)
        if len(packed) == 18:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack_split(Files(25), tmp_path, "train", shard_images=5, progress=stop)
    assert not (tmp_path / "train.json").exists()  # no source yet
    whole = sorted(tmp_path.glob("*.arrayrecord"))
    assert len(whole) == 3
    times = [path.stat().st_mtime_ns for path in whole]
    manifest = pack_split(Files(25), tmp_path, "train", shard_images=5)
    assert [path.stat().st_mtime_ns for path in whole] == times
    assert [opened(tmp_path)[index].label for index in range(25)] == [i % 2 for i in range(25)]
    assert not list(tmp_path.glob("*.tmp")) + list(tmp_path.glob("*.partial"))
    assert pack_split(Files(25), tmp_path, "train", shard_images=5) == manifest


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(DataError, match=r"17\.jpeg"):
        pack_split(Files(25, fails_at=17), tmp_path, "train")


def test_only_what_is_missing_is_packed_again(tmp_path):
    manifest = pack_split(Files(25), tmp_path, "train", shard_images=10)
    gone, cut = tmp_path / "train-00000.arrayrecord", tmp_path / "train-00002.arrayrecord"
    kept = (tmp_path / "train-00001.arrayrecord").stat().st_mtime_ns
    gone.unlink()
    cut.write_bytes(cut.read_bytes()[:-1])
    with pytest.raises(DataError, match="2 problems in the data") as caught:
        opened(tmp_path)
    assert ["is missing" in str(p) for p in caught.value.problems] == [True, False]
    assert pack_split(Files(25), tmp_path, "train", shard_images=10) == manifest
    assert (tmp_path / "train-00001.arrayrecord").stat().st_mtime_ns == kept
    assert opened(tmp_path)[24] == Files(25)[24]


def test_damage_is_seen(tmp_path):
    pack_split(Files(200), tmp_path, "train", shard_images=100)
    path = tmp_path / "train-00001.arrayrecord"
    damage(path, path.stat().st_size // 2)
    source = opened(tmp_path)
    assert [problem.file for problem in source.damaged_shards()] == [str(path)]
    bad, reasons = [], set()
    for index in range(200):
        try:
            assert source[index] == Files(200)[index]
        except ImageError as error:
            bad.append(index)
            reasons.add(error.reason.partition(":")[0])
    assert reasons == {"is damaged"}
    assert min(bad) >= 100


@pytest.mark.parametrize(
    "other", [Files(26), ArraySource(np.zeros((25, 2, 2), np.uint8), np.zeros(25, int))]
)
def test_another_source_is_not_mixed_in(tmp_path, other):
    pack_split(Files(25), tmp_path, "train")
    before = (tmp_path / "train.json").read_bytes()
    with pytest.raises(DataError, match="holds another packing"):
        pack_split(other, tmp_path, "train")
    assert (tmp_path / "train.json").read_bytes() == before


def test_a_foreign_json_is_no_split(tmp_path):
    pack_split(Files(2), tmp_path, "train")
    (tmp_path / "notes.json").write_text(json.dumps({"format": "mine"}))
    (tmp_path / "broken.json").write_text("{")
    assert splits_of(Data(source=str(tmp_path))) == ("train",)
    with pytest.raises(DataError, match="holds another packing"):
        pack_split(Files(2), tmp_path, "broken")
