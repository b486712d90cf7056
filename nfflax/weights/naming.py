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

from nfflax.weights.errors import WeightsError

Path = tuple[Any, ...]
Tree = nnx.Module | nnx.State | Mapping[Any, Any]
Transform = Callable[[np.ndarray], np.ndarray]


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


def param_shapes(model: nnx.Module) -> dict[str, tuple[int, ...]]:
    """Per-block names and shapes: nothing leaves its device, and an abstract network will do."""
    return {
        name: leaf.shape if part is ... else leaf.shape[1:]
        for path, leaf in _flat(model)
        for name, part in block_names(path, leaf.shape)
    }


def _flat(tree: Tree) -> list[tuple[Path, Any]]:
    if isinstance(tree, nnx.Module):
        tree = nnx.state(tree, nnx.Param)
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
    by_name = {entry.ours: entry for entry in entries}
    state = nnx.state(model, nnx.Param)
    flat = nnx.to_flat_state(state)
    values: list[np.ndarray] = []
    problems, used = [], set()
    for path, variable in flat:
        shape = tuple(variable.shape)
        value = np.empty(shape, variable.dtype)
        for name, part in block_names(path, shape):
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
            else:
                value[part] = entry.restore(found)
        values.append(value)
    problems += [f"unexpected: {name}" for name in arrays if name not in used]
    if problems:
        raise WeightsError(source, problems)
    for (_, variable), value in zip(flat, values, strict=True):
        variable.set_value(_placed(value, variable.get_value()))
    nnx.update(model, state)


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
