"""Per-block parameter names, the common ground of every foreign format.

A network keeps the identical blocks of a stage stacked; on disk and in other libraries each block
stands alone: `stages.2.blocks.4.conv1.kernel`. Here one becomes the other, checked in full.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nfflax.nn.frozen import Frozen
from nfflax.weights.errors import WeightsError

Path = tuple[Any, ...]
Tree = nnx.Module | nnx.State | Mapping[Any, Any]
Transform = Callable[[np.ndarray], np.ndarray]

PARAMS = nnx.Any(nnx.Param, Frozen)
"""The variables that foreign formats know; BatchNorm's statistics are in ours only."""


@dataclass(frozen=True)
class Entry:
    """One parameter in a foreign format: both names, and both directions of its layout."""

    ours: str
    theirs: str
    export: Transform = np.asarray
    restore: Transform = np.asarray


def to_named(tree: Tree) -> dict[str, np.ndarray]:
    """Per-block names and arrays of a network's parameters, or of gradients shaped like them."""
    named = {}
    for path, leaf in _flat(tree):
        array = np.asarray(jax.device_get(leaf))
        named |= {name: np.asarray(array[i]) for name, i in block_names(path, array.shape)}
    return named


def param_shapes(tree: Tree) -> dict[str, tuple[int, ...]]:
    """Per-block names and shapes: nothing leaves its device, and an abstract network will do."""
    return {
        name: leaf.shape if part is ... else leaf.shape[1:]
        for path, leaf in _flat(tree)
        for name, part in block_names(path, leaf.shape)
    }


def _flat(tree: Tree) -> list[tuple[Path, Any]]:
    if isinstance(tree, nnx.Module):
        if getattr(tree, "folded", False):
            problem = "it is folded for inference; only what it was made from has such weights"
            raise WeightsError("the network", [problem])
        tree = nnx.state(tree, PARAMS)
    if isinstance(tree, nnx.State):
        tree = nnx.to_pure_dict(tree)
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(tuple(getattr(k, "key", getattr(k, "idx", k)) for k in path), x) for path, x in leaves]


def block_names(path: Path, shape: tuple[int, ...]) -> list[tuple[str, Any]]:
    """Per-block names of the leaf at `path`, each with its index into the leaf."""
    parts = [str(part) for part in path]
    if parts[0] != "stages":
        return [(".".join(parts), ...)]
    _, stage, place, *rest = parts
    tail = ".".join(rest)
    if place == "first":
        return [(f"stages.{stage}.blocks.0.{tail}", ...)]
    return [(f"stages.{stage}.blocks.{i + 1}.{tail}", i) for i in range(shape[0])]


def load_entries(
    model: nnx.Module, entries: Iterable[Entry], arrays: Mapping[str, Any], source: str
) -> None:
    """Set the model's parameters from foreign arrays, in place; all that does not fit is one error.

    Nothing is changed unless everything fits.
    """
    state = nnx.state(model, PARAMS)
    flat = nnx.to_flat_state(state)
    values = read_entries(dict(flat), entries, arrays, source)
    for path, variable in flat:
        variable.set_value(_placed(values[path], variable.get_value()))
    nnx.update(model, state)


def read_entries(
    leaves: Mapping[Path, Any], entries: Iterable[Entry], arrays: Mapping[str, Any], source: str
) -> dict[Path, np.ndarray]:
    """What foreign arrays come to under our paths; all that does not fit is one WeightsError.

    `leaves` have the shapes and types that are wanted.
    """
    by_name = {entry.ours: entry for entry in entries}
    if problems := misfits(leaves, by_name, arrays):
        raise WeightsError(source, problems)
    values: dict[Path, np.ndarray] = {}
    for path, leaf in leaves.items():
        values[path] = value = np.empty(leaf.shape, leaf.dtype)
        for name, part in block_names(path, leaf.shape):
            entry = by_name[name]
            value[part] = entry.restore(np.asarray(arrays[entry.theirs]))
    return values


def misfits(
    leaves: Mapping[Path, Any], by_name: Mapping[str, Entry], arrays: Mapping[str, Any]
) -> list[str]:
    """Every foreign array that is missing, unexpected, of another shape or no numbers."""
    problems, used = [], set()
    for path, leaf in leaves.items():
        value = np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)  # takes no memory
        for name, part in block_names(path, leaf.shape):
            entry = by_name[name]
            used.add(entry.theirs)
            if entry.theirs not in arrays:
                problems.append(f"missing: {entry.theirs} (for {name} {list(value[part].shape)})")
                continue
            found = _as_array(arrays[entry.theirs])
            wanted = entry.export(value[part]).shape
            if found is None:
                kind = type(arrays[entry.theirs]).__name__
                problems.append(f"not numeric: {entry.theirs} is no array but {kind}")
            elif found.shape != wanted:
                shapes = f"{list(found.shape)}, the model has {list(wanted)}"
                problems.append(f"wrong shape: {entry.theirs} is {shapes}")
            elif not _is_real(found.dtype):
                problems.append(f"not numeric: {entry.theirs} is {found.dtype}")
    return problems + [f"unexpected: {name}" for name in arrays if name not in used]


def _as_array(value: Any) -> np.ndarray | None:
    """None for what NumPy cannot take, such as a list of unequal rows."""
    try:
        return np.asarray(value)
    except Exception:  # whatever the foreign object's conversion raises
        return None


def _is_real(dtype: np.dtype) -> bool:
    real = np.issubdtype(dtype, np.integer) or np.issubdtype(dtype, np.floating)
    return real or dtype.name == "bfloat16"


def _placed(value: np.ndarray, old: Any) -> jax.Array:
    """`value` where `old` lies; what is free to move between devices stays free."""
    sharding = getattr(old, "sharding", None)
    if sharding is None or not getattr(old, "committed", True):
        return jnp.asarray(value)
    return jax.device_put(value, sharding)
