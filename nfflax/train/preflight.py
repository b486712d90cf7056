"""A check before training: one grouped convolution on the run's mesh against plain arithmetic.

XLA's partitioner is known to multiply the weight gradients of grouped convolutions by the size of a
mesh axis, without an error (openxla/xla#47945 is its sibling). `nfflax.nn.conv` goes around that; a
new compiler, a new platform or a new mesh may bring it back, and a run must then not start.
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nfflax.ambient import BATCH_AXES
from nfflax.nn.conv import GROUP_AXIS, conv
from nfflax.spec.errors import Problem
from nfflax.train.errors import MeshError
from nfflax.train.mesh import SPATIAL_AXIS, batch_shards

TOLERANCE = 1e-4
_WIDTH = 4  # channels of a group
_SPLIT = (SPATIAL_AXIS, None, GROUP_AXIS)  # height, width, channels of a map inside a block


def preflight(mesh: Mesh) -> None:
    """Raise MeshError unless a grouped convolution and both its gradients are right on this mesh.

    All processes call it together. It takes a second or two, most of it to compile.
    """
    x_NHWC, w_HWIO, dy_NHWC, groups = _example(mesh)
    # Maps as they are inside a block, and with the other axes idle: XLA has been right in the one
    # case and wrong in the other. Whole maps occur where axes do not divide.
    of_maps = [NamedSharding(mesh, P(BATCH_AXES, *rest)) for rest in ((), _SPLIT)]
    of_kernel = NamedSharding(mesh, P(None, None, None, GROUP_AXIS))

    def run(x_NHWC: jax.Array, w_HWIO: jax.Array, dy_NHWC: jax.Array) -> tuple[jax.Array, ...]:
        y_NHWC, pullback = jax.vjp(lambda x, w: conv(x, w, groups=groups), x_NHWC, w_HWIO)
        return y_NHWC, *pullback(dy_NHWC)

    with jax.set_mesh(mesh):
        kinds = [(of_map, of_map, of_kernel) for of_map in of_maps]
        given = [
            (_put(x_NHWC, of_map), _put(w_HWIO, of_kernel), _put(dy_NHWC, of_map))
            for of_map in of_maps
        ]
        found = jax.jit(lambda cases: [run(*case) for case in cases], out_shardings=kinds)(given)
        right = _by_hand(x_NHWC, w_HWIO, dy_NHWC, groups)
        wanted = [tuple(map(_put, right, kind)) for kind in kinds]
        measured = jax.jit(_compared, out_shardings=NamedSharding(mesh, P()))(found, wanted)
    problems = {}
    names = ("output", "gradient of the input", "gradient of the kernel") * len(of_maps)
    for name, (error, factor) in zip(names, np.asarray(measured).tolist(), strict=True):
        if not error <= TOLERANCE:  # NaN is wrong, too
            axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
            message = (
                f"on the mesh {axes} the {name} of a grouped convolution is wrong: {factor:.4g} "
                f"times the right one, relative error {error:.2g}. Training would go wrong without "
                "a sign of it. A compiler error, most likely: try another mesh or JAX version"
            )
            problems[name] = Problem("preflight", "mesh", message)
    if problems:
        raise MeshError(list(problems.values()))


def _example(mesh: Mesh) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """A map, a kernel and a gradient of small whole numbers: exact in any compute type."""
    tensor = mesh.shape[GROUP_AXIS]
    groups = 2 * tensor  # several on each device, or XLA would see dense convolutions
    channels = groups * _WIDTH
    of_map = batch_shards(mesh), 3 * mesh.shape[SPATIAL_AXIS], 4, channels
    of_kernel = 3, 3, channels // groups, channels
    random = np.random.default_rng(0)
    x_NHWC, w_HWIO, dy_NHWC = (
        random.integers(-2, 3, shape).astype(np.float32) for shape in (of_map, of_kernel, of_map)
    )
    return x_NHWC, w_HWIO, dy_NHWC, groups


def _by_hand(
    x_NHWC: np.ndarray, w_HWIO: np.ndarray, dy_NHWC: np.ndarray, groups: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Output and both gradients, tap by tap, in numpy."""
    n, h, w, channels = x_NHWC.shape
    by_group = (n, h, w, groups, channels // groups)
    x = np.pad(x_NHWC, ((0, 0), (1, 1), (1, 1), (0, 0))).reshape(n, h + 2, w + 2, *by_group[3:])
    kernel = w_HWIO.reshape(3, 3, channels // groups, groups, -1)
    dy = dy_NHWC.reshape(by_group)
    y, dx, dkernel = np.zeros_like(dy), np.zeros_like(x), np.zeros_like(kernel)
    for i, j in itertools.product(range(3), range(3)):
        window = np.s_[:, i : i + h, j : j + w]
        y += np.einsum("nhwgi,igo->nhwgo", x[window], kernel[i, j])
        dx[window] += np.einsum("nhwgo,igo->nhwgi", dy, kernel[i, j])
        dkernel[i, j] = np.einsum("nhwgi,nhwgo->igo", x[window], dy)
    return (
        y.reshape(x_NHWC.shape),
        dx[:, 1:-1, 1:-1].reshape(x_NHWC.shape),
        dkernel.reshape(w_HWIO.shape),
    )


def _put(value: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Every process has the whole value and gives its devices their parts of it."""
    return jax.make_array_from_callback(value.shape, sharding, lambda part: value[part])


def _compared(found: Any, wanted: Any) -> jax.Array:
    """Of each array found: the relative error, and the factor that brings it nearest."""
    rows = []
    for got, right in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        norm = jnp.sum(right * right)
        factor = jnp.sum(got * right) / norm
        rows.append(jnp.stack([jnp.sqrt(jnp.sum(jnp.square(got - right)) / norm), factor]))
    return jnp.stack(rows)
