"""Weights as DeepMind released them: `{Haiku module: {parameter: array}}`, HWIO kernels."""

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from flax import nnx

from nfflax.weights.errors import WeightsError
from nfflax.weights.haiku_pickle import read_haiku_pickle
from nfflax.weights.naming import Entry, Tree, load_entries, param_shapes, to_named

HaikuTree = Mapping[str, Mapping[str, Any]]


def load_deepmind(model: nnx.Module, tree_or_path: HaikuTree | str | os.PathLike[str]) -> None:
    """Set `model`'s parameters, in place, from a Haiku tree or a released `F*_haiku.npz` file.

    The files are pickles: they are read without executing anything in them. Every missing,
    unexpected or misshapen entry is in one WeightsError, and then nothing has changed.
    """
    source = "the Haiku tree"
    if isinstance(tree_or_path, str | os.PathLike):
        source, tree_or_path = os.fspath(tree_or_path), read_haiku_pickle(tree_or_path)
    arrays = flat(tree_or_path)
    names = list(param_shapes(model))
    load_entries(model, haiku_entries(names, root_of(arrays, names)), arrays, source)


def flat(tree: HaikuTree) -> dict[str, Any]:
    """`module/parameter`, and as it stands what is no mapping of parameters."""
    arrays: dict[str, Any] = {}
    for module, params in tree.items():
        if isinstance(params, Mapping):
            arrays |= {f"{module}/{name}": array for name, array in params.items()}
        else:
            arrays[str(module)] = params
    return arrays


def root_of(theirs: Iterable[str], ours: Iterable[str]) -> str:
    """What the network is called. The release allows any name: NFNet/~/linear, my_net/~/linear."""
    official = haiku_class(ours)
    roots = Counter(name.split("/", 1)[0] for name in theirs)
    return official if official in roots or not roots else roots.most_common(1)[0][0]


def to_deepmind(tree: Tree) -> dict[str, dict[str, np.ndarray]]:
    """The Haiku tree of a network's parameters, or of gradients with the same structure."""
    named = to_named(tree)
    haiku: dict[str, dict[str, np.ndarray]] = {}
    for entry in haiku_entries(named, haiku_class(named)):
        module, name = entry.theirs.rsplit("/", 1)
        haiku.setdefault(module, {})[name] = named[entry.ours]
    return haiku


def haiku_class(names: Iterable[str]) -> str:
    """The official class with this structure: only NFNet has several stem convolutions, and only
    NF_ResNet has no final one."""
    names = set(names)
    if "stem.convs.1.kernel" in names:
        return "NFNet"
    return "NF_RegNet" if "final_conv.kernel" in names else "NF_ResNet"


def haiku_entries(names: Iterable[str], root: str) -> list[Entry]:
    """Our per-block names with Haiku's `module/parameter`; layouts are the same."""
    names = list(names)
    kind = haiku_class(names)
    block = "nf_res_block" if kind == "NF_ResNet" else "nf_block"
    places = sorted({_place(name) for name in names if name.startswith("stages.")})
    index = {place: i for i, place in enumerate(places)}
    leaves = {"kernel": "w", "gain": "gain", "bias": "bias"}
    linear = {"kernel": "w", "bias": "b"}
    modules = {
        "final_conv": ("final_conv", leaves),
        "classifier": ("linear", linear),
        "attention.fc0": ("squeeze_excite/~/linear", linear),
        "attention.fc1": ("squeeze_excite/~/linear_1", linear),
        **{f"conv{c}": (f"conv{c}", leaves) for c in ("0", "1", "1b", "2", "_shortcut")},
    }
    entries, unknown = [], []
    for name in names:
        owner, _, leaf = name.rpartition(".")
        base = f"{root}/~"
        if name.startswith("stages."):
            number = index[_place(name)]
            base += f"/{block}_{number}" if number else f"/{block}"
            owner = ".".join(name.split(".")[4:-1])
            if leaf == "skip_gain":
                entries.append(Entry(name, f"{base}/skip_gain"))
                continue
            base += "/~"
        if owner.startswith("stem.convs."):
            number = owner.rsplit(".", 1)[1]
            module, known = (f"stem_conv{number}" if kind == "NFNet" else "initial_conv"), leaves
        else:
            module, known = modules.get(owner, ("", {}))
        if leaf in known:
            entries.append(Entry(name, f"{base}/{module}/{known[leaf]}"))
        else:
            unknown.append(f"the official release has no such parameter: {name}")
    if unknown:
        raise WeightsError("the network", unknown)
    return entries


def _place(name: str) -> tuple[int, int]:
    """(stage, position) of a block's parameter."""
    _, stage, _, position, *_ = name.split(".")
    return int(stage), int(position)
