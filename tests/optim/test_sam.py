"""Sharpness-aware steps: by hand, by optax's own SAM, and shard by shard on eight devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import nfflax
from nfflax.optim.accumulate import with_accumulation
from nfflax.optim.sam import with_sam

ROWS, RHO = 32, 0.05
MESHES = {"data x fsdp": ((4, 2, 1), 8), "data x tensor": ((2, 1, 4), 2), "fsdp": ((1, 4, 2), 4)}


def loss(params, batch, key):
    """Key, rows and parameters all show: each row drops inputs of its own."""
    kept = jax.random.bernoulli(key, 0.7, batch["x"].shape)
    y = jnp.tanh((batch["x"] * kept) @ params["w"]) @ params["v"]
    errors = jnp.square(y - batch["y"])
    return jnp.mean(errors), {"large": jnp.mean(errors > 1), "rows": jnp.int32(len(y))}


plain = jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(5, 8)), "v": rng.normal(size=(8, 4))}
    batch = {"x": rng.normal(size=(ROWS, 5)), "y": rng.normal(size=(ROWS, 4))}
    return (
        *jax.tree.map(np.float32, (params, batch)),  # NumPy's: cutting out rows compiles nothing
        jax.random.key(1),
    )


def by_hand(case, rows, gradient=plain):
    """A sharpness-aware step that climbs by the gradient of these rows."""
    params, batch, key = case
    _, ascent = gradient(params, jax.tree.map(lambda x: x[rows], batch), key)
    length = np.sqrt(sum(np.sum(np.square(np.asarray(g))) for g in jax.tree.leaves(ascent)))
    above = jax.tree.map(lambda p, g: p + RHO * np.asarray(g) / length, params, ascent)
    return gradient(above, batch, key)


def mean(results):
    return jax.tree.map(lambda *leaves: sum(map(np.float32, leaves)) / len(leaves), *results)


def assert_close(found, wanted, rtol=2e-5):
    def close(a, b):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=rtol, atol=1e-6)

    jax.tree.map(close, found, wanted)


def on_mesh(shape, function, params, batch, key):
    """The function compiled and run with the batch sharded, and with `w` split over fsdp."""
    mesh = Mesh(
        np.array(jax.devices()).reshape(shape),
        ("data", "fsdp", "tensor"),
        axis_types=(AxisType.Auto,) * 3,
    )
    with jax.set_mesh(mesh):
        specs = {"w": P(None, "fsdp"), "v": P(None, "tensor")}
        shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
        params = jax.device_put(params, shardings)
        batch = jax.device_put(batch, NamedSharding(mesh, P(("data", "fsdp"))))
        return jax.jit(function)(params, batch, key)


# --- one shard -------------------------------------------------------------------------------


@pytest.mark.parametrize(("fraction", "rows"), [(0.2, 6), (0.01, 1), (1.0, ROWS)])
def test_equals_two_passes_by_hand(case, fraction, rows):
    """32 rows: a fifth is 6.4. Both passes see the same key."""
    found = jax.jit(with_sam(plain, RHO, fraction=fraction))(*case)
    assert_close(found, by_hand(case, np.arange(rows)))


def test_both_passes_drop_the_same_things(case):
    """The first rows meet the same masks whether they come alone or with the whole batch."""
    _, batch, key = case
    mask = jax.random.bernoulli(key, 0.7, batch["x"].shape)
    np.testing.assert_array_equal(jax.random.bernoulli(key, 0.7, batch["x"][:6].shape), mask[:6])


def test_equals_optax(case):
    params, batch, key = case
    climb = optax.chain(optax.contrib.normalize(), optax.sgd(RHO))
    tx = optax.contrib.sam(optax.sgd(0.1), climb, sync_period=2, opaque_mode=True)

    @jax.jit
    def step(params):
        def gradient(params, _):
            return plain(params, batch, key)[1]

        updates, _ = tx.update(gradient(params, 0), tx.init(params), params, grad_fn=gradient)
        return updates

    _, ours = jax.jit(with_sam(plain, RHO, fraction=1.0))(*case)
    assert_close(jax.tree.map(lambda g: -0.1 * g, ours), step(params))


def test_without_a_gradient_there_is_no_climb(case):
    """On a flat spot the step is the plain one, and finite."""
    params, batch, key = case
    dead = params | {"v": jnp.zeros_like(params["v"])}
    batch = batch | {"x": jnp.zeros_like(batch["x"]), "y": jnp.zeros_like(batch["y"])}
    found = jax.jit(with_sam(plain, RHO))(dead, batch, key)
    jax.tree.map(np.testing.assert_array_equal, found, plain(dead, batch, key))


def test_bfloat16_parameters_keep_their_dtype(case):
    params, batch, key = case
    seen = []

    def spied(params, batch, key):
        seen.append(jax.tree.map(lambda x: x.dtype, params))
        return plain(params, batch, key)

    halves = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    _, gradients = jax.eval_shape(with_sam(spied, RHO), halves, batch, key)
    assert {g.dtype for g in jax.tree.leaves(gradients)} == {jnp.dtype(jnp.bfloat16)}
    assert seen[0] == seen[1] == jax.tree.map(lambda x: x.dtype, halves)


def test_every_microbatch_climbs_on_its_own(case):
    params, batch, key = case
    found = jax.jit(with_accumulation(with_sam(plain, RHO), 4))(*case)
    parts = []
    for j in range(4):
        own = {name: x[j::4] for name, x in batch.items()}
        parts.append(by_hand((params, own, jax.random.fold_in(key, j)), np.arange(2)))
    assert_close(found, mean(parts))


# --- shards ----------------------------------------------------------------------------------


def shard_by_shard(case, shards):
    """Each shard climbs by its own first rows, with a key of its own."""
    params, batch, key = case
    rows = ROWS // shards
    taken = np.arange(max(1, round(0.2 * rows)))
    parts = []
    for i in range(shards):
        own = {name: x[i * rows : (i + 1) * rows] for name, x in batch.items()}
        parts.append(by_hand((params, own, jax.random.fold_in(key, i)), taken))
    return mean(parts)


@pytest.mark.parametrize("which", MESHES)
def test_shards_climb_alone(case, which):
    shape, shards = MESHES[which]
    found = on_mesh(shape, with_sam(plain, RHO), *case)
    assert_close(found, shard_by_shard(case, shards))


@pytest.mark.parametrize("which", MESHES)
def test_synchronised_shards_climb_together(case, which):
    """One device's step, which climbs by the first rows of all shards, undropped here."""
    shape, shards = MESHES[which]
    rows = ROWS // shards
    taken = np.arange(ROWS).reshape(shards, rows)[:, : max(1, round(0.2 * rows))].ravel()

    def undropped(params, batch, key):
        del key
        return jax.value_and_grad(_undropped_loss, has_aux=True)(params, batch)

    found = on_mesh(shape, with_sam(undropped, RHO, synchronize=True), *case)
    assert_close(found, by_hand(case, taken, jax.jit(undropped)))


def _undropped_loss(params, batch):
    y = jnp.tanh(batch["x"] @ params["w"]) @ params["v"]
    return jnp.mean(jnp.square(y - batch["y"])), ()


def test_microbatches_of_shards(case):
    params, batch, key = case
    found = on_mesh((2, 2, 2), with_accumulation(with_sam(plain, RHO), 2), *case)
    rows, shards = ROWS // 2, 4
    parts = []
    for j in range(2):
        part = {name: x[j::2].reshape(shards, rows // shards, -1) for name, x in batch.items()}
        for i in range(shards):
            own = {name: x[i] for name, x in part.items()}
            own_key = jax.random.fold_in(jax.random.fold_in(key, j), i)
            parts.append(by_hand((params, own, own_key), np.arange(1)))
    assert_close(found, mean(parts))


# --- a network -------------------------------------------------------------------------------

SPEC = {
    "extends": "nfnet",
    "name": "climber",
    "stem": {"width": [8], "stride": [2]},
    "stages": {"depth": [2], "width": [32], "stride": [1], "group_width": 8},
    "block": {"skip_gain": "ones"},
    "regularization": {"stochastic_depth": 0.0},
    "head": {"num_classes": 8, "dropout": 0.0},
    "resolution": {"train": 8, "test": 8},
}


@pytest.fixture(scope="module")
def network():
    """Gradient function, parameters and batch of a small NFNet, and each half's step."""
    model = nfflax.build(nfflax.load_spec(SPEC), rngs=nnx.Rngs(0))
    graph, params = nnx.split(model, nnx.Param)

    def network_loss(params, x_NHWC, key):
        logits = nnx.merge(graph, params)(x_NHWC, train=True, rngs=key)
        return jnp.mean(jnp.square(logits - 1)), ()

    gradient = jax.value_and_grad(network_loss, has_aux=True)
    x_NHWC = jax.random.normal(jax.random.key(1), (8, 8, 8, 3))
    params, key = nnx.to_pure_dict(params), jax.random.key(0)
    step = jax.jit(with_sam(gradient, RHO, fraction=0.5))
    halves = [step(params, half, key) for half in (x_NHWC[:4], x_NHWC[4:])]
    return gradient, params, x_NHWC, key, mean(halves)


LAYOUTS = {"groups": (2, 2, 1), "height": (2, 1, 2)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "platform"),
    [
        ("groups", "cpu"),
        ("height", "cpu"),
        ("groups", "default"),
    ],
)
def test_a_networks_shards_climb_alone(network, layout, platform, monkeypatch):
    """On CPU as it runs there, and with the operations that GPUs and TPUs get."""
    if platform == "default":
        monkeypatch.setattr(jax.lax, "platform_dependent", lambda *a, cpu, default: default(*a))
    gradient, params, x_NHWC, key, wanted = network
    shape = LAYOUTS[layout]
    devices = np.array(jax.devices()[: np.prod(shape)]).reshape(shape)
    mesh = Mesh(devices, ("fsdp", "tensor", "spatial"), axis_types=(AxisType.Auto,) * 3)
    with jax.set_mesh(mesh):
        x_NHWC = jax.device_put(x_NHWC, NamedSharding(mesh, P("fsdp", "spatial")))
        found = jax.jit(with_sam(gradient, RHO, fraction=0.5))(params, x_NHWC, key)
    assert norm_of_difference(found, wanted) <= 1e-5


def test_a_networks_step_is_not_the_plain_one(network):
    gradient, params, x_NHWC, key, climbed = network
    assert 0.01 < norm_of_difference(climbed, jax.jit(gradient)(params, x_NHWC, key)) < 1


def norm_of_difference(found, wanted):
    difference = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), found, wanted)
    return float(optax.tree.norm(difference) / optax.tree.norm(wanted))


# --- errors ----------------------------------------------------------------------------------


def test_bad_numbers_are_named():
    with pytest.raises(ValueError, match="rho must be greater than 0, not 0"):
        with_sam(plain, 0)
    with pytest.raises(ValueError, match=r"fraction .* at most 1, not 1\.5"):
        with_sam(plain, fraction=1.5)


@pytest.mark.parametrize(
    ("kind", "rows", "message"),
    [
        (AxisType.Auto, 12, r"12 rows does not divide into 8 shards \(data 4 x fsdp 2\)"),
        (AxisType.Explicit, 16, r"AxisType\.Auto"),
    ],
)
def test_meshes_that_do_not_fit_are_named(case, kind, rows, message):
    params, batch, key = case
    batch = jax.tree.map(lambda x: x[:rows], batch)
    mesh = jax.sharding.AbstractMesh((4, 2), ("data", "fsdp"), axis_types=(kind,) * 2)
    with jax.sharding.use_abstract_mesh(mesh), pytest.raises(ValueError, match=message):
        with_sam(plain)(params, batch, key)
