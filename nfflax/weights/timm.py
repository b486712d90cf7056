"""Weights under timm's names: a flat state dict of numpy arrays, OIHW kernels."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from flax import nnx

from nfflax.nn.net import NFNet
from nfflax.weights.errors import WeightsError
from nfflax.weights.naming import Entry, Tree, load_entries, param_shapes, to_named

_CONVS = {
    "conv0": "conv1",
    "conv1": "conv2",
    "conv1b": "conv2b",
    "conv2": "conv3",
    "conv_shortcut": "downsample.conv",
    "final_conv": "final_conv",
}


def load_timm(model: nnx.Module, state_dict: Mapping[str, Any]) -> None:
    """Set `model`'s parameters, in place, from numpy arrays under timm's names.

    Every missing, unexpected or misshapen entry is in one WeightsError, and then nothing has
    changed. The numbers mean the same only in a spec with timm's numerics (presets `timm_*`).
    """
    shapes = param_shapes(model)
    entries = timm_entries(shapes, _attention_name(model, shapes))
    load_entries(model, entries, state_dict, "the timm state dict")


def to_timm(tree: Tree) -> dict[str, np.ndarray]:
    """timm's state dict of a network's parameters, or of gradients with the same structure."""
    named = to_named(tree)
    shapes = {name: array.shape for name, array in named.items()}
    entries = timm_entries(named, _attention_name(tree, shapes))
    return {entry.theirs: entry.export(named[entry.ours]) for entry in entries}


def _attention_name(tree: Tree, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """timm calls attention inside the bottleneck `attn`, after it `attn_last`."""
    if isinstance(tree, NFNet):
        return "attn" if tree.spec.attention.position == "inside" else "attn_last"
    for name, shape in shapes.items():  # gradients know no spec, but widths tell
        if name.endswith("attention.fc0.kernel"):
            mid, out = shapes[name.replace("attention.fc0", "conv2")][-2:]
            if mid != out:
                return "attn" if shape[0] == mid else "attn_last"
    return "attn_last"


def timm_entries(names: Iterable[str], attention: str) -> list[Entry]:
    """Our per-block names with timm's, and the change of layout."""
    names = list(names)
    several = "stem.convs.1.kernel" in names
    entries, unknown = [], []
    for name in names:
        owner, _, leaf = name.rpartition(".")
        prefix, inner, parts = "", owner, owner.split(".")
        if parts[0] == "stages":
            prefix, inner = f"stages.{parts[1]}.{parts[3]}.", ".".join(parts[4:])
        if leaf == "skip_gain":
            entries.append(Entry(name, f"{prefix}skipinit_gain"))
        elif parts[:2] == ["stem", "convs"]:
            stem = f"stem.conv{int(parts[2]) + 1}" if several else "stem.conv"
            entries.append(_entry(name, stem, leaf))
        elif inner in _CONVS:
            entries.append(_entry(name, prefix + _CONVS[inner], leaf))
        elif inner == "classifier":
            entries.append(Entry(name, f"head.fc.{_leaf(leaf)}", np.transpose, np.transpose))
        elif inner in ("attention.fc0", "attention.fc1"):
            module = f"{prefix}{attention}.fc{int(inner[-1]) + 1}"
            entries.append(_linear_as_conv(name, module, leaf))
        elif inner == "attention":
            export, restore = (lambda w: w[None, None]), (lambda w: w[0, 0])
            entries.append(Entry(name, f"{prefix}{attention}.conv.weight", export, restore))
        else:
            unknown.append(f"timm has no such parameter: {name}")
    if unknown:
        raise WeightsError("the network", unknown)
    return entries


def _leaf(leaf: str) -> str:
    return "weight" if leaf == "kernel" else leaf


def _entry(ours: str, module: str, leaf: str) -> Entry:
    """A convolution's kernel, gain or bias."""
    if leaf == "kernel":
        export, restore = (lambda w: w.transpose(3, 2, 0, 1)), (lambda w: w.transpose(2, 3, 1, 0))
    elif leaf == "gain":
        export, restore = (lambda g: g[:, None, None, None]), (lambda g: g[:, 0, 0, 0])
    else:
        return Entry(ours, f"{module}.{leaf}")
    return Entry(ours, f"{module}.{_leaf(leaf)}", export, restore)


def _linear_as_conv(ours: str, module: str, leaf: str) -> Entry:
    """timm's squeeze-and-excitation layers are 1x1 convolutions."""
    if leaf == "bias":
        return Entry(ours, f"{module}.bias")
    return Entry(
        ours, f"{module}.weight", lambda w: w.T[:, :, None, None], lambda w: w[:, :, 0, 0].T
    )
