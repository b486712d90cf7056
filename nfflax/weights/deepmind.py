"""Weights in the layout of DeepMind's release: `{Haiku module: {parameter: array}}`, HWIO kernels."""

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from flax import nnx

from nfflax.weights.errors import WeightsError
from nfflax.weights.haiku_pickle import read_haiku_pickle
from nfflax.weights.naming import Entry, Tree, load_entries, to_named

HaikuTree = Mapping[str, Mapping[str, Any]]


def load_deepmind(model: nnx.Module, tree_or_path: HaikuTree | str | os.PathLike[str]) -> None:
    """Set `model`'s parameters, in place, from a Haiku tree or a released `F*_haiku.npz` file.

    The files are pickles: they are read without executing anything in them. Every missing,
    unexpected or misshapen entry is in one WeightsError, and then nothing has changed.
    """
    source = "the Haiku tree"
    if isinstance(tree_or_path, str | os.PathLike):
        source, tree_or_path = os.fspath(tree_or_path), read_haiku_pickle(tree_or_path)
    arrays = {
        f"{module}/{name}": array
        for module, params in tree_or_path.items()
        for name, array in params.items()
    }
    roots = {name.split("/", 1)[0] for name in arrays}
    names = list(to_named(model))
    # The release lets a network carry any name: NFNet/~/linear, my_net/~/linear.
    root = roots.pop() if len(roots) == 1 else haiku_class(names)
    load_entries(model, haiku_entries(names, root), arrays, source)


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


def haiku_entries(names: Iterable[str], root: str) -> Iterator[Entry]:
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
    for name in names:
        owner, leaf = name.rsplit(".", 1)
        base = f"{root}/~"
        if name.startswith("stem.convs."):
            number = owner.rsplit(".", 1)[1]
            stem = f"stem_conv{number}" if kind == "NFNet" else "initial_conv"
            yield Entry(name, f"{base}/{stem}/{leaves[leaf]}")
            continue
        if name.startswith("stages."):
            number = index[_place(name)]
            base += f"/{block}_{number}" if number else f"/{block}"
            owner = ".".join(name.split(".")[4:-1])
            if leaf == "skip_gain":
                yield Entry(name, f"{base}/skip_gain")
                continue
            base += "/~"
        module, known = modules.get(owner, ("", {}))
        if leaf not in known:
            raise WeightsError(name, ["the official release has no such parameter"])
        yield Entry(name, f"{base}/{module}/{known[leaf]}")


def _place(name: str) -> tuple[int, int]:
    """(stage, position) of a block's parameter."""
    _, stage, _, position, *_ = name.split(".")
    return int(stage), int(position)
