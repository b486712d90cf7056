"""A run's real programs, compiled and not run: what the compiler says that they need.

Ahead of time: arguments are shapes, so nothing is allocated, however large the network.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from nfflax.insight.segments import Dtype, Remat
from nfflax.spec.load import load_run
from nfflax.spec.plan import Plan
from nfflax.spec.run import Run
from nfflax.spec.schema import Spec
from nfflax.train.mesh import batch_sharding, make_mesh
from nfflax.train.program import Program, make_program
from nfflax.train.state import abstract_model
from nfflax.weights.fold import fold


@dataclass(frozen=True)
class Compiled:
    """What the compiler says of a program. Bytes are those of one device."""

    platform: str
    arguments: int
    outputs: int
    aliased: int
    """Outputs that take the place of arguments."""
    temporary: int
    """The most that lives at once besides arguments and outputs."""
    seconds: float
    """To trace and compile it."""


def training_run(
    spec: Spec, *, batch: int, resolution: int, dtype: Dtype, remat: Remat, accumulate: int = 1
) -> Run:
    """One step of the ImageNet recipe of the NFNets, for a network and a batch."""
    how = {"model.dtype": dtype, "model.remat": remat, "model.set.resolution.train": resolution}
    length = {"train.steps": 1, "schedule.warmup_epochs": 0}
    portions = {"train.batch_size": batch, "train.accumulate": accumulate}
    return load_run("nfnet", {"model.spec": spec} | how | length | portions)


def compile_train_step(run: Run, devices: Sequence[Any] | None = None) -> Compiled:
    """Compile a run's train step for devices, by default the first one here."""
    mesh = make_mesh(run.mesh, jax.devices()[:1] if devices is None else devices)
    program = make_program(run, mesh)
    return _compiled(program.train_step, (program.abstract, abstract_batch(program)), mesh)


def compile_inference(plan: Plan, *, batch: int, dtype: Dtype) -> Compiled:
    """Compile the forward pass of the folded network for the first device here."""
    run = training_run(plan.spec, batch=batch, resolution=32, dtype=dtype, remat="none")
    graph, params = nnx.split(nnx.eval_shape(fold, abstract_model(run)))
    shape = (batch, *plan.input_size, plan.spec.stem.in_channels)
    images_NHWC = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    def forward(params: Any, images_NHWC: jax.Array) -> jax.Array:
        return nnx.merge(graph, params)(images_NHWC, train=False)

    arguments = nnx.to_pure_dict(params), images_NHWC
    return _compiled(jax.jit(forward), arguments, make_mesh(run.mesh, jax.devices()[:1]))


def abstract_batch(program: Program) -> Mapping[str, jax.ShapeDtypeStruct]:
    """Shape, type and sharding of a training batch as `nfflax.data.train_feed` gives it."""
    run, sharding = program.run, batch_sharding(program.mesh)
    rows, side, channels = (
        run.train.batch_size,
        run.spec.resolution.train,
        run.spec.stem.in_channels,
    )
    images = jax.ShapeDtypeStruct((rows, side, side, channels), jnp.uint8, sharding=sharding)
    labels = jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=sharding)
    own = {"images": images, "labels": labels}
    fresh = {"mix_images": images, "mix_labels": labels}
    return own | (fresh if run.augment.draws_partners else {})


def _compiled(function: Any, arguments: tuple[Any, ...], mesh: jax.sharding.Mesh) -> Compiled:
    begun = time.monotonic()
    with jax.set_mesh(mesh):
        program = function.lower(*arguments).compile()
    sizes, platform = program.memory_analysis(), mesh.devices.flat[0].platform
    return Compiled(
        platform=platform,
        arguments=sizes.argument_size_in_bytes,
        outputs=sizes.output_size_in_bytes,
        aliased=sizes.alias_size_in_bytes,
        temporary=temporary_bytes(sizes, platform),
        seconds=time.monotonic() - begun,
    )


def temporary_bytes(sizes: Any, platform: str) -> int:
    """The most that lives at once besides arguments and outputs, of a program's memory analysis.

    What libtpu calls temporary has some arguments in it once more, and some of the chip's own
    memory. Its peak does not: it is within 2% of what the compiler's memory report adds up to
    (libtpu 0.0.42.1 and 0.0.50.1, `xla_dump_to`). On CPUs the peak leaves out the temporaries.
    """
    if platform != "tpu":
        return sizes.temp_size_in_bytes
    outputs = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return max(0, sizes.peak_memory_in_bytes - sizes.argument_size_in_bytes - outputs)
