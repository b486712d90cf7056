"""Weights under timm's names: a flat state dict of numpy arrays, OIHW kernels."""

import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from flax import nnx

from nfflax.nn.body import Body
from nfflax.weights.errors import WeightsError
from nfflax.weights.naming import Entry, Tree, load_entries, param_shapes, to_named
from nfflax.weights.safetensors import read_safetensors
from nfflax.weights.torch_pickle import read_torch_pickle

_CONVS = {
    "conv0": "conv1",
    "conv1": "conv2",
    "conv1b": "conv2b",
    "conv2": "conv3",
    "conv_shortcut": "downsample.conv",
    "final_conv": "final_conv",
}


def load_timm(
    model: nnx.Module, state_dict_or_path: Mapping[str, Any] | str | os.PathLike[str]
) -> None:
    """Set `model`'s parameters, in place, from arrays under timm's names or a file of them.

    A file is what `torch.save` or safetensors wrote, which is known by its content; it is read
    without executing anything in it. Every missing, unexpected or misshapen entry is in one
    WeightsError, and then nothing has changed. Half precision becomes float32. The numbers mean the
    same only in a spec with timm's numerics (presets `timm_*`).
    """
    source, state_dict = "the timm state dict", state_dict_or_path
    if isinstance(state_dict, str | os.PathLike):
        source = os.fspath(state_dict)
        state_dict = read_state_dict(state_dict)[0]
    entries = network_entries(model)
    load_entries(model, entries, state_dict, source)


def read_state_dict(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(arrays by name, metadata) of a file that safetensors or torch.save wrote."""
    if is_safetensors(path):
        return read_safetensors(path)
    return read_torch_pickle(path), {}


def is_safetensors(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins like one: a length in eight bytes, then a JSON object."""
    try:
        with open(path, "rb") as file:
            return file.read(9)[8:] == b"{"
    except OSError as error:
        problem = f"The file cannot be read: {error.strerror or error}."
        raise WeightsError(os.fspath(path), [problem]) from None


def to_timm(tree: Tree) -> dict[str, np.ndarray]:
    """timm's state dict of a network's parameters, or of gradients with the same structure."""
    named = to_named(tree)
    return {entry.theirs: entry.export(named[entry.ours]) for entry in network_entries(tree)}


def network_entries(tree: Tree) -> list[Entry]:
    """`timm_entries` of a network's parameters, or of gradients with the same structure."""
    shapes = param_shapes(tree)
    return timm_entries(shapes, _attention_name(tree, shapes))


def _attention_name(tree: Tree, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """timm calls attention inside the bottleneck `attn`, after it `attn_last`."""
    if isinstance(tree, Body):
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
