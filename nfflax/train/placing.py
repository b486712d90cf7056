"""Networks without arrays: told where on a mesh each array is to lie, then given their arrays."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nfflax.nn.net import NFNet
from nfflax.optim.roles import dotted, leaves_by_path, map_by_path
from nfflax.spec.errors import Problem
from nfflax.train.errors import CheckpointError
from nfflax.train.mesh import param_shardings


def on_mesh(mesh: Mesh, model: NFNet) -> None:
    """Say where on a mesh the arrays of a network without arrays are to lie."""
    places = leaves_by_path(param_shardings(model, mesh))
    whole = NamedSharding(mesh, PartitionSpec())

    def placed(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=places.get(path, whole))

    _replace(model, placed)


def set_arrays(model: NFNet, values: Mapping[tuple[Any, ...], np.ndarray], source: str) -> None:
    """Give a network without arrays its arrays, each where it is to lie."""
    problems = []

    def value_of(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> Any:
        value = values.get(path)
        if value is None or (value.shape, value.dtype) != (leaf.shape, leaf.dtype):
            there = "missing" if value is None else f"{value.dtype} {list(value.shape)}"
            message = f"is {there}; the network has {leaf.dtype} {list(leaf.shape)}"
            problems.append(Problem(source, dotted(path), message))
            return leaf
        if leaf.sharding is None:
            return jnp.asarray(value)
        # Every process has it whole; device_put would send it to all of them to compare.
        return jax.make_array_from_callback(value.shape, leaf.sharding, lambda part: value[part])

    _replace(model, value_of)
    if problems:
        raise CheckpointError(problems)


def _replace(model: NFNet, function: Callable[..., Any]) -> None:
    """Put `function(path, leaf)` in the place of every leaf."""
    state = nnx.state(model)
    nnx.replace_by_pure_dict(state, map_by_path(function, nnx.to_pure_dict(state)))
    nnx.update(model, state)
