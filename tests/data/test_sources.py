"""Where images come from: what each source gives, and how it says that it cannot."""

import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from nfflax.data import ArraySource, Data, DataError, ImageError, open_source
from nfflax.data.sources import TEST_DIGITS, splits_of


def images(count: int, *shape: int) -> np.ndarray:
    size = (count, *shape)
    return np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """Write files, each with its own path as content."""

    def write(*paths: str) -> Path:
        for path in paths:
            file = tmp_path / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(path.encode())
        return tmp_path

    return write


def content(source) -> list[tuple[str, int]]:
    """What each record's file says, and its label."""
    return [
        (record.image.decode(), record.label)
        for record in map(source.__getitem__, range(len(source)))
    ]


# Arrays


def test_arrays():
    pixels = images(5, 4, 6, 3)
    source = ArraySource(pixels, np.array([0, 2, 1, 2, 0]))
    assert (len(source), source.class_names) == (5, ("0", "1", "2"))
    record = source[3]
    np.testing.assert_array_equal(record.image, pixels[3])
    assert (record.label, record.name) == (2, "image 3")
    assert ArraySource(pixels, np.zeros(5, int), ["a", "b"]).class_names == ("a", "b")


@pytest.mark.parametrize(
    ("pixels", "labels", "says"),
    [
        (images(2, 4, 4).astype(float), np.zeros(2, int), "arrays: images"),
        (images(2, 4, 4, 5), np.zeros(2, int), "uint8 (N, H, W)"),
        (images(2, 4, 4), np.zeros(3, int), "arrays: labels"),
        (images(2, 4, 4), np.zeros(2), "whole numbers"),
        (images(2, 4, 4), np.array([0, 7]), "0 to 1"),
    ],
)
def test_arrays_of_the_wrong_form(pixels, labels, says: str):
    with pytest.raises(DataError, match="1 problem in the data") as caught:
        ArraySource(pixels, labels, ["a", "b"])
    assert says in str(caught.value)


# Folders


def test_a_folder_per_class(folder):
    root = folder("train/b/2.png", "train/a/1.JPG", "train/a/deep/0.jpeg", "train/a/readme.md")
    source = open_source(Data(source=str(root)), "train")
    assert source.class_names == ("a", "b")
    assert content(source) == [
        ("train/a/1.JPG", 0),
        ("train/a/deep/0.jpeg", 0),
        ("train/b/2.png", 1),
    ]
    assert source[2].name == str(root / "train/b/2.png")
    assert splits_of(Data(source=str(root))) == ("train",)
    assert content(pickle.loads(pickle.dumps(source))) == content(source)


def test_labels_are_those_of_the_training_split(folder):
    root = folder("train/a/1.png", "train/b/1.png", "train/c/1.png", "test/c/2.png")
    source = open_source(Data(source=str(root)), "test")
    assert content(source) == [("test/c/2.png", 2)]
    folder("test/d/3.png")
    with pytest.raises(DataError, match="is no class of the index"):
        open_source(Data(source=str(root)), "test")


def test_a_class_index_orders_the_labels(folder):
    root = folder("train/n01/1.png", "train/n02/1.png")
    index = root / "synsets.txt"
    index.write_text("n02 tench, Tinca tinca\nn03\n\nn01 goldfish\n")
    data = Data(source=str(root), classes=str(index))
    source = open_source(data, "train")
    assert source.class_names == ("tench, Tinca tinca", "n03", "goldfish")
    assert content(source) == [("train/n01/1.png", 2), ("train/n02/1.png", 0)]
    index.write_text("n01\nn01\n")
    with pytest.raises(DataError, match="stands there twice"):
        open_source(data, "train")
    with pytest.raises(DataError, match="cannot be read"):
        open_source(Data(source=str(root), classes=str(root / "no.txt")), "train")


def test_a_list_of_files(folder):
    root = folder("train/dog/1.png", "train/cat/1.png", "flat/x y.png", "flat/z.png")
    (root / "val.txt").write_text("flat/x y.png dog\ntrain/cat/1.png\n\nflat/z.png\t0\n")
    source = open_source(Data(source=str(root)), "val.txt")
    assert source.class_names == ("cat", "dog")
    assert content(source) == [("flat/x y.png", 1), ("train/cat/1.png", 0), ("flat/z.png", 0)]
    (root / "train.txt").write_text("flat/x y.png 1\nflat/z.png 12\n")
    numbered = open_source(Data(source=str(root), train="train.txt"), "train.txt")
    assert len(numbered.class_names) == 13
    assert content(numbered) == [("flat/x y.png", 1), ("flat/z.png", 12)]
    (root / "bad.txt").write_text("flat/z.png doog\nflat/z.png 5\n")
    with pytest.raises(DataError, match="did you mean: dog") as caught:
        open_source(Data(source=str(root)), "bad.txt")
    assert [problem.key for problem in caught.value.problems] == ["line 1", "line 2"]


def test_what_is_wrong_with_folders(folder, tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        open_source(Data(source=str(tmp_path / "nowhere")), "train")
    root = folder("train/a/1.png", "validation/a/1.png")
    with pytest.raises(DataError, match="did you mean: validation"):
        open_source(Data(source=str(root)), "validaton")
    folder("empty/a/readme.md")
    with pytest.raises(DataError, match="holds no images"):
        open_source(Data(source=str(root)), "empty")
    source = open_source(Data(source=str(root)), "train")
    (root / "train/a/1.png").unlink()
    with pytest.raises(ImageError, match=r"1\.png cannot be read: No such file"):
        source[0]


# Digits


def test_digits():
    train, test = (open_source(Data(), split) for split in splits_of(Data()))
    assert (len(train), len(test)) == (1797 - TEST_DIGITS, TEST_DIGITS)
    assert train.class_names == tuple("0123456789")
    for source in (train, test):  # every class in its share, no image in both
        counts = np.bincount([source[i].label for i in range(len(source))])
        assert counts.min() > 0.07 * len(source)
    images = [np.asarray(s[i].image).tobytes() for s in (train, test) for i in range(len(s))]
    assert len(set(images)) == 1797
    image = train[0].image
    assert isinstance(image, np.ndarray)
    assert (image.shape, image.dtype, image.max()) == ((8, 8), np.uint8, 239)
    with pytest.raises(DataError, match="did you mean: test"):
        open_source(Data(), "tests")


# Libraries


class Label:
    names = ("cat", "dog")


def stand_in(monkeypatch, name: str, **attributes) -> None:
    module = ModuleType(name)
    vars(module).update(attributes)
    monkeypatch.setitem(sys.modules, name, module)


def test_tensorflow_datasets(monkeypatch):
    examples = [{"image": b"one", "label": np.int64(1)}, {"image": images(1, 2, 2)[0], "label": 0}]
    asked = {}

    class Builder:
        info = SimpleNamespace(
            splits={"train": 0, "test": 0}, features={"image": 0, "label": Label()}
        )

        def as_data_source(self, **options):
            asked.update(options)
            return examples

    decode = SimpleNamespace(SkipDecoding=lambda: "undecoded")
    stand_in(monkeypatch, "tensorflow_datasets", builder=lambda name: Builder(), decode=decode)
    source = open_source(Data(source="tfds:pets"), "train[10:]")
    assert asked == {"split": "train[10:]", "decoders": {"image": "undecoded"}}
    assert (len(source), source.class_names) == (2, ("cat", "dog"))
    assert source[0] == (b"one", 1, "pets/train[10:] example 0")
    assert isinstance(source[1].image, np.ndarray)
    with pytest.raises(DataError, match="did you mean: train"):
        open_source(Data(source="tfds:pets"), "trian")


def test_hugging_face(monkeypatch, tmp_path):
    (tmp_path / "two.jpeg").write_bytes(b"two")
    examples = [
        {"img": {"bytes": b"one", "path": None}, "label": 1},
        {"img": {"bytes": None, "path": str(tmp_path / "two.jpeg")}, "label": 0},
        {"img": {"bytes": None, "path": str(tmp_path / "gone.jpeg")}, "label": 0},
    ]

    class Examples(list):
        features = {"img": 0, "label": Label()}  # noqa: RUF012

        def cast_column(self, key, feature):
            assert (key, feature) == ("img", "undecoded")
            return self

    stand_in(
        monkeypatch,
        "datasets",
        load_dataset=lambda name, split: Examples(examples),
        get_dataset_split_names=lambda name: ["train"],
        Image=lambda decode: "decoded" if decode else "undecoded",
    )
    source = open_source(Data(source="hf:cifar10", image_key="img"), "train")
    assert source.class_names == ("cat", "dog")
    assert source[0] == (b"one", 1, "cifar10/train example 0")
    assert source[1] == (b"two", 0, str(tmp_path / "two.jpeg"))
    with pytest.raises(ImageError, match=r"gone\.jpeg cannot be read"):
        source[2]
    with pytest.raises(DataError, match="no such key") as caught:
        open_source(Data(source="hf:cifar10", label_key="lable"), "train")
    assert [problem.key for problem in caught.value.problems] == ["image_key", "label_key"]
    assert caught.value.problems[1].nearest == "label"


@pytest.mark.parametrize(
    ("source", "module", "extra"),
    [
        ("tfds:x", "tensorflow_datasets", "tfds"),
        ("hf:x", "datasets", "hf"),
        ("digits", "sklearn.datasets", "demo"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(monkeypatch, source, module, extra):
    monkeypatch.setitem(sys.modules, module.partition(".")[0], None)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError) as caught:
        open_source(Data(source=source), "train")
    assert f"needs the package {module.partition('.')[0]}" in str(caught.value)
    assert f'pip install "nfflax[{extra}]"' in str(caught.value)


def test_errors_survive_a_process(tmp_path):
    with pytest.raises(DataError) as caught:
        open_source(Data(source=str(tmp_path / "nowhere")), "train")
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (type(copy), str(copy)) == (DataError, str(caught.value))
    bad = pickle.loads(pickle.dumps(ImageError("is empty", "a.png")))
    assert (bad.reason, bad.name, str(bad)) == ("is empty", "a.png", "a.png is empty")
