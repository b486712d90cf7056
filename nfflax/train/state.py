"""The training state: a pure nested dict, created on the mesh and never whole on one device.

    params   float32, as `nnx.to_pure_dict` names them
    ema      their running average, where the run keeps one
    stats    running statistics of BatchNorm; empty without it
    opt      the optimiser's state
    step     updates made so far: learning rate, random numbers and data position derive from it

Plain dicts keep the Python cost of a step low: NNX's own optimiser and jit need ten times as much.
"""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import nfflax
from nfflax.optim.factory import Recipe, RecipeWarning, from_spec
from nfflax.spec.run import Run
from nfflax.train.mesh import param_shardings

State = dict[str, Any]


def abstract_model(run: Run) -> nnx.Module:
    """The run's network without arrays."""
    return nnx.eval_shape(lambda: _built(run))


def recipe_of(run: Run, model: nnx.Module) -> Recipe:
    """The run's optimiser. What it warns of is in it, for who shows it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RecipeWarning)
        return from_spec(run, model)


def abstract_state(run: Run, recipe: Recipe, model: nnx.Module, mesh: jax.sharding.Mesh) -> State:
    """Shape, type and sharding of every array of the state, for the run's abstract network."""
    whole = NamedSharding(mesh, PartitionSpec())
    shapes = jax.eval_shape(_creator(run, recipe))
    of_params = param_shardings(model, mesh)
    by_path = dict(jax.tree_util.tree_leaves_with_path(of_params))
    leaves = dict(jax.tree_util.tree_leaves_with_path(shapes["params"]))
    lengths = {len(path) for path in by_path}

    def placed(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        """Whatever ends in a parameter's path and has its shape lies where the parameter lies."""
        for length in lengths:
            end = path[-length:]
            if end in by_path and leaves[end].shape == leaf.shape:
                return _struct(leaf, by_path[end])
        return _struct(leaf, whole)

    return jax.tree_util.tree_map_with_path(placed, shapes)


def make_state(run: Run, recipe: Recipe, abstract: State) -> Callable[[], State]:
    """The function that creates the first state, each device its own part."""
    return jax.jit(_creator(run, recipe), out_shardings=shardings_of(abstract))


def shardings_of(abstract: Any) -> Any:
    """The shardings of a tree of abstract arrays."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def _struct(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _built(run: Run) -> nnx.Module:
    model = run.model
    rngs = nnx.Rngs(run.train.seed)
    return nfflax.build(
        run.spec, rngs=rngs, dtype=model.dtype, unroll=model.unroll, remat=model.remat
    )


def _creator(run: Run, recipe: Recipe) -> Callable[[], State]:
    def create() -> State:
        _, params, stats = nnx.split(_built(run), nnx.Param, ...)
        params = nnx.to_pure_dict(params)
        average = {"ema": jax.tree.map(jnp.copy, params)} if recipe.ema else {}
        return {
            "params": params,
            **average,
            "stats": nnx.to_pure_dict(stats),
            "opt": recipe.tx.init(params),
            "step": jnp.zeros((), jnp.int32),
        }

    return create
