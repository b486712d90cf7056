"""A whole network on a mesh has one device's gradients, whatever is sharded over what."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import nfflax
from nfflax.nn import role_of

# With KINDS, every kind of layer: grouped, dense, pointwise, pooled, attentions, norm, head.
SPEC = {
    "extends": "nfnet",
    "name": "sharded",
    "stem": {"width": [8, 16], "stride": [1, 2]},
    "stages": {"depth": [1, 3], "width": [32, 64], "stride": [1, 2], "group_width": 8},
    "block": {"skip_gain": "ones"},
    "head": {"num_classes": 16},
    "resolution": {"train": 16, "test": 16},
}
KINDS = {
    "nfnet": {},
    "eca": {"attention.kind": "eca"},
    "dense, strided shortcut": {
        "stages.group_width": 0,
        "stages.shortcut": "strided 1x1",
        "stem.pool": "max",
    },
    "batch norm": {"norm.kind": "batch", "block.skip_gain": "none"},
}
COLUMNS = {"out": "fsdp", "mid_out": "fsdp", "classes": "fsdp"}
TENSOR = {"out": "fsdp", "mid_out": "tensor", "mid_in": "tensor", "classes": "tensor"}
LAYOUTS = [
    ((8, 1, 1), ("data",), {}),
    ((2, 2, 2), ("data", "fsdp"), COLUMNS),
    ((2, 2, 2), ("data",), TENSOR),  # an idle axis for the batch: where grouped gradients go wrong
    ((1, 4, 2), ("data", "fsdp"), TENSOR),
    ((1, 1, 8), (), TENSOR),
]


def loss(graph, params, rest, x):
    logits = nnx.merge(graph, params, rest)(x, train=True, rngs=jax.random.key(0))
    return jnp.mean(jnp.square(logits - 1.0))


@pytest.fixture(scope="module")
def case(request):
    changes = KINDS[request.param] | {"regularization.stochastic_depth": 0.3}
    model = nfflax.build(nfflax.load_spec(SPEC, changes), rngs=nnx.Rngs(0))
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    roles = {path: role_of(variable) for path, variable in nnx.to_flat_state(params)}
    params, rest = nnx.to_pure_dict(params), nnx.to_pure_dict(rest)
    x = jax.random.normal(jax.random.key(1), (8, 16, 16, 3))
    step = jax.jit(jax.value_and_grad(loss, argnums=1), static_argnums=0)
    return graph, params, rest, roles, x, step(graph, params, rest, x)


def shardings(params, roles, mesh, rules):
    def one(path, leaf):
        axes = roles[tuple(key.key for key in path)].axes
        names = (None,) * (leaf.ndim - len(axes)) + tuple(rules.get(a) for a in axes)
        sizes = zip(names, leaf.shape, strict=True)
        fits = [n if n and size % mesh.shape[n] == 0 else None for n, size in sizes]
        return NamedSharding(mesh, P(*fits))

    return jax.tree_util.tree_map_with_path(one, params)


@pytest.mark.parametrize(
    ("case", "layout", "platform"),
    [
        ("nfnet", 2, "cpu"),
        ("dense, strided shortcut", 1, "default"),
        pytest.param("dense, strided shortcut", 2, "cpu", marks=pytest.mark.slow),
        pytest.param("nfnet", 1, "default", marks=pytest.mark.slow),
        *(pytest.param("nfnet", i, "cpu", marks=pytest.mark.slow) for i in (0, 3)),
        pytest.param("nfnet", 4, "default", marks=pytest.mark.slow),
        pytest.param("eca", 2, "cpu", marks=pytest.mark.slow),
        pytest.param("batch norm", 1, "default", marks=pytest.mark.slow),
    ],
    indirect=["case"],
)
def test_gradients_equal_one_devices(case, layout, platform, monkeypatch):
    """On CPU as it runs there, and with the operations that GPUs and TPUs get."""
    if platform == "default":
        monkeypatch.setattr(jax.lax, "platform_dependent", lambda *a, cpu, default: default(*a))
    shape, batch, rules = LAYOUTS[layout]
    graph, params, rest, roles, x, (value, gradients) = case
    mesh = Mesh(
        np.array(jax.devices()).reshape(shape),
        ("data", "fsdp", "tensor"),
        axis_types=(AxisType.Auto,) * 3,
    )
    params = jax.device_put(params, shardings(params, roles, mesh, rules))
    x = jax.device_put(x, NamedSharding(mesh, P(batch or None)))
    with jax.set_mesh(mesh):
        step = jax.jit(jax.value_and_grad(loss, argnums=1), static_argnums=0)
        found_value, found = step(graph, params, rest, x)
    assert float(found_value) == pytest.approx(float(value), rel=1e-5)
    whole = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(gradients)))
    wanted = dict(jax.tree_util.tree_leaves_with_path(gradients))
    for path, gradient in jax.tree_util.tree_leaves_with_path(found):
        difference = np.linalg.norm(np.asarray(gradient) - np.asarray(wanted[path]))
        norm = np.linalg.norm(np.asarray(wanted[path]))
        assert difference <= 1e-5 * norm + 1e-7 * whole, path
