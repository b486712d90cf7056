"""A network as a part: inside another module, another transformation, another framework."""

import copy
import pickle
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.nnx import bridge

import nfflax
from nfflax import Role, role_of

# One transition block and a stack of two: whatever a large network has, once.
BACKBONE = {
    "name": "backbone",
    "stem": {"width": 4, "stride": 2},
    "stages": {"depth": [3], "width": 8, "stride": 1, "group_width": 4, "spatial_convs": 1},
    "attention": {"kind": "se"},
    "block": {"skip_gain": "ones"},
    "head": {"num_classes": 0},
    "regularization": {"stochastic_depth": 0.6},
}
BATCH_NORMALISED = BACKBONE | {
    "block": {"skip_gain": "none"},
    "norm": {"kind": "batch"},
    "regularization": {"stochastic_depth": 0.0},
}
KEY = jax.random.key(7)
STEPS = 15
SGD = optax.sgd(0.1)  # one object, so that steps of equal models compile once
IMAGES = np.random.default_rng(0).normal(size=(6, 8, 8, 3)).astype(np.float32)
LABELS = np.arange(6) % 3


class Classifier(nnx.Module):
    """A backbone and a linear layer of its own, on the pooled output or on a feature map."""

    def __init__(self, *, spec=BACKBONE, level: int | None = None, rngs: nnx.Rngs):
        self.backbone = nfflax.build(spec, rngs=rngs)
        self.head = nnx.Linear(self.backbone.num_features, 3, rngs=rngs)
        self.level = level

    def __call__(self, x_NHWC: jax.Array, key: jax.Array | None = None) -> jax.Array:
        if self.level is None:
            return self.head(self.backbone(x_NHWC, rngs=key))
        map_NHWC = self.backbone.features(x_NHWC, [self.level], rngs=key)[self.level]
        return self.head(jnp.mean(map_NHWC, (1, 2)))


@nnx.jit
def forward(model, x_NHWC, key=None):
    return model(x_NHWC, key)


def loss_of(model, key=None):
    logits = model(jnp.asarray(IMAGES), key)
    return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()


@nnx.jit
def sgd_step(model, optimizer, key):
    loss, gradients = nnx.value_and_grad(loss_of)(model, key)
    optimizer.update(model, gradients)
    return loss


@pytest.fixture
def model():
    return Classifier(rngs=nnx.Rngs(0))


def roles(module) -> dict[tuple, Role | None]:
    return {path: role_of(variable) for path, variable in nnx.to_flat_state(nnx.state(module))}


# Training


@pytest.mark.parametrize(
    "level",
    [pytest.param(None, id="pooled", marks=pytest.mark.slow), pytest.param(2, id="features")],
)
def test_trains_under_nnx_jit(level):
    model = Classifier(level=level, rngs=nnx.Rngs(0))
    model.train()
    before = nnx.to_pure_dict(nnx.state(model))
    optimizer = nnx.Optimizer(model, SGD, wrt=nnx.Param)
    losses = [float(sgd_step(model, optimizer, KEY)) for _ in range(STEPS)]
    assert losses[-1] < 0.8 * losses[0]
    after = nnx.to_pure_dict(nnx.state(model))
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), before, after)
    assert all(jax.tree.leaves(moved)), moved


@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(lambda f: f, id="plain", marks=pytest.mark.slow),
        pytest.param(jax.checkpoint, id="checkpoint"),
    ],
)
def test_trains_the_same_under_jax_jit_over_pure_dicts(wrap):
    """No NNX object crosses the boundary: dictionaries of arrays in, and out. And the same again
    under jax.checkpoint.
    """
    model = Classifier(level=2, rngs=nnx.Rngs(0))
    model.train()
    graph, state = nnx.split(model)
    params = nnx.to_pure_dict(state)
    loss_of_params = wrap(lambda params, key: loss_of(nnx.merge(graph, params), key))
    loss_and_gradients = jax.value_and_grad(loss_of_params)

    @jax.jit
    def step(params, key):
        loss, gradients = loss_and_gradients(params, key)
        return loss, jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients)

    recomputes = "remat" in str(jax.make_jaxpr(loss_and_gradients)(params, KEY))
    assert recomputes == (wrap is jax.checkpoint)
    optimizer = nnx.Optimizer(model, SGD, wrt=nnx.Param)
    losses, losses_in_nnx = [], []
    for _ in range(STEPS):
        loss, params = step(params, KEY)
        losses.append(float(loss))
        losses_in_nnx.append(float(sgd_step(model, optimizer, KEY)))
    np.testing.assert_allclose(losses, losses_in_nnx, rtol=1e-3)
    assert losses[-1] < 0.8 * losses[0]


def test_train_and_eval_reach_the_backbone(model):
    """Stochastic depth draws by the key in training only, and asks for one."""
    other = jax.random.key(8)
    model.train()
    trained = forward(model, IMAGES, KEY)
    np.testing.assert_array_equal(trained, forward(model, IMAGES, KEY))
    assert not np.allclose(trained, forward(model, IMAGES, other))
    with pytest.raises(ValueError, match="stochastic depth"):
        model(IMAGES)
    model.eval()
    evaluated = forward(model, IMAGES, KEY)
    np.testing.assert_array_equal(evaluated, forward(model, IMAGES, other))
    np.testing.assert_array_equal(evaluated, forward(model, IMAGES))
    assert not np.allclose(evaluated, trained)


def test_can_be_made_inside_a_compiled_function(model):
    """As one makes a model that is born sharded."""
    made = nnx.jit(lambda: Classifier(rngs=nnx.Rngs(0)))()
    wanted, found = (nnx.to_pure_dict(nnx.state(m)) for m in (model, made))
    jax.tree.map(lambda w, f: np.testing.assert_allclose(f, w, rtol=1e-6), wanted, found)
    assert roles(made) == roles(model)


def test_abstract_construction(model):
    abstract = nnx.eval_shape(lambda: Classifier(rngs=nnx.Rngs(0)))
    found, wanted = (nnx.to_flat_state(nnx.state(each)) for each in (abstract, model))
    assert [(path, v.shape, v.dtype) for path, v in found] == [
        (path, v.shape, v.dtype) for path, v in wanted
    ]
    assert roles(abstract) == roles(model)


# State and roles


def test_every_parameter_of_the_backbone_has_a_role_and_foreign_ones_have_none(model):
    found = roles(model)
    assert {path for path, role in found.items() if role is None} == {
        ("head", "bias"),
        ("head", "kernel"),
    }
    assert roles(model.backbone) == {
        path[1:]: role for path, role in found.items() if path[0] == "backbone"
    }
    assert len(found) == len(jax.tree.leaves(nnx.state(model)))


def _gradient(module):
    def energy(module):
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(nnx.state(module)))

    return nnx.merge(nnx.graphdef(module), nnx.jit(nnx.grad(energy))(module))


def _through_pure_dict(module):
    graph, state = nnx.split(module)
    return nnx.merge(graph, nnx.to_pure_dict(state))


def _through_jit(module):
    graph, state = nnx.split(module)
    return nnx.merge(graph, jax.jit(lambda state: jax.tree.map(jnp.negative, state))(state))


JOURNEYS: dict[str, Callable] = {
    "split and merge": lambda module: nnx.merge(*nnx.split(module)),
    "pure dict": _through_pure_dict,
    "nnx.clone": nnx.clone,
    "nnx.jit": nnx.jit(lambda module: module),
    "jax.jit of the state": _through_jit,
    "jax.jit of the module": jax.jit(lambda module: module),
    "jax.tree.map": lambda module: jax.tree.map(np.asarray, module),
    "nnx.grad": _gradient,
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
}


@pytest.mark.parametrize("part", [lambda m: m.backbone, lambda m: m], ids=["alone", "embedded"])
@pytest.mark.parametrize("journey", JOURNEYS.values(), ids=JOURNEYS)
def test_roles_survive(model, journey, part):
    module = part(model)
    assert roles(journey(module)) == roles(module)


def test_roles_are_there_while_tracing(model):
    seen = []

    @nnx.jit
    def trace(module):
        seen.append(roles(module))

    trace(model)
    jax.jit(lambda module: seen.append(roles(module)))(model)
    assert seen == [roles(model)] * 2


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_nothing_but_parameters(model, mode):
    """No random state, no counters: what a norm-free network keeps is what it learns."""
    getattr(model, mode)()
    _, params, rest = nnx.split(model, nnx.Param, ...)
    assert not nnx.to_flat_state(rest)
    assert len(nnx.to_flat_state(params)) == len(roles(model))


@pytest.mark.parametrize("journey", ["deepcopy", "pickle"])
def test_copies_compute_the_same_and_live_alone(model, journey):
    model.train()
    copied = JOURNEYS[journey](model)
    wanted = forward(model, IMAGES, KEY)
    np.testing.assert_array_equal(forward(copied, IMAGES, KEY), wanted)
    assert copied.backbone.plan == model.backbone.plan
    copied.head.bias[...] = copied.head.bias[...] + 1
    copied.backbone.stem.convs[0].gain[...] = jnp.zeros(4)
    np.testing.assert_array_equal(forward(model, IMAGES, KEY), wanted)


# Transformations


def test_vmap_over_an_ensemble(model):
    members = [model, Classifier(rngs=nnx.Rngs(1))]
    graph, _ = nnx.split(model)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(nnx.state, members))
    run = jax.jit(jax.vmap(lambda state: nnx.merge(graph, state)(IMAGES)))
    wanted = [forward(member, IMAGES) for member in members]
    np.testing.assert_allclose(run(stacked), wanted, rtol=1e-4, atol=1e-5)
    assert not np.allclose(*wanted)
    assert roles(nnx.merge(graph, stacked)) == roles(model)


def test_an_ensemble_made_by_nnx_vmap(model):
    """Each member draws its own weights, and roles, which count axes from the end, still hold."""
    ensemble = nnx.vmap(lambda rngs: Classifier(rngs=rngs))(nnx.Rngs(0).split(2))
    for path, variable in nnx.to_flat_state(nnx.state(ensemble, nnx.Param)):
        role = role_of(variable)
        assert variable.shape[0] == 2
        if role is not None and path[-1] == "kernel":
            assert role.unit_axes == tuple(range(-len(role.axes), -1)), path
            assert not np.array_equal(variable[0], variable[1]), path
    assert roles(ensemble) == roles(model)


# Inside Linen


class LinenClassifier(linen.Module):
    """A Linen module around the backbone. The bridge carries metadata over in boxes."""

    @linen.compact
    def __call__(self, x_NHWC, train: bool = False):
        key = self.make_rng("dropout") if train else None
        backbone = bridge.to_linen(nfflax.build, BACKBONE, name="backbone")
        return linen.Dense(3)(backbone(x_NHWC, train=train, rngs=key))


@pytest.fixture(scope="module")
def variables():
    return jax.jit(LinenClassifier().init)(jax.random.key(0), IMAGES)


def test_linen_computes_what_nnx_does(model, variables):
    plain = linen.unbox(variables)["params"]
    found = jax.jit(LinenClassifier().apply)(variables, IMAGES)
    nnx.update(model.backbone, plain["backbone"])
    nnx.update(model.head, plain["Dense_0"])
    np.testing.assert_allclose(found, forward(model, IMAGES), rtol=1e-5, atol=1e-6)


def test_linen_draws_stochastic_depth_from_its_own_stream(variables):
    apply = jax.jit(LinenClassifier().apply, static_argnames="train")
    first, again, other = (
        apply(variables, IMAGES, train=True, rngs={"dropout": jax.random.key(seed)})
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)


def test_linen_keeps_roles_on_parameters_and_gradients_until_they_are_unboxed(model, variables):
    def loss(params):
        return jnp.sum(jnp.asarray(LinenClassifier().apply({"params": params}, IMAGES)) ** 2)

    def boxes(tree):
        is_box = lambda leaf: isinstance(leaf, bridge.NNXMeta)  # noqa: E731
        flat = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_box)
        return {tuple(key.key for key in path): box for path, box in flat}

    params = variables["params"]
    gradients = jax.jit(jax.grad(loss))(params)
    for tree in (params, gradients):
        found = boxes(tree["backbone"])
        assert {path: role_of(box.to_nnx_variable()) for path, box in found.items()} == roles(
            model.backbone
        )
        assert all(np.any(box.value) for path, box in found.items() if path[-1] == "kernel")
    unboxed = boxes(linen.unbox(params)["backbone"])
    assert all(isinstance(leaf, jax.Array) for leaf in unboxed.values())


# Batch normalisation, which the baselines have


def test_batch_normalisation_updates_its_statistics_in_training_only():
    model = Classifier(spec=BATCH_NORMALISED, rngs=nnx.Rngs(0))
    _, params, _, rest = nnx.split(model, nnx.Param, nnx.BatchStat, ...)
    assert not nnx.to_flat_state(rest)
    params = nnx.to_pure_dict(params)

    def statistics():
        return nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

    first = statistics()
    evaluated = forward(model, IMAGES)
    jax.tree.map(np.testing.assert_array_equal, statistics(), first)

    model.train()
    trained = forward(model, IMAGES)
    assert not np.allclose(trained, evaluated)
    second = statistics()
    moved = jax.tree.map(lambda a, b: bool(np.all(a != b)), first, second)
    assert all(jax.tree.leaves(moved)), moved
    stem_NHWC = np.asarray(model.backbone.stem.convs[0](jnp.asarray(IMAGES)), np.float64)
    norm = model.backbone.stages[0].first.act0.norm
    assert norm is not None
    mean, var = stem_NHWC.mean((0, 1, 2)), stem_NHWC.var((0, 1, 2))
    np.testing.assert_allclose(norm.mean[...], 0.1 * mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(norm.var[...], 0.9 + 0.1 * var, rtol=1e-4)

    model.eval()
    assert not np.allclose(forward(model, IMAGES), evaluated)
    jax.tree.map(np.testing.assert_array_equal, statistics(), second)
    jax.tree.map(
        np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(model, nnx.Param)), params
    )
