"""Networks as folders that Hugging Face's hub understands: `config.json` and `model.safetensors`.

In our layout the config holds the spec in full, and arrays have our per-block names, BatchNorm's
statistics among them. In timm's it says what `timm.create_model("local-dir:...")` needs, and arrays
have timm's names. Both are read by what they hold, not by where they come from.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from flax import nnx

from nfflax import __version__
from nfflax.nn.net import NFNet
from nfflax.spec.errors import SpecError
from nfflax.spec.files import NOT_FOR_DOCUMENTS
from nfflax.spec.load import load_spec
from nfflax.spec.plan import plan
from nfflax.spec.schema import Spec
from nfflax.weights.errors import WeightsError
from nfflax.weights.hub import CONFIG, TORCH_WEIGHTS, WEIGHTS
from nfflax.weights.naming import to_named
from nfflax.weights.safetensors import read_safetensors, write_safetensors
from nfflax.weights.timm import to_timm
from nfflax.weights.timm_config import to_timm_config
from nfflax.weights.timm_network import read_timm_config
from nfflax.weights.torch_pickle import read_torch_pickle
from nfflax.weights.whole import require_free, whole_folder

Layout = Literal["nfflax", "timm"]

_LIBRARY, _VERSION = "nfflax", 1
_CARD = "README.md"
_OURS = (CONFIG, WEIGHTS, TORCH_WEIGHTS, _CARD)  # a folder that holds anything else stays
_LONGEST = 1 << 24  # bytes of a config.json; the names of 20,000 classes take one


@dataclass(frozen=True)
class HubFolder:
    """What a folder holds."""

    layout: Layout
    spec: Spec
    preset: str
    """The preset that timm's network is, up to its head and images; empty where it is none."""
    arrays: Mapping[str, np.ndarray]
    """By our per-block names, or by timm's."""
    class_names: tuple[str, ...]
    """In the order of the outputs; empty where they are not known."""


def write_hub_folder(
    folder: str | os.PathLike[str],
    model: NFNet,
    *,
    layout: Layout = "nfflax",
    class_names: Sequence[str] = (),
    overwrite: bool = False,
) -> None:
    """Write a network as a folder, in full or not at all.

    `overwrite` replaces an earlier folder of this kind, and none that holds anything else. A spec
    that timm cannot express is a WeightsError that lists every such key.
    """
    source, classes = os.fspath(folder), model.spec.head.num_classes
    require_free(folder, overwrite=overwrite, ours=_OURS)
    if class_names and len(class_names) != classes:
        problem = f"There are {len(class_names)} class names for {classes} classes."
        raise WeightsError(source, [problem])
    if layout == "timm":
        config = to_timm_config(model.spec, class_names)
        arrays, metadata = to_timm(model), {"format": "pt"}  # what readers of torch's files want
    else:
        config = _config(model.spec, class_names)
        arrays = to_named(model) | to_named(nnx.state(model, nnx.BatchStat))
        metadata = {"format": _LIBRARY}
    with whole_folder(folder, overwrite=overwrite, ours=_OURS) as new:
        write_safetensors(new / WEIGHTS, arrays, metadata)
        text = json.dumps(config, indent=2, ensure_ascii=False)
        (new / CONFIG).write_text(f"{text}\n", encoding="utf-8")
        if layout == "nfflax":
            card = _card(model.spec, Path(folder).name, _sha256(new / WEIGHTS))
            (new / _CARD).write_text(card, encoding="utf-8")


def read_hub_folder(folder: str | os.PathLike[str]) -> HubFolder:
    """The network in a folder of either layout; raises WeightsError."""
    place = Path(folder)
    source = os.fspath(place / CONFIG)
    config = _read_config(place / CONFIG)
    if config.get("library_name") == _LIBRARY:
        spec, names = _own(config, source)
        return HubFolder("nfflax", spec, "", _arrays(place), names)
    if "architecture" in config:
        spec, preset, names = read_timm_config(config, source)
        return HubFolder("timm", spec, preset, _arrays(place), names)
    problem = "It is neither nfflax's (library_name) nor timm's (architecture)."
    raise WeightsError(source, [problem])


def _config(spec: Spec, class_names: Sequence[str]) -> dict[str, Any]:
    return {
        "library_name": _LIBRARY,
        "format_version": _VERSION,
        "nfflax_version": __version__,
        "num_classes": spec.head.num_classes,
        "class_names": list(class_names),
        "spec": spec.model_dump(mode="json"),
    }


def _own(config: Mapping[str, Any], source: str) -> tuple[Spec, tuple[str, ...]]:
    """(spec, class names) of our config."""
    version, said, names = (config.get(k) for k in ("format_version", "spec", "class_names"))
    if version != _VERSION:
        problem = f"Its format_version is {version!r:.50}, this nfflax knows {_VERSION}: upgrade."
        raise WeightsError(source, [problem])
    # Of a stranger's spec no key may lead to a file of ours.
    if not isinstance(said, Mapping) or not said.keys().isdisjoint(NOT_FOR_DOCUMENTS):
        raise WeightsError(source, ["Its spec must be a resolved one, as nfflax writes it."])
    try:
        spec = load_spec(said)
    except SpecError as error:
        raise WeightsError(source, [str(problem) for problem in error.problems]) from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise WeightsError(source, ["Its class_names must be a list of names."])
    if names and len(names) != spec.head.num_classes:
        problem = f"It has {len(names)} class_names for {spec.head.num_classes} classes."
        raise WeightsError(source, [problem])
    return spec, tuple(names)


def _read_config(path: Path) -> Mapping[str, Any]:
    try:
        with open(path, "rb") as file:
            text = file.read(_LONGEST + 1)
        config = json.loads(text) if len(text) <= _LONGEST else None
    except OSError as error:
        problem = f"The file cannot be read: {error.strerror or error}."
        raise WeightsError(os.fspath(path), [problem]) from None
    except (ValueError, RecursionError) as error:
        raise WeightsError(os.fspath(path), [f"It is no JSON: {error!s:.200}."]) from None
    if not isinstance(config, dict):
        raise WeightsError(os.fspath(path), ["It must hold a JSON object of a reasonable size."])
    return config


def _arrays(place: Path) -> Mapping[str, np.ndarray]:
    if (place / WEIGHTS).is_file():
        return read_safetensors(place / WEIGHTS)[0]
    if (place / TORCH_WEIGHTS).is_file():
        return read_torch_pickle(place / TORCH_WEIGHTS)
    problem = f"The folder has neither {WEIGHTS} nor {TORCH_WEIGHTS}."
    raise WeightsError(os.fspath(place), [problem])


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _card(spec: Spec, name: str, sha256: str) -> str:
    """README.md, which the hub shows as the model's page."""
    compiled, size = plan(spec), spec.resolution.test
    return f"""---
library_name: {_LIBRARY}
pipeline_tag: image-classification
tags:
- {_LIBRARY}
- normalizer-free
---

# {name}

{spec.summary or spec.name}

| | |
|---|---|
| network | `{spec.name}` |
| parameters | {compiled.params:,} |
| multiply-adds at {size} px | {compiled.macs(size):,} |
| classes | {spec.head.num_classes:,} |
| images | {size} x {size} x {spec.stem.in_channels}, mean and std in `{CONFIG}` |
| sha256 of `{WEIGHTS}` | `{sha256}` |

```python
import nfflax

model = nfflax.load("{name}")  # this folder, or hf://owner/{name} once it is on the hub
logits = model(images_NHWC)
```

Written by nfflax {__version__}: `{CONFIG}` holds the network's spec in full.
"""
