"""The mesh of a run: where every device stands, and which part of every array lies on it.

    data      splits the batch; every device holds all parameters
    fsdp      splits the batch, and every kernel by output unit
    tensor    splits the channels inside a block, groups kept whole
    spatial   splits images by height

What is computed per output unit, the statistics of weight standardisation and the norms of adaptive
gradient clipping, needs no communication under fsdp, and what a convolution gathers is the
standardised kernel in the compute type. Inside a block the first convolution is split by output,
grouped ones by group and the last one by input, so that a block adds its output up over "tensor"
once. A dimension that does not divide stays whole.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from nfflax.ambient import BATCH_AXES
from nfflax.nn.conv import GROUP_AXIS
from nfflax.nn.roles import Role, role_of
from nfflax.spec.errors import Problem
from nfflax.spec.execution import Mesh as MeshTable
from nfflax.spec.plan import plan
from nfflax.spec.run import Run
from nfflax.train.errors import MeshError

SPATIAL_AXIS = "spatial"
AXES = (*BATCH_AXES, GROUP_AXIS, SPATIAL_AXIS)

# What a role calls an axis of a parameter -> the mesh axes that split it, the outermost first.
LOGICAL: Mapping[str | None, tuple[str, ...]] = {
    "out": ("fsdp",),
    "mid_out": ("tensor", "fsdp"),
    "mid_in": ("tensor",),
    "classes": ("tensor", "fsdp"),
}

# Foreign parameters with fewer numbers are not worth the wait for a gather.
_LARGE = 1 << 16


# --- devices ----------------------------------------------------------------------------------


def make_mesh(table: MeshTable, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh that a `[mesh]` table asks for, over all devices or the given ones.

    Neighbours in the mesh are neighbours in the machine where JAX knows how, and every process has
    contiguous rows of the batch (see `feed_rows`). Raises MeshError when devices and axes disagree.
    """
    devices = sorted(jax.devices() if devices is None else devices, key=_place)
    feeds = [
        (len(set(hosts.values())), arranged)
        for arranged in _arrangements(_sizes(table, devices), devices)
        if (hosts := _hosts(arranged)) is not None
    ]
    if feeds:  # the more parts the hosts can feed, the less of the batch each prepares
        _, arranged = max(feeds, key=lambda feed: feed[0])
        return Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    sharing = table.tensor * table.spatial
    message = (
        f"tensor {table.tensor} x spatial {table.spatial}: {sharing} devices share rows of the "
        f"batch, which do not fall into whole processes ({_counted(devices)})"
    )
    allowed = "a product that divides a process's devices, or is a multiple of them"
    raise MeshError([Problem("run", "mesh.tensor", message, table.tensor, allowed)])


def _sizes(table: MeshTable, devices: Sequence[Any]) -> tuple[int, ...]:
    """The length of every axis, "data" filled in."""
    count = len(devices)
    if table.devices and table.devices != count:
        message = (
            f"there are {_counted(devices)}. If fewer than there should be: a process did not "
            "start or did not join, devices are hidden from it (CUDA_VISIBLE_DEVICES, XLA_FLAGS), "
            "or JAX was installed without support for them"
        )
        raise MeshError([Problem("run", "mesh.devices", message, table.devices, f"{count}, or 0")])
    others = table.fsdp * table.tensor * table.spatial
    asked = f"fsdp {table.fsdp} x tensor {table.tensor} x spatial {table.spatial}"
    if count % others:
        largest = max(("fsdp", "tensor", "spatial"), key=lambda axis: getattr(table, axis))
        message = f"{asked} = {others} does not divide the devices: there are {_counted(devices)}"
        value, allowed = getattr(table, largest), f"axes whose product divides {count}"
        raise MeshError([Problem("run", f"mesh.{largest}", message, value, allowed)])
    if table.data and table.data * others != count:
        message = f"data {table.data} x {asked} = {table.data * others}: not the devices there are"
        allowed = f"{count // others}, or 0 (there are {_counted(devices)})"
        raise MeshError([Problem("run", "mesh.data", message, table.data, allowed)])
    return count // others, table.fsdp, table.tensor, table.spatial


def _arrangements(sizes: tuple[int, ...], devices: Sequence[Any]) -> Iterator[np.ndarray]:
    """Ways to place the devices, the best first."""
    try:
        types = (AxisType.Auto,) * len(sizes)
        yield jax.make_mesh(sizes, AXES, axis_types=types, devices=devices).devices
    except (AssertionError, NotImplementedError, ValueError):
        pass  # JAX knows no good order: several TPU slices, or axes that do not fit a torus
    yield np.array(devices, object).reshape(sizes)


def _place(device: Any) -> tuple[int, ...]:
    """Devices of a slice, then of a process, stand together."""
    return getattr(device, "slice_index", 0), device.process_index, device.id


def _counted(devices: Sequence[Any]) -> str:
    """What there is, in words: "16 gpu devices, 8 in each of 2 processes"."""
    kinds = "/".join(sorted({device.platform for device in devices}))
    processes = [device.process_index for device in devices]
    shares = sorted({processes.count(process) for process in processes})
    each = " or ".join(map(str, shares))
    among = f"{each} in each of {len(set(processes))} processes"
    noun = "device" if len(devices) == 1 else "devices"
    return f"{len(devices)} {kinds} {noun}, {among if len(set(processes)) > 1 else 'in 1 process'}"


# --- the batch --------------------------------------------------------------------------------


def batch_shards(mesh: Mesh) -> int:
    """How many parts a batch is split into."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of everything with a leading batch axis."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def image_sharding(mesh: Mesh) -> NamedSharding:
    """Of images as the network gets them: by rows of the batch, and by height."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES, SPATIAL_AXIS))


def feed_rows(mesh: Mesh, batch_size: int) -> tuple[int, int]:
    """(host, hosts): this process feeds the `host`-th of `hosts` equal parts of every batch.

    Processes whose devices share rows, as under a tensor axis that spans them, feed the same part.
    """
    if batch_size % batch_shards(mesh):
        raise MeshError([_uneven("mesh", "batch_size", batch_size, mesh)])
    hosts = _hosts(mesh.devices)
    if hosts is None:
        message = "the rows of the batch on a process's devices are not contiguous"
        raise MeshError([Problem("mesh", "", message, allowed="a mesh from make_mesh")])
    return hosts[jax.process_index()], max(hosts.values()) + 1


def _hosts(devices: np.ndarray) -> dict[int, int] | None:
    """The part of the batch that each process feeds; None where rows are not in equal blocks."""
    rows: dict[int, set[int]] = {}
    for row, sharing in enumerate(devices.reshape(-1, math.prod(devices.shape[2:]))):
        for device in sharing:
            rows.setdefault(device.process_index, set()).add(row)
    size = len(next(iter(rows.values())))
    for own in rows.values():
        if len(own) != size or max(own) - min(own) >= size or min(own) % size:
            return None
    return {process: min(own) // size for process, own in rows.items()}


def check_fits(run: Run, mesh: Mesh) -> None:
    """That the run's batches and images divide as the mesh wants; raises MeshError."""
    name, shards, heights = f"run {run.name}", batch_shards(mesh), mesh.shape[SPATIAL_AXIS]
    size, accumulate = run.train.batch_size, run.train.accumulate
    problems = []
    if size % shards:
        problems.append(_uneven(name, "train.batch_size", size, mesh))
    elif size // accumulate % shards:
        message = f"makes microbatches of {size // accumulate} images, not a multiple of {shards}"
        message += f" ({_described(mesh, BATCH_AXES)})"
        allowed = f"a divisor of {size // shards}"
        problems.append(Problem(name, "train.accumulate", message, accumulate, allowed))
    if run.eval.batch_size % shards:
        problems.append(_uneven(name, "eval.batch_size", run.eval.batch_size, mesh))
    for key in ("train", "test"):
        if (height := getattr(run.spec.resolution, key)) % heights:
            message = f"images do not divide into {heights} parts by height (mesh.spatial)"
            where = f"model.set.resolution.{key}"
            problems.append(Problem(name, where, message, height, f"a multiple of {heights}"))
    if problems:
        raise MeshError(problems)


def mesh_notes(run: Run, mesh: Mesh) -> tuple[str, ...]:
    """What works on this mesh, but not as well as its user may think."""
    notes = []
    tensor, spatial = mesh.shape[GROUP_AXIS], mesh.shape[SPATIAL_AXIS]
    sides = run.spec.resolution
    blocks = plan(run.spec, resolution=min(sides.train, sides.test)).blocks
    whole = [block for block in blocks if block.groups % tensor]
    if whole:
        groups = ", ".join(map(str, sorted({block.groups for block in whole})))
        notes.append(
            f"mesh.tensor = {tensor} does not divide the number of groups ({groups}) of "
            f"{len(whole)} of {len(blocks)} blocks: each device runs their spatial convolutions "
            "whole"
        )
    lowest = min(block.resolution[0] for block in blocks)
    if spatial > lowest:
        notes.append(f"mesh.spatial = {spatial}: the last maps have {lowest} rows; some idle there")
    return tuple(notes)


def _uneven(name: str, key: str, size: int, mesh: Mesh) -> Problem:
    shards = batch_shards(mesh)
    message = f"does not divide into {shards} parts ({_described(mesh, BATCH_AXES)})"
    nearest = str(max(1, round(size / shards)) * shards)
    return Problem(name, key, message, size, f"a multiple of {shards}", nearest)


def _described(mesh: Mesh, axes: Sequence[str]) -> str:
    return " x ".join(f"{axis} {mesh.shape[axis]}" for axis in axes)


# --- parameters -------------------------------------------------------------------------------


def param_shardings(params: Any, mesh: Mesh) -> dict[Any, Any]:
    """The sharding of every parameter of a module or of its state, abstract or not.

    A pure dict as `nnx.to_pure_dict` makes them. Axes have the names that roles give them;
    parameters without a role are split over fsdp by their last axis, if they are large.
    """
    state = nnx.state(params, nnx.Param) if isinstance(params, nnx.Module) else params
    placed = [
        (path, NamedSharding(mesh, _spec(role_of(variable), variable.shape, mesh)))
        for path, variable in nnx.to_flat_state(state)
    ]
    return nnx.traversals.unflatten_mapping(dict(placed))


def _spec(role: Role | None, shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    names: tuple[str | None, ...] = (None,) * len(shape)
    if role is None:
        if len(shape) >= 2 and math.prod(shape) >= _LARGE:
            names = (*names[1:], "out")
    elif len(role.axes) >= 2:  # clipping takes the norm of a whole vector: those stay together
        names = (*names[len(role.axes) :], *role.axes)
    split = [
        _dividing(LOGICAL.get(n, ()), size, mesh) for n, size in zip(names, shape, strict=True)
    ]
    while split and split[-1] is None:
        split.pop()
    return PartitionSpec(*split)


def _dividing(axes: Sequence[str], size: int, mesh: Mesh) -> str | tuple[str, ...] | None:
    """Those of the mesh axes, tried in turn, that together divide a dimension."""
    taken: list[str] = []
    for axis in axes:
        length = mesh.shape[axis]
        if length > 1 and size % length == 0:
            taken.append(axis)
            size //= length
    return tuple(taken) if len(taken) > 1 else taken[0] if taken else None
