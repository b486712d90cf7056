"""Sources from TensorFlow Datasets and Hugging Face datasets: random access, images undecoded."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from nfflax.data.errors import DataError, ImageError
from nfflax.data.sources import Record, need, unknown_split
from nfflax.spec.errors import Problem, nearest


class HubSource:
    """A library's random-access examples: mappings with an image and a label."""

    def __init__(
        self, examples: Any, class_names: tuple[str, ...], image_key: str, label_key: str, name: str
    ):
        self._examples, self.class_names = examples, class_names
        self._image_key, self._label_key, self._name = image_key, label_key, name

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Record:
        example = self._examples[index]
        image = example[self._image_key]
        name = f"{self._name} example {index}"
        if isinstance(image, Mapping):  # Hugging Face: bytes, or the path of a local file
            name = image.get("path") or name
            image = image.get("bytes") or _read(name)
        image = image if isinstance(image, bytes) else np.asarray(image)
        return Record(image, int(example[self._label_key]), name)


def tfds_source(name: str, split: str, image_key: str, label_key: str) -> HubSource:
    """A split, or a slice such as "train[10000:]", of a prepared TensorFlow Datasets data set."""
    tfds = need("tensorflow_datasets", "tfds", f"tfds:{name}")
    builder = tfds.builder(name)
    _check_split(f"tfds:{name}", split, builder.info.splits)
    features = builder.info.features
    _check_keys(f"tfds:{name}", features, image_key, label_key)
    undecoded = {image_key: tfds.decode.SkipDecoding()}
    examples = builder.as_data_source(split=split, decoders=undecoded)
    names = tuple(features[label_key].names)
    return HubSource(examples, names, image_key, label_key, f"{name}/{split}")


def hf_source(name: str, split: str, image_key: str, label_key: str) -> HubSource:
    """A split, or a slice such as "train[:90%]", of a Hugging Face data set."""
    datasets = need("datasets", "hf", f"hf:{name}")
    _check_split(f"hf:{name}", split, datasets.get_dataset_split_names(name))
    examples = datasets.load_dataset(name, split=split)
    _check_keys(f"hf:{name}", examples.features, image_key, label_key)
    names = tuple(examples.features[label_key].names)
    undecoded = examples.cast_column(image_key, datasets.Image(decode=False))
    return HubSource(undecoded, names, image_key, label_key, f"{name}/{split}")


def _check_split(source: str, split: str, known: Any) -> None:
    if split.partition("[")[0] not in known:
        raise unknown_split(source, split, sorted(known))


def _check_keys(source: str, features: Mapping[str, Any], image_key: str, label_key: str) -> None:
    problems = []
    for option, key in (("image_key", image_key), ("label_key", label_key)):
        if key not in features:
            near, allowed = nearest(key, features), ", ".join(features)
            problems.append(Problem(source, option, "no such key", key, allowed, near))
        elif option == "label_key" and not hasattr(features[key], "names"):
            named = ", ".join(k for k, feature in features.items() if hasattr(feature, "names"))
            problems.append(Problem(source, option, "is no class label", key, named))
    if problems:
        raise DataError(problems)


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise ImageError(f"cannot be read: {error.strerror or error}", path) from None
