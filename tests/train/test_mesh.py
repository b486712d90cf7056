"""Devices are arranged as asked or not at all; rows and parameters go where the mesh says."""

import json
import math
from dataclasses import dataclass

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import nfflax
from nfflax.nn.conv import GROUP_AXIS
from nfflax.spec.execution import Mesh as MeshTable
from nfflax.spec.table import plain_text
from nfflax.train.errors import MeshError
from nfflax.train.layout import layout
from nfflax.train.mesh import (
    AXES,
    LOGICAL,
    batch_sharding,
    check_fits,
    feed_rows,
    image_sharding,
    make_mesh,
    mesh_notes,
    param_shardings,
)
from nfflax.train.program import make_program


def problem_of(function, *arguments):
    with pytest.raises(MeshError) as caught:
        function(*arguments)
    (problem,) = caught.value.problems
    return problem


# --- devices ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "sizes"),
    [
        (MeshTable(), (8, 1, 1, 1)),
        (MeshTable(fsdp=4), (2, 4, 1, 1)),
        (MeshTable(data=2, fsdp=2, tensor=2, devices=8), (2, 2, 2, 1)),
        (MeshTable(tensor=2, spatial=4), (1, 1, 2, 4)),
    ],
)
def test_data_takes_what_the_other_axes_leave(table, sizes):
    mesh = make_mesh(table)
    assert tuple(mesh.shape.items()) == tuple(zip(AXES, sizes, strict=True))
    assert mesh.axis_types == (AxisType.Auto,) * 4
    assert set(mesh.devices.flat) == set(jax.devices())


@pytest.mark.parametrize(
    ("table", "key", "words"),
    [
        (MeshTable(fsdp=3), "mesh.fsdp", "does not divide the devices: there are 8 cpu devices"),
        (MeshTable(fsdp=2, tensor=16), "mesh.tensor", "= 32 does not divide"),
        (MeshTable(data=3), "mesh.data", "not the devices there are"),
        (MeshTable(data=4), "mesh.data", "not the devices there are"),
        (MeshTable(devices=16), "mesh.devices", "there are 8 cpu devices, in 1 process."),
    ],
)
def test_axes_that_do_not_fit_are_refused(table, key, words):
    problem = problem_of(make_mesh, table)
    assert problem.key == key
    assert words in problem.message
    assert "8" in problem.allowed


@dataclass(frozen=True)
class Device:
    """What a mesh asks of a device."""

    id: int
    process_index: int
    platform: str = "fake"
    device_kind: str = "fake"


def machines(*devices_of_each: int) -> list[Device]:
    """Devices of several processes, in an order that no one asked for."""
    owners = [process for process, count in enumerate(devices_of_each) for _ in range(count)]
    devices = [Device(i, process) for i, process in enumerate(owners)]
    return devices[::2] + devices[1::2]


@pytest.mark.parametrize(
    ("table", "processes", "fed"),
    [
        (MeshTable(), (4, 4), [(0, 2), (1, 2)]),
        (MeshTable(fsdp=8), (4, 4), [(0, 2), (1, 2)]),
        (MeshTable(tensor=2), (4, 4), [(0, 2), (1, 2)]),
        (MeshTable(tensor=8), (4, 4), [(0, 1), (0, 1)]),
        (MeshTable(fsdp=2, tensor=2), (1, 1, 1, 1), [(0, 2), (0, 2), (1, 2), (1, 2)]),
        (MeshTable(tensor=2, spatial=2), (2, 2, 2, 2), [(0, 2), (0, 2), (1, 2), (1, 2)]),
    ],
)
def test_processes_feed_contiguous_rows(table, processes, fed, monkeypatch):
    """Also when JAX lists their devices in another order, and when they share rows."""
    mesh = make_mesh(table, machines(*processes))
    for process, expected in enumerate(fed):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        assert feed_rows(mesh, 16) == expected
    rows = mesh.devices.reshape(-1, table.tensor * table.spatial)
    hosts = [{fed[d.process_index][0] for d in sharing} for sharing in rows]
    assert hosts == [{row * fed[0][1] // len(rows)} for row in range(len(rows))]


@pytest.mark.parametrize(
    ("table", "processes"), [(MeshTable(tensor=4), (6, 6)), (MeshTable(), (2, 6))]
)
def test_rows_that_no_process_can_feed_are_refused(table, processes):
    problem = problem_of(make_mesh, table, machines(*processes))
    assert problem.key == "mesh.tensor"
    assert f"in each of {len(processes)} processes" in problem.message


def test_a_batch_that_does_not_divide_has_no_rows():
    assert problem_of(feed_rows, make_mesh(MeshTable()), 12).nearest == "16"


# --- runs -------------------------------------------------------------------------------------

NETWORK = {
    "extends": "nfnet",
    "name": "small",
    "stem": {"width": [16], "stride": [1]},
    "stages": {"depth": [1, 2], "width": [32, 64], "stride": 2, "group_width": 8, "expansion": 0.5},
    "head": {"num_classes": 10},
    "resolution": {"train": 16, "test": 24},
}


def run_of(**keys):
    changes = {key.replace("__", "."): value for key, value in keys.items()}
    model = {"spec": NETWORK, "dtype": "float32"}
    train = {"batch_size": 16, "steps": 10, "examples": 100}
    agc = {"clipping": 0.1}
    run = {"extends": "nfnet", "name": "r", "model": model, "train": train, "agc": agc}
    return nfflax.load_run(run | {"schedule": {"warmup_epochs": 0}}, changes)


@pytest.mark.parametrize(
    ("keys", "table", "key", "allowed"),
    [
        ({"train__batch_size": 12}, MeshTable(fsdp=2), "train.batch_size", "a multiple of 8"),
        ({"train__accumulate": 4}, MeshTable(), "train.accumulate", "a divisor of 2"),
        ({"eval__batch_size": 20}, MeshTable(), "eval.batch_size", "a multiple of 8"),
        (
            {"model__set__resolution__train": 20},
            MeshTable(spatial=8),
            "model.set.resolution.train",
            "a multiple of 8",
        ),
    ],
)
def test_what_does_not_divide_is_refused(keys, table, key, allowed):
    problem = problem_of(check_fits, run_of(**keys), make_mesh(table))
    assert (problem.file, problem.key, problem.allowed) == ("run r", key, allowed)


def test_what_divides_is_accepted():
    check_fits(run_of(train__accumulate=2), make_mesh(MeshTable()))
    check_fits(run_of(), make_mesh(MeshTable(tensor=2, spatial=4)))


def test_notes_tell_of_axes_that_idle():
    run = run_of()  # 2 and 4 groups, maps of 8 and 4 rows
    assert mesh_notes(run, make_mesh(MeshTable(tensor=2))) == ()
    (note,) = mesh_notes(run, make_mesh(MeshTable(tensor=4)))
    assert "mesh.tensor = 4 does not divide the number of groups (2) of 1 of 3 blocks" in note
    (note,) = mesh_notes(run, make_mesh(MeshTable(spatial=8)))
    assert "have 4 rows" in note


# --- parameters -------------------------------------------------------------------------------


class Embedder(nnx.Module):
    """A backbone with parameters of other people's beside it."""

    def __init__(self, rngs: nnx.Rngs):
        self.backbone = nfflax.build(nfflax.load_spec(NETWORK), rngs=rngs)
        self.head = nnx.Linear(256, 256, rngs=rngs)
        self.small = nnx.Linear(8, 8, rngs=rngs)


@pytest.fixture(scope="module")
def embedder():
    return nnx.eval_shape(lambda: Embedder(nnx.Rngs(0)))


def specs(model, table):
    shardings = param_shardings(nnx.state(model, nnx.Param), make_mesh(table))
    return jax.tree.map(lambda sharding: sharding.spec, shardings)


def test_kernels_are_split_by_unit_and_inside_blocks_by_channel(embedder):
    found = specs(embedder, MeshTable(fsdp=2, tensor=2))
    stack = found["backbone"]["stages"][1]["rest"]
    both = ("tensor", "fsdp")
    assert stack["conv0"]["kernel"] == P(None, None, None, None, both)
    assert stack["conv1"]["kernel"] == P(None, None, None, None, both)
    assert stack["conv2"]["kernel"] == P(None, None, None, "tensor", "fsdp")
    assert stack["conv2"]["gain"] == stack["skip_gain"] == P()  # clipped as one vector: kept whole
    assert stack["attention"]["fc0"]["kernel"] == P(None, None, both)
    assert stack["attention"]["fc1"]["kernel"] == P(None, "tensor", "fsdp")
    assert found["backbone"]["stem"]["convs"][0]["kernel"] == P(None, None, None, "fsdp")
    assert found["backbone"]["classifier"]["kernel"] == P(None, "tensor")  # 10 classes: not by 4


def test_foreign_parameters_are_split_when_large(embedder):
    found = specs(embedder, MeshTable(fsdp=4))
    assert found["head"]["kernel"] == P(None, "fsdp")
    assert found["head"]["bias"] == found["small"]["kernel"] == P()


def test_without_axes_everything_is_whole(embedder):
    assert set(
        jax.tree.leaves(specs(embedder, MeshTable()), is_leaf=lambda x: isinstance(x, P))
    ) == {P()}


def test_the_units_of_a_kernel_stay_on_one_device_under_fsdp(embedder):
    """What weight standardisation and clipping reduce is never split by fsdp."""
    state = nnx.state(embedder.backbone, nnx.Param)
    found = param_shardings(embedder.backbone, make_mesh(MeshTable(fsdp=2, tensor=2)))
    placed = dict(nnx.traversals.flatten_mapping(found))
    assert len(placed) == len(nnx.to_flat_state(state))
    for path, variable in nnx.to_flat_state(state):
        role, spec = nfflax.role_of(variable), placed[path].spec
        assert role is not None
        split = dict(enumerate(spec, start=-len(variable.shape)))
        assert not any("fsdp" in (split.get(axis) or ()) for axis in role.unit_axes), path


def test_every_logical_axis_means_mesh_axes():
    assert {axis for axes in LOGICAL.values() for axis in axes} <= set(AXES)
    assert GROUP_AXIS in AXES


def test_batches_and_images_are_split_by_row_and_height():
    mesh = make_mesh(MeshTable(fsdp=2, spatial=4))
    assert batch_sharding(mesh).shard_shape((16, 8, 8, 3)) == (8, 8, 8, 3)
    assert image_sharding(mesh).shard_shape((16, 8, 8, 3)) == (8, 2, 8, 3)


# --- layout -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def abstract():
    return make_program(run_of(), make_mesh(MeshTable(fsdp=4))).abstract


def test_layout_counts_all_bytes(abstract):
    found = layout(abstract)
    weights = sum(leaf.size for leaf in jax.tree.leaves(abstract["params"]))
    assert found.totals["params"].bytes == sum(row.share.bytes for row in found.rows) == 4 * weights
    assert found.totals["ema"] == found.totals["params"]
    assert found.totals["opt"].bytes >= 4 * weights  # momentum
    held = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape))
        for leaf in jax.tree.leaves(abstract["params"])
    )
    assert found.totals["params"].per_device == 4 * held < 0.3 * 4 * weights
    assert found.total.bytes == sum(share.bytes for share in found.totals.values())


def test_layout_is_where_real_parameters_lie(abstract):
    params = {
        name: jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding)
        for name, leaf in abstract["params"]["stages"][1]["rest"]["conv1"].items()
    }
    held = sum(leaf.addressable_shards[3].data.nbytes for leaf in params.values())
    assert layout({"params": params}).total.per_device == held


def test_layout_as_data_and_as_a_table(abstract, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    found = layout(abstract)
    data = json.loads(json.dumps(found.as_dict()))
    assert data["mesh"] == {"data": 2, "fsdp": 4, "tensor": 1, "spatial": 1}
    assert data["total"]["per_device"] == found.total.per_device
    kernels = next(row for row in data["rows"] if row["part"] == "stages.1" and any(row["split"]))
    assert kernels["split"][-1] == "fsdp"
    assert np.prod(kernels["shape"]) * 4 <= kernels["share"]["bytes"]
    text = plain_text(found)
    for words in ("stages.1", "split by", "their running average", "data 2 × fsdp 4"):  # noqa: RUF001
        assert words in text
