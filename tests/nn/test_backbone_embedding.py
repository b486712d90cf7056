"""A backbone, partly frozen, inside another module, another transformation, another framework."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.nnx import bridge
from golden_data import assert_equal
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import nfflax
from nfflax.nn import Frozen
from nfflax.spec.run import Mesh as MeshTable
from nfflax.train.mesh import image_sharding, make_mesh, param_shardings

SPEC = {
    "name": "front",
    "stem": {"width": 8, "stride": 2},
    "stages": {"depth": [2, 3], "width": 16, "stride": [1, 2], "group_width": 8},
    "attention": {"kind": "se"},
    "block": {"skip_gain": "ones"},
    "regularization": {"stochastic_depth": 0.3},
}
IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(8, 16, 16, 3)), jnp.float32)
LABELS = np.arange(8) % 3
KEY = jax.random.key(7)


class Classifier(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs, **how):
        self.backbone = nfflax.backbone(SPEC, (2, 3), frozen=2, rngs=rngs, **how)
        widths = [info.channels for info in self.backbone.feature_info]
        self.head = nnx.Linear(sum(widths), 3, rngs=rngs)

    def __call__(self, x_NHWC, key=None):
        maps = self.backbone(x_NHWC, rngs=key)
        return self.head(jnp.concatenate([m.mean((1, 2)) for m in maps.values()], axis=-1))


def loss_of(model, key=KEY):
    logits = model(IMAGES, key)
    return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()


def gradients_of(model, wrap=lambda f: f):
    """(loss, gradients) by plain JAX, over pure dicts."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    loss = wrap(lambda params, rest: loss_of(nnx.merge(graph, params, rest)))
    compiled = jax.jit(jax.value_and_grad(loss))
    return compiled(nnx.to_pure_dict(params), nnx.to_pure_dict(rest))


def assert_close(found, wanted):
    jax.tree.map(lambda f, w: np.testing.assert_allclose(f, w, rtol=1e-3, atol=1e-5), found, wanted)


@pytest.fixture
def model():
    model = Classifier(rngs=nnx.Rngs(0))
    model.train()
    return model


def test_equal_backbones_are_one_program():
    first, second = (
        nnx.graphdef(nnx.eval_shape(lambda: Classifier(rngs=nnx.Rngs(0), activated=True)))
        for _ in range(2)
    )
    assert first == second
    assert hash(first) == hash(second)


@pytest.mark.slow
def test_trains_above_what_is_frozen(model):
    frozen, params = (nnx.to_pure_dict(nnx.state(model, kind)) for kind in (Frozen, nnx.Param))
    optimizer = nnx.Optimizer(model, optax.chain(nfflax.agc(0.1), optax.sgd(0.1)), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss, gradients = nnx.value_and_grad(loss_of)(model)
        optimizer.update(model, gradients)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(10)]
    assert losses[-1] < losses[0]
    assert_equal(nnx.to_pure_dict(nnx.state(model, Frozen)), frozen)
    after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    moved = jax.tree.map(lambda b, a: bool(np.any(b != a)), params, after)
    assert all(jax.tree.leaves(moved))
    assert list(frozen["backbone"]["stages"]) == [0]
    assert list(params["backbone"]["stages"]) == [1]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["jax.checkpoint", "nnx.remat", "block"])
def test_recomputation_changes_no_number(model, how):
    wanted = gradients_of(model)
    if how == "block":
        recomputed = Classifier(rngs=nnx.Rngs(0), remat="block")
        recomputed.train()
        assert_close(gradients_of(recomputed), wanted)
    elif how == "jax.checkpoint":
        assert_close(gradients_of(model, jax.checkpoint), wanted)
    else:
        gradients = nnx.jit(nnx.grad(nnx.remat(loss_of)))(model)
        assert_close(nnx.to_pure_dict(gradients), wanted[1])


@pytest.mark.slow
def test_vmap_over_an_ensemble(model):
    members = [model, Classifier(rngs=nnx.Rngs(1))]
    for member in members:
        member.eval()
    graph, _ = nnx.split(model)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(nnx.state, members))
    found = jax.jit(jax.vmap(lambda state: nnx.merge(graph, state)(IMAGES)))(stacked)
    np.testing.assert_allclose(found, [jax.jit(lambda m: m(IMAGES))(m) for m in members], rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_stay_frozen(model, copied):
    assert_close(gradients_of(copied(model)), gradients_of(model))


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{"fsdp": 8}, {"fsdp": 2, "tensor": 2}])
def test_a_mesh_changes_no_number(model, axes):
    """Frozen parameters lie where their roles say, as all others."""
    wanted = gradients_of(model)
    mesh = make_mesh(MeshTable(**axes))
    graph, state = nnx.split(model)
    places = param_shardings(state, mesh)
    frozen = places["backbone"]["stem"]["convs"][0]["kernel"]
    assert frozen == NamedSharding(mesh, P(None, None, None, "fsdp"))
    state = jax.tree.map(jax.device_put, nnx.to_pure_dict(state), places)
    images = jax.device_put(IMAGES, image_sharding(mesh))

    def loss(state):
        logits = nnx.merge(graph, state)(images, KEY)
        return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()

    with jax.set_mesh(mesh):
        value, gradients = jax.jit(jax.value_and_grad(loss))(state)
    np.testing.assert_allclose(value, wanted[0], rtol=1e-4)
    assert not np.any(gradients["backbone"]["stages"][0]["first"]["conv0"]["kernel"])
    assert_close(gradients["head"], wanted[1]["head"])
    assert_close(gradients["backbone"]["stages"][1], wanted[1]["backbone"]["stages"][1])


class LinenClassifier(linen.Module):
    @linen.compact
    def __call__(self, x_NHWC):
        backbone = bridge.to_linen(nfflax.backbone, SPEC, (2, 3), frozen=2, name="backbone")
        return linen.Dense(3)(backbone(x_NHWC)[3].mean((1, 2)))


@pytest.mark.slow
def test_linen_keeps_frozen_parameters_apart():
    variables = linen.unbox(jax.jit(LinenClassifier().init)(KEY, IMAGES))
    model = Classifier(rngs=nnx.Rngs(0))
    for kind, name in ((nnx.Param, "params"), (Frozen, "frozen")):
        wanted = nnx.to_pure_dict(nnx.state(model.backbone, kind))
        assert jax.tree.map(jnp.shape, variables[name]["backbone"]) == jax.tree.map(
            jnp.shape, wanted
        )

    def loss(params):
        logits = LinenClassifier().apply(variables | {"params": params}, IMAGES)
        return jnp.sum(jnp.asarray(logits) ** 2)

    gradients = jax.jit(jax.grad(loss))(variables["params"])
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradients["backbone"]))
