"""The mesh around the code being traced (`jax.set_mesh`), seen alike by all parts of nfflax."""

import jax
from jax.sharding import AxisType

BATCH_AXES = ("data", "fsdp")  # mesh axes that split the batch


def automatic_axes() -> dict[str, int]:
    """Axes that no `shard_map` around us has taken, with their sizes; empty without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if AxisType.Explicit in mesh.axis_types:
        raise ValueError("nfflax needs a mesh of AxisType.Auto axes; this one has Explicit axes")
    axes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return {name: size for name, size, kind in axes if kind == AxisType.Auto}


def has_mesh() -> bool:
    """Whether there is a mesh around the code, its axes taken or not."""
    return bool(jax.sharding.get_abstract_mesh().axis_names)
