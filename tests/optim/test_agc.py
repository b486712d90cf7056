"""Adaptive gradient clipping: what a unit is, how far it is clipped, where it has to work."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from golden_data import golden, params, random_model, small_spec
from hypothesis import given, settings
from hypothesis import strategies as st

import nfflax
from nfflax.nn.roles import kernel_role, vector_role
from nfflax.optim import metrics
from nfflax.optim.roles import by_rank, read_roles

Array = np.ndarray
CLIPPING, EPS = 0.02, 1e-3
SHALLOW = {"stages.depth": [1, 3], "stages.width": [8, 12], "stages.stride": [1, 2]}


def clip(grads: Any, weights: Any, clipping: float = CLIPPING, **options: Any) -> Any:
    tx = nfflax.agc(clipping, EPS, **options)
    return tx.update(grads, tx.init(weights), weights)[0]


def reference(gradient: Array, weight: Array, axes: tuple[int, ...]) -> Array:
    """The paper's equation 3, unit by unit, in float64."""
    gradient, weight = gradient.astype(np.float64), weight.astype(np.float64)
    norm = lambda x: np.sqrt(np.sum(x**2, axis=axes, keepdims=True))  # noqa: E731
    most = CLIPPING * np.maximum(norm(weight), EPS)
    size = np.maximum(norm(gradient), 1e-300)
    return np.where(size > most, gradient * most / size, gradient)


def draw(seed: int, shape: tuple[int, ...], scale: float = 1.0) -> Array:
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)


shapes = st.lists(st.integers(1, 4), max_size=5).map(tuple)
seeds = st.integers(0, 2**31)


@st.composite
def cases(draw_from: st.DrawFn) -> tuple[Array, Array, tuple[int, ...]]:
    """A gradient, a weight, and any axes to reduce; the gradient from far below to far above."""
    shape = draw_from(shapes)
    axes = tuple(sorted(draw_from(st.sets(st.integers(-len(shape), -1))))) if shape else ()
    seed, scale = draw_from(seeds), 10.0 ** draw_from(st.integers(-6, 3))
    weight = draw(seed + 1, shape) * (np.random.default_rng(seed).random(shape) > 0.3)
    return draw(seed, shape, scale), weight.astype(np.float32), axes


@settings(max_examples=25, deadline=None)
@given(cases())
def test_a_unit_is_clipped_to_its_bound_or_left_alone(case: Any) -> None:
    gradient, weight, axes = case
    clipped = np.asarray(clip(gradient, weight, unit_axes=axes))
    np.testing.assert_allclose(clipped, reference(gradient, weight, axes), rtol=2e-6, atol=1e-30)
    norm = lambda x: np.sqrt(np.sum(np.square(x, dtype=np.float64), axis=axes))  # noqa: E731
    most = CLIPPING * np.maximum(norm(weight), EPS)
    assert np.all(norm(clipped) <= most * (1 + 1e-6))
    untouched = np.broadcast_to(
        (norm(gradient) < most * (1 - 1e-6)).reshape(
            [1 if i - len(gradient.shape) in axes else n for i, n in enumerate(gradient.shape)]
        ),
        gradient.shape,
    )
    np.testing.assert_array_equal(clipped[untouched], gradient[untouched])


@settings(max_examples=12, deadline=None)
@given(cases(), st.integers(-4, 4))
def test_scaling_weights_and_gradients_scales_the_result(case: Any, power: int) -> None:
    gradient, weight, axes = case
    weight = np.abs(weight) + 1  # norms far above eps, which does not scale
    scale = np.float32(2.0**power)  # exact
    scaled = clip(gradient * scale, weight * scale, unit_axes=axes)
    np.testing.assert_array_equal(scaled, clip(gradient, weight, unit_axes=axes) * scale)


@settings(max_examples=12, deadline=None)
@given(seeds, st.integers(0, 5))
def test_units_are_independent(seed: int, unit: int) -> None:
    gradient, weight = draw(seed, (3, 3, 2, 6)), draw(seed + 1, (3, 3, 2, 6))
    other = np.array(gradient)
    other[..., unit] *= 1e4
    clipped, others = clip(gradient, weight), clip(other, weight)
    keep = np.arange(6) != unit
    np.testing.assert_array_equal(clipped[..., keep], others[..., keep])


@settings(max_examples=12, deadline=None)
@given(seeds, st.sampled_from([(), (5,), (4, 3), (3, 2, 4), (3, 3, 2, 4), (2, 3, 3, 2, 4)]))
def test_a_stack_of_layers_is_clipped_layer_by_layer(seed: int, shape: tuple[int, ...]) -> None:
    role = kernel_role(shape) if len(shape) > 1 else vector_role()
    axes = role.unit_axes if shape else ()
    gradients = np.stack([draw(seed + i, shape, 10.0**i) for i in range(3)])
    weights = np.stack([draw(seed + 9 - i, shape) for i in range(3)])
    stacked = clip(gradients, weights, unit_axes=axes)
    layers = [clip(g, w, unit_axes=axes) for g, w in zip(gradients, weights, strict=True)]
    np.testing.assert_allclose(stacked, np.stack(layers), rtol=1e-6)


def test_the_rule_by_rank_gives_the_official_norms() -> None:
    reference, start = golden("optim_agc_optax.npz"), golden("optim_sgd_agc_official.npz")
    for key, norm in reference.items():
        if key.startswith("unitwise_norm:"):
            weight = start[key.replace("unitwise_norm", "init")]
            axes = by_rank(weight.shape).unit_axes
            found = np.sqrt(np.sum(weight**2, axis=axes, keepdims=True))
            np.testing.assert_allclose(found.ravel(), np.ravel(norm), rtol=1e-6, err_msg=key)


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((), ()),
        ((7,), (-1,)),
        ((1, 1, 7), (-3, -2, -1)),  # one weight per unit: one vector
        ((4, 7), (-2,)),
        ((2, 4, 7), (-3,)),
        ((3, 3, 4, 7), (-4, -3, -2)),
        ((3, 3, 3, 4, 7), (-5, -4, -3, -2)),
    ],
)
def test_the_rule_by_rank(shape: tuple[int, ...], axes: tuple[int, ...]) -> None:
    assert by_rank(shape).unit_axes == axes


def test_bfloat16_gradients_are_measured_in_float32() -> None:
    weight = draw(0, (256, 4))
    gradient = jnp.asarray(draw(1, (256, 4)), jnp.bfloat16)
    clipped = clip(gradient, weight)
    assert clipped.dtype == jnp.bfloat16
    wanted = reference(np.asarray(gradient, np.float32), weight, (0,))
    np.testing.assert_allclose(np.asarray(clipped, np.float32), wanted, rtol=2**-8)


def test_zero_units_and_zero_gradients() -> None:
    weight, gradient = draw(0, (8, 3)), draw(1, (8, 3))
    weight[:, 0], gradient[:, 1] = 0, 0
    clipped = np.asarray(clip(gradient, weight))
    assert np.linalg.norm(clipped[:, 0]) == pytest.approx(CLIPPING * EPS, rel=1e-5)
    assert not clipped[:, 1].any()


def test_a_broken_gradient_is_not_hidden() -> None:
    gradient = draw(1, (8, 3))
    gradient[0, 0], gradient[0, 1] = np.nan, np.inf
    clipped = np.asarray(clip(gradient, draw(0, (8, 3))))
    assert np.isnan(clipped[0, 0])
    assert not np.isfinite(clipped[0, 1])
    assert np.isfinite(clipped[:, 2]).all()


def test_trees_with_gaps_keep_their_structure() -> None:
    weights = {"a": draw(0, (4, 3)), "b": draw(1, (4, 3)), "c": [draw(2, (3,)), None]}
    grads = {"a": None, "b": weights["b"], "c": [weights["c"][0], None]}
    clipped = clip(grads, weights)
    assert jax.tree.structure(clipped) == jax.tree.structure(grads)
    np.testing.assert_allclose(clipped["b"], reference(grads["b"], weights["b"], (0,)), rtol=1e-6)


def test_explicit_axes_and_masks_hold_for_all_below() -> None:
    weights = {
        "body": {"conv1d": draw(0, (3, 4, 5)), "bias": draw(1, (5,))},
        "head": draw(2, (5, 2)),
    }
    grads = jax.tree.map(lambda w: 10 * w, weights)
    axes = {"body": {"conv1d": (0, 1)}}
    clipped = clip(grads, weights, unit_axes=axes, mask={"body": True, "head": False})
    conv = reference(grads["body"]["conv1d"], weights["body"]["conv1d"], (0, 1))
    np.testing.assert_allclose(clipped["body"]["conv1d"], conv, rtol=1e-6)
    np.testing.assert_array_equal(clipped["head"], grads["head"])
    np.testing.assert_allclose(
        np.linalg.norm(clipped["body"]["bias"]),
        0.02 * np.linalg.norm(weights["body"]["bias"]),
        rtol=1e-6,
    )
    by_function = clip(grads, weights, unit_axes=lambda _: axes, mask=lambda tree: {"head": False})
    jax.tree.map(np.testing.assert_array_equal, by_function, clipped)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unit_axes": {"w": (0, 7)}}, r"w has shape \(4, 3\): it has no unit_axes \(0, 7\)"),
        ({"unit_axes": {"v": (0,)}}, "unit_axes has an entry for 'v'"),
        ({"mask": {"w": True, "x": False}}, "mask has an entry for 'x'"),
        ({"clipping": 0.0}, "clipping must be greater than 0, not 0.0"),
        ({"eps": -1.0}, "eps must be greater than 0, not -1.0"),
    ],
)
def test_mistakes_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nfflax.agc(**options).init({"w": jnp.zeros((4, 3))})


def test_weights_must_be_given() -> None:
    tx, weights = nfflax.agc(), {"w": jnp.ones((4, 3))}
    with pytest.raises(ValueError, match="call update"):
        tx.update(weights, tx.init(weights))


# --- inside other transforms -----------------------------------------------------------------


def two_layers() -> tuple[Any, Any, Any]:
    weights = {"a": {"w": draw(0, (4, 3)), "b": draw(1, (3,))}, "head": {"w": draw(2, (3, 2))}}
    grads = jax.tree.map(lambda w: jnp.flip(w) * 5, weights)
    return weights, grads, clip(grads, weights)


def test_masked_and_multi_transform_clip_what_they_are_given() -> None:
    weights, grads, clipped = two_layers()
    labels = {"a": "clip", "head": "keep"}
    masked = optax.masked(nfflax.agc(CLIPPING, EPS), {"a": True, "head": False})
    axes = {"a": {"w": (0,)}, "head": (0,)}  # of the whole tree, as both hide a part of it
    multi = optax.multi_transform(
        {"clip": nfflax.agc(CLIPPING, EPS, unit_axes=axes), "keep": optax.identity()}, labels
    )
    for tx in (masked, multi):
        found: Any = tx.update(grads, tx.init(weights), weights)[0]
        jax.tree.map(np.testing.assert_array_equal, found["a"], clipped["a"])
        jax.tree.map(np.testing.assert_array_equal, found["head"], grads["head"])


def test_multi_steps_clips_the_accumulated_gradient() -> None:
    weights, grads, clipped = two_layers()
    tx = optax.MultiSteps(nfflax.agc(CLIPPING, EPS), 2).gradient_transformation()
    state = tx.init(weights)
    halves = [jax.tree.map(lambda g, f=f: g * f, grads) for f in (1.5, 0.5)]
    first, state = tx.update(halves[0], state, weights)
    second, state = tx.update(halves[1], state, weights)
    assert not any(map(np.any, jax.tree.leaves(first)))
    jax.tree.map(lambda f, w: np.testing.assert_allclose(f, w, rtol=1e-5), second, clipped)


def test_clipping_by_schedule_and_by_injected_hyperparameter() -> None:
    weights, grads, _ = two_layers()
    levels = [0.5, 0.02]
    scheduled = nfflax.agc(lambda count: jnp.asarray(levels)[count], EPS)
    injected = optax.inject_hyperparams(nfflax.agc)(clipping=levels[0], eps=EPS)
    by_schedule: Any = scheduled.init(weights)
    by_hand: Any = injected.init(weights)
    for level in levels:
        by_hand.hyperparams["clipping"] = jnp.asarray(level)
        found, by_schedule = scheduled.update(grads, by_schedule, weights)
        other, by_hand = injected.update(grads, by_hand, weights)
        wanted = clip(grads, weights, level)
        for tree in (found, other):
            jax.tree.map(lambda f, w: np.testing.assert_allclose(f, w, rtol=1e-6), tree, wanted)


# --- with networks ---------------------------------------------------------------------------


class Grown(nnx.Module):
    """An nfflax network inside another module, beside a stack of foreign layers."""

    def __init__(self) -> None:
        self.backbone = random_model(small_spec("nfnet_f0", SHALLOW))
        self.foreign = nnx.Param(jnp.ones((6, 4)))


def test_a_network_brings_its_units_into_any_module() -> None:
    model = Grown()
    tx = nfflax.agc(CLIPPING, EPS, statistics=True)
    optimizer = nnx.Optimizer(model, optax.chain(tx, optax.sgd(1.0)), wrt=nnx.Param)
    before = nnx.to_flat_state(nnx.state(model, nnx.Param))
    before = {path: (np.asarray(v[...]), v.get_metadata().get("role")) for path, v in before}
    grads = jax.tree.map(lambda w: 3 * jnp.flip(w), nnx.state(model, nnx.Param))
    nnx.jit(lambda model, optimizer, grads: optimizer.update(model, grads))(model, optimizer, grads)
    after = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    assert "stages" in {key for path in before for key in path}
    for path, (weight, role) in before.items():
        gradient = np.flip(weight) * 3
        axes = role.unit_axes if role else (0,)
        clips = path[-2:] != ("classifier", "kernel")
        wanted = reference(gradient, weight, axes) if clips else gradient
        moved = weight - np.asarray(after[path][...])
        scale = np.abs(weight).max()
        np.testing.assert_allclose(moved, wanted, rtol=1e-4, atol=3e-7 * scale, err_msg=str(path))
    found = metrics(optimizer.opt_state)
    assert {"clipped", "clipped/backbone.stages.1", "clipped/foreign"} <= found.keys()
    assert float(found["clipped/backbone.stages.1"][...]) == 1.0


def test_plain_trees_of_a_network_take_its_roles_by_name() -> None:
    model = random_model(small_spec("nf_resnet50", SHALLOW))
    tree = params(model)
    grads = jax.tree.map(lambda w: 3 * jnp.flip(w), tree)
    assert read_roles(model) == read_roles(nnx.state(model, nnx.Param))
    found = jax.jit(lambda grads, tree: clip(grads, tree, roles=model))(grads, tree)
    kernel, classifier = ("stages", 1, "rest", "conv1", "kernel"), ("classifier", "kernel")
    for path, axes in ((kernel, (-4, -3, -2)), (classifier, None)):
        gradient, weight, clipped = (_at(x, path) for x in (grads, tree, found))
        wanted = gradient if axes is None else reference(gradient, weight, axes)
        np.testing.assert_allclose(clipped, wanted, rtol=1e-5)


def _at(tree: Any, path: tuple[Any, ...]) -> Array:
    for key in path:
        tree = tree[key]
    return np.asarray(tree)


def test_optax_can_map_over_the_state() -> None:
    """What shards an optimiser's state like its parameters."""
    for weights in (two_layers()[0], nnx.state(random_model("nfnet_micro"), nnx.Param)):
        tx = optax.chain(nfflax.agc(statistics=True), optax.sgd(0.1, momentum=0.9))
        state = tx.init(weights)
        mapped: Any = optax.tree.map_params(
            tx, lambda x: "param", state, transform_non_params=lambda _: "other"
        )
        assert set(jax.tree.leaves(optax.tree.get(mapped, "trace"))) == {"param"}
        assert set(jax.tree.leaves(mapped[0])) == {"other"}


# --- statistics ------------------------------------------------------------------------------


def test_statistics_count_units_and_find_the_largest_ratio() -> None:
    weights = {
        "stages": {0: {"w": np.ones((4, 5), np.float32)}},
        "head": np.ones((4, 2), np.float32),
    }
    ratios = np.array([0.001, 0.01, 0.03, 0.5, 4.0], np.float32)
    grads = {"stages": {0: {"w": weights["stages"][0]["w"] * ratios}}, "head": 0 * weights["head"]}
    tx = nfflax.agc(CLIPPING, EPS, statistics=True)
    state = tx.init(weights)
    assert not any(map(np.any, metrics(state).values()))
    clipped, state = tx.update(grads, state, weights)
    found = {name: float(value) for name, value in metrics(state).items()}
    assert found == pytest.approx(
        {
            "clipped": 3 / 7,
            "clipped/stages.0": 3 / 5,
            "clipped/head": 0,
            "clip_ratio": 4.0,
            "clip_ratio/stages.0": 4.0,
            "clip_ratio/head": 0,
        }
    )
    plain = clip(grads, weights)
    jax.tree.map(np.testing.assert_array_equal, clipped, plain)


# --- sharded ---------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [0, 1], ids=["outputs sharded", "inputs sharded"])
def test_sharded_equals_unsharded_and_gathers_no_gradient(axis: int) -> None:
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "fsdp"))
    weights = {
        "w": draw(0, (3, 3, 16, 32)),
        "stack": draw(1, (3, 1, 1, 16, 32)),
        "b": draw(2, (32,)),
    }
    grads = jax.tree.map(lambda w: jnp.flip(w) * 5, weights)
    spec = jax.sharding.PartitionSpec
    split = {
        name: jax.sharding.NamedSharding(
            mesh, spec(*(None,) * (w.ndim - 1 - axis), *("fsdp", None)[: axis + 1])
        )
        for name, w in weights.items()
        if w.ndim > axis
    } | ({"b": jax.sharding.NamedSharding(mesh, spec())} if axis else {})
    axes = {"w": (-4, -3, -2), "stack": (-4, -3, -2), "b": (-1,)}
    tx = nfflax.agc(CLIPPING, EPS, unit_axes=axes, statistics=True)
    state = tx.init(weights)
    step = jax.jit(tx.update, in_shardings=(split, None, split), out_shardings=(split, None))
    compiled = step.lower(grads, state, weights).compile()
    found, after = compiled(jax.device_put(grads, split), state, jax.device_put(weights, split))
    wanted, wanted_after = tx.update(grads, state, weights)
    jax.tree.map(lambda f, w: np.testing.assert_allclose(f, w, rtol=2e-6), found, wanted)
    jax.tree.map(
        lambda f, w: np.testing.assert_allclose(f, w, rtol=2e-6),
        metrics(after),
        metrics(wanted_after),
    )
    text = str(compiled.as_text())
    assert "all-gather" not in text
    assert "all-to-all" not in text
