"""Training on a mesh is training on one device, and sends what its layout says and no more."""

import functools
import math
import re
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

import nfflax
from nfflax.spec.execution import Mesh as MeshTable
from nfflax.spec.plan import plan
from nfflax.train.mesh import batch_shards, make_mesh
from nfflax.train.program import Program, make_program
from nfflax.train.state import shardings_of

BATCH, SIDE, CLASSES, STEPS = 40, 8, 16, 10  # 40: a shard's rows are no axis of a kernel
RUN = {
    "extends": "nfnet",
    "name": "sharded",
    "model": {
        "dtype": "float32",
        "spec": {
            "extends": "nfnet",
            "name": "sharded",
            "stem": {"width": [16], "stride": [1]},
            "stages": {
                "depth": [2],
                "width": [64],
                "stride": [2],
                "group_width": [8],
                "spatial_convs": [1],
            },
            "regularization": {"stochastic_depth": 0.3},
            "head": {"num_classes": CLASSES},
            "resolution": {"train": SIDE, "test": SIDE},
        },
    },
    "augment": {"mixup": 0.2, "cutmix": False, "layers": 0},
    "train": {"batch_size": BATCH, "steps": STEPS, "examples": 1000},
    "schedule": {"warmup_epochs": 0, "learning_rate": 0.4},
    "agc": {"clipping": 0.08},
}
MESHES = {
    "one device": MeshTable(),
    "data 8": MeshTable(),
    "data 2, fsdp 4": MeshTable(fsdp=4),
    "data 2, fsdp 2, tensor 2": MeshTable(fsdp=2, tensor=2),
    "data 4, tensor 2": MeshTable(tensor=2),
    "data 2, spatial 4": MeshTable(spatial=4),
    "data 2, tensor 2, spatial 2": MeshTable(tensor=2, spatial=2),
    "tensor 8, more than there are groups": MeshTable(tensor=8),
}
# Compiled for speed of compilation; results differ from the usual in rounding only.
QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@functools.cache
def compiled(mesh_name: str, accelerator: bool) -> tuple[Program, Any]:
    """A mesh's program and its train step, of CPU's operations or of those that others get."""
    devices = jax.devices()[: 1 if mesh_name == "one device" else 8]
    mesh = make_mesh(MESHES[mesh_name], devices)
    program = make_program(nfflax.load_run(RUN), mesh)
    with pytest.MonkeyPatch.context() as patch, jax.set_mesh(mesh):
        if accelerator:
            patch.setattr(jax.lax, "platform_dependent", lambda *a, cpu, default: default(*a))
        step = program.train_step.lower(program.abstract, program.put(batch(0), BATCH))
        return program, step.compile(compiler_options=QUICKLY)


def batch(step: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(step)
    images = random.integers(0, 256, (2, BATCH, SIDE, SIDE, 3), dtype=np.uint8)
    labels = random.integers(0, CLASSES, (2, BATCH), dtype=np.int32)
    return {
        "images": images[0],
        "mix_images": images[1],
        "labels": labels[0],
        "mix_labels": labels[1],
    }


@functools.cache
def first_state() -> Any:
    program, _ = compiled("one device", False)
    return jax.device_get(program.init())


@functools.cache
def trained(mesh_name: str, accelerator: bool) -> tuple[list[float], Any]:
    """The losses of ten steps, and the state after them."""
    program, step = compiled(mesh_name, accelerator)
    state, losses = jax.device_put(first_state(), shardings_of(program.abstract)), []
    for i in range(STEPS):
        state, metrics = step(state, program.put(batch(i), BATCH))
        losses.append(float(metrics["loss"]))
    return losses, jax.device_get(state)


@pytest.mark.parametrize(
    ("mesh_name", "accelerator"),
    [
        pytest.param("data 2, fsdp 2, tensor 2", True, marks=pytest.mark.slow),
        *(pytest.param(name, False, marks=pytest.mark.slow) for name in [*MESHES][1:]),
        pytest.param("data 2, fsdp 4", True, marks=pytest.mark.slow),
    ],
)
def test_ten_steps_are_one_devices(mesh_name, accelerator):
    """With grouped convolutions, attention, stochastic depth, mixing, clipping and an average."""
    losses, state = trained(mesh_name, accelerator)
    wanted_losses, wanted = trained("one device", False)
    assert len(set(wanted_losses)) == STEPS
    np.testing.assert_allclose(losses, wanted_losses, rtol=1e-5)
    assert int(state["step"]) == STEPS
    for part in ("params", "ema", "opt"):
        leaves = jax.tree_util.tree_leaves_with_path(wanted[part])
        whole = math.sqrt(sum(float(np.sum(np.square(right))) for _, right in leaves))
        for (path, right), found in zip(leaves, jax.tree.leaves(state[part]), strict=True):
            difference = np.linalg.norm(np.float64(found) - right)
            norm = np.linalg.norm(right)
            assert difference <= 1e-5 * norm + 1e-7 * whole, jax.tree_util.keystr(path)


@pytest.mark.slow
def test_the_first_state_is_the_same_on_every_mesh():
    program, _ = compiled("data 2, fsdp 2, tensor 2", True)
    with jax.set_mesh(program.mesh):
        state = program.init()
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), state, first_state()
    )
    placed = jax.tree.map(
        lambda leaf, wanted: leaf.sharding == wanted.sharding, state, program.abstract
    )
    assert all(jax.tree.leaves(placed))


# --- what is sent -----------------------------------------------------------------------------


class Sent(NamedTuple):
    """An array that one instruction of a program sends; those in a loop are counted once."""

    operation: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


OPERATIONS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
SENDS = re.compile(rf" = (.*?) ({OPERATIONS})(?:-start)?\(")
ARRAY = re.compile(r"f32\[([\d,]*)\]")


def sent(mesh_name: str) -> list[Sent]:
    _, step = compiled(mesh_name, True)
    found = [
        Sent(operation, tuple(map(int, filter(None, dims.split(",")))))
        for arrays, operation in SENDS.findall(step.as_text())
        for dims in ARRAY.findall(arrays)
    ]
    assert found
    return found


def counts(mesh_name: str) -> tuple[int, int]:
    """Weights of the network, and rows of the batch on one device."""
    program, _ = compiled(mesh_name, True)
    weights = sum(leaf.size for leaf in jax.tree.leaves(program.abstract["params"]))
    return weights, BATCH // batch_shards(program.mesh)


def maps(arrays: list[Sent], rows: int) -> list[Sent]:
    """Those that are maps (N, H, W, C) of at least a device's rows: no kernel is."""
    return [array for array in arrays if len(array.shape) == 4 and array.shape[0] >= rows]


def volume(arrays: list[Sent], operation: str) -> int:
    return sum(array.size for array in arrays if array.operation == operation)


@pytest.mark.slow
def test_data_parallelism_sends_gradients_and_nothing_else():
    arrays, (weights, _) = sent("data 8"), counts("data 8")
    assert {array.operation for array in arrays if array.size > CLASSES} == {"all-reduce"}
    assert volume(arrays, "all-reduce") <= 1.02 * weights


@pytest.mark.slow
def test_fsdp_sends_kernels_and_gradients_but_no_maps():
    arrays, (weights, rows) = sent("data 2, fsdp 4"), counts("data 2, fsdp 4")
    assert not maps(arrays, rows)
    assert volume(arrays, "all-gather") <= 2 * weights  # for the forward and the backward pass
    assert volume(arrays, "all-reduce") <= 2 * weights  # CPU has no reduce-scatter


@pytest.mark.slow
def test_tensor_parallelism_sends_one_map_per_block_and_pass():
    name = "data 2, fsdp 2, tensor 2"
    arrays, (weights, rows) = sent(name), counts(name)
    first, second = plan(nfflax.load_run(RUN).spec).blocks
    output = rows * math.prod(first.resolution) * first.out_channels
    inputs = rows * SIDE**2 * first.in_channels + output  # the second's is the first's output
    assert second.resolution == first.resolution
    moved = maps(arrays, rows)
    assert {array.shape[0] for array in moved} == {rows}  # no device sees another's images
    assert sum(array.size for array in moved) <= 2 * output + inputs  # forward and backward
    kernels = [array for array in arrays if array not in moved]
    assert volume(kernels, "all-gather") <= 2 * weights
