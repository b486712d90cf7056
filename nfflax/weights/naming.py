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
    return {name: array[i] for name, array, i in _leaves(tree)}


def _leaves(tree: Tree) -> Iterable[tuple[str, np.ndarray, Any]]:
    """(name, whole leaf, which part of it) for every block's parameter."""
    for path, leaf in _flat(tree):
        array = np.asarray(jax.device_get(leaf))
        yield from ((name, array, part) for name, part in block_names(path, array.shape))


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
    values: dict[Path, np.ndarray] = {}
    problems, used = [], set()
    for path, variable in nnx.to_flat_state(state):
        shape = tuple(variable.shape)
        value = np.empty(shape, variable.dtype)
        for name, part in block_names(path, shape):
            entry = by_name[name]
            used.add(entry.theirs)
            if entry.theirs not in arrays:
                problems.append(f"missing: {entry.theirs} (for {name} {list(value[part].shape)})")
                continue
            found = np.asarray(arrays[entry.theirs])
            wanted = entry.export(value[part]).shape
            if found.shape != wanted:
                problems.append(
                    f"wrong shape: {entry.theirs} is {list(found.shape)}, the model has {list(wanted)}"
                )
            elif not np.issubdtype(found.dtype, np.number) and found.dtype.name != "bfloat16":
                problems.append(f"not numeric: {entry.theirs} is {found.dtype}")
            else:
                value[part] = entry.restore(found)
        values[path] = value
    problems += [f"unexpected: {name}" for name in arrays if name not in used]
    if problems:
        raise WeightsError(source, problems)
    for path, variable in nnx.to_flat_state(state):
        variable[...] = jax.device_put(jnp.asarray(values[path]), variable[...].sharding)
    nnx.update(model, state)
