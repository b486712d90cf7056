"""The made-up folder: reproducible, whole or absent, and its classes can be learned."""

from typing import Any

import numpy as np
import pytest

from nfflax.data import Data, DataError, generate_folder, open_source
from nfflax.data.decode import Picture
from nfflax.data.generate import draw


def test_a_folder_is_a_source(tmp_path):
    seen = []
    folder = tmp_path / "toy"
    generate_folder(folder, classes=3, train=10, test=4, size=24, progress=seen.append)
    assert sum(seen) == 14
    train, test = (open_source(Data(source=str(folder)), split) for split in ("train", "test"))
    assert (len(train), len(test), train.class_names) == (10, 4, ("class_0", "class_1", "class_2"))
    assert sorted(train[i].label for i in range(10)) == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]
    pictures = [Picture(train[index].image) for index in range(10)]
    assert {picture.kind for picture in pictures} == {"JPEG RGB"}
    sizes = {(picture.width, picture.height) for picture in pictures}
    assert {min(size) for size in sizes} == {24}
    assert len(sizes) > 4
    with pytest.raises(DataError, match="exists already"):
        generate_folder(folder)


def test_the_same_arguments_give_the_same_images(tmp_path):
    files = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        generate_folder(tmp_path / name, classes=2, train=3, test=1, size=16, seed=seed)
        files.append([path.read_bytes() for path in sorted((tmp_path / name).rglob("*.jpeg"))])
    assert files[0] == files[1]
    assert not set(files[0]) & set(files[2])


def test_nothing_half_written(tmp_path):
    def stop(_: int) -> None:
        raise KeyboardInterrupt

    options: dict[str, Any] = {"classes": 2, "train": 4, "test": 2, "size": 16}
    with pytest.raises(KeyboardInterrupt):
        generate_folder(tmp_path / "toy", **options, progress=stop)
    assert not (tmp_path / "toy").exists()
    generate_folder(tmp_path / "toy", **options)
    assert len(list((tmp_path / "toy").rglob("*.jpeg"))) == 6
    assert not (tmp_path / "toy.tmp").exists()


def features(label: int, seed: int) -> np.ndarray:
    """Mean colour and the strength of low frequencies of the middle of an image."""
    image_HWC = draw(label, 32, np.random.default_rng((seed, label)))[:32, :32] / 255
    spectrum = np.abs(np.fft.fft2(image_HWC.mean(-1) - image_HWC.mean()))[:10, :10]
    return np.concatenate([image_HWC.mean((0, 1)), spectrum.ravel() / 100, [1]])


def test_a_linear_classifier_learns_the_classes():
    labels = np.tile(np.arange(10), 40)
    train, test = (
        np.stack([features(label, base + n) for n, label in enumerate(labels)])
        for base in (0, 1000)
    )
    targets = np.eye(10)[labels]
    weights = np.linalg.solve(train.T @ train + 1e-2 * np.eye(train.shape[1]), train.T @ targets)
    accuracy = ((test @ weights).argmax(-1) == labels).mean()
    assert accuracy > 0.5  # chance: 0.1
