"""The reference data in tests/golden, the weights behind it, and small networks to put weights in.

Files come from DeepMind's official nfnets code (deepmind-research, 2021, on jax 0.10.2 and
dm-haiku 0.0.17) and from timm 1.0.31 on torch 2.13.0, in float32 on CPU. No file holds weights: a
parameter's name and shape give its value, by the formula below.

    haiku_params.json   {variant: {module: {parameter: shape}}} of official networks
    timm_params.json    {model: {state dict key: shape}}
    formula.json        first values and sum of a few arrays, to hold the formula against
"""

import functools
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import nfflax
from nfflax.weights import to_deepmind, to_timm
from nfflax.weights.naming import Tree

GOLDEN = Path(__file__).parent / "golden"

# By the last part of a parameter's name: scale of the normals, and offset. Kernels: by fan-in.
_SCALE_AND_OFFSET = {
    "gain": (0.2, 1.0),
    "skip_gain": (0.3, 0.7),
    "skipinit_gain": (0.3, 0.7),
    "bias": (0.1, 0.0),
    "b": (0.1, 0.0),
}


def golden(name: str) -> Any:
    """tests/golden/`name`: what a .json file says, or the arrays of an .npz file by name."""
    if name.endswith(".json"):
        return json.loads((GOLDEN / name).read_text())
    with np.load(GOLDEN / name) as arrays:
        return dict(arrays)


def normals(path: str, shape: Sequence[int]) -> np.ndarray:
    """Standard normals of `shape`, seeded by the text `path`."""
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(path.encode())))
    flat = rng.standard_normal(math.prod(shape), dtype=np.float32)
    return np.asarray(flat).reshape(tuple(shape))


def formula_param(path: str, shape: Sequence[int], layout: str = "haiku") -> np.ndarray:
    """The value of a parameter: "haiku", `module/name` and HWIO; "timm", its key and OIHW."""
    last = path.split("/" if layout == "haiku" else ".")[-1]
    if last in ("w", "weight"):
        scale = math.prod(shape[:-1] if layout == "haiku" else shape[1:]) ** -0.5
        offset = 0.0
    else:
        scale, offset = _SCALE_AND_OFFSET[last]
    return np.asarray(normals(path, shape) * np.float32(scale) + np.float32(offset))


def formula_input(shape: Sequence[int], path: str = "input") -> np.ndarray:
    """NHWC images; timm got the same, transposed."""
    return normals(path, shape)


def haiku_formula_tree(tree: Tree) -> dict[str, dict[str, np.ndarray]]:
    """Formula weights under the official names of a network, or of a tree of its parameters."""
    return {
        module: {
            name: formula_param(f"{module}/{name}", array.shape) for name, array in arrays.items()
        }
        for module, arrays in to_deepmind(tree).items()
    }


def timm_formula_state(tree: Tree) -> dict[str, np.ndarray]:
    """Formula weights under timm's names of a network, or of a tree of its parameters."""
    named = to_timm(tree)
    return {name: formula_param(name, array.shape, "timm") for name, array in named.items()}


def small_spec(preset: str, overrides: Mapping[str, Any] | None = None) -> nfflax.Spec:
    """A preset's structure at a few channels, with eleven blocks after the second stage's first:
    more than ten, so that sorting names as text would confuse them.
    """
    spec = nfflax.load_spec(preset)
    small = {
        "stem.width": [4] * len(spec.stem.width),
        "stages.depth": [1, 12, 2, 1],
        "stages.width": [8, 12, 16, 16],
        "stages.group_width": min(2, *spec.stages.group_width),
        "stages.fit_groups": "down",
        "head.num_classes": 5,
        "numerics.round_width": 1,
    }
    return nfflax.load_spec(preset, small | dict(overrides or {}))


def abstract_model(spec: str | nfflax.Spec) -> nfflax.NFNet:
    """A network with shapes in place of arrays: it costs nothing, however large."""
    return nnx.merge(*_abstract(nfflax.plan(spec)))


@functools.cache
def _abstract(plan: nfflax.Plan) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: nfflax.NFNet(plan, rngs=nnx.Rngs(0))))


def random_model(spec: str | nfflax.Spec, seed: int = 0) -> nfflax.NFNet:
    """A network with all parameters drawn by NumPy, so that nothing is compiled."""
    graph, state = _abstract(nfflax.plan(spec))
    rng = np.random.default_rng(seed)
    values = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), state)
    return nnx.merge(graph, values)


def weightless(spec: str | nfflax.Spec) -> Mapping[Any, Any]:
    """The parameter tree of a network, full of zeros that take no memory, however large it is."""
    shapes = params(abstract_model(spec))
    return jax.tree.map(lambda leaf: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape), shapes)


def params(model: nnx.Module) -> dict[Any, Any]:
    """A network's parameters as plain nested dicts."""
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def assert_equal(found: Any, wanted: Any) -> None:
    """Same names, and the same numbers to the bit."""
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
