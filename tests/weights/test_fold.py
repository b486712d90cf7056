"""Folding: the same numbers from plain convolutions, in every network a spec can describe."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_data import abstract_model, formula_input, haiku_formula_tree
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import nfflax
from nfflax.nn import Backbone, role_of
from nfflax.nn.wsconv import Conv
from nfflax.spec.errors import SpecError
from nfflax.train.mesh import make_mesh, param_shardings
from nfflax.weights import to_deepmind, to_timm

FAMILIES = ["nfnet_f0", "nf_regnet_b0", "nf_seresnet50", "timm_eca_nfnet_l0", "resnet50_bn"]
SMALL = {
    "stem.width": 4,
    "stages.depth": [3],
    "stages.width": 8,
    "stages.stride": 2,
    "stages.kernel": 3,
    "stages.spatial_convs": 1,
    "stages.group_width": 2,
    "stages.fit_groups": "down",
    "stages.expansion": 0.5,
    "head.num_classes": 5,
}
# A family each, and with it options that none of them has.
NETWORKS = {
    "nfnet_f0": {"stem.width": [4, 4], "stem.stride": [2, 1], "stages.spatial_convs": 2},
    "nf_regnet_b0": {"head.width": 10, "numerics.gamma": "none", "stem.in_channels": 1},
    "timm_eca_nfnet_l0": {"block.skip_gain": "none", "head.num_classes": 0},
    "resnet50_bn": {"stem.kernel": 3, "stem.pool": "max", "head.pool": "max"},
}


def small(preset):
    return nfflax.load_spec(preset, SMALL | NETWORKS[preset])


def outputs(model, x):
    """Every feature map, what `forward_features` makes of the last one, and the logits."""
    maps = model.features(x)
    final = model.final_act(maps[max(maps)], train=False)
    return maps, final, model.forward_head(final)


def compiled(function, *args):
    """Compiled in a hurry: these programs run once."""
    return jax.jit(function).lower(*args).compile({"xla_backend_optimization_level": "0"})(*args)


def model_of(spec, seed=0, **how):
    """A network whose numbers are all away from 0 and 1, but for one skip gain that is 0."""
    return filled(nnx.eval_shape(lambda: nfflax.build(spec, rngs=nnx.Rngs(0), **how)), seed)


def filled(abstract, seed=0):
    """The network with such numbers."""
    graph, state = nnx.split(abstract)
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-2].key if hasattr(path[-2], "key") else str(path[-1])
        value = rng.normal(size=leaf.shape)
        if name in ("gain", "skip_gain", "scale", "var"):
            value = 0.7 + 0.2 * np.abs(value)
        if name == "skip_gain" and leaf.shape:
            value[0] = 0.0
        return jnp.asarray(value, leaf.dtype)

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(draw, state))


def errors(model, x):
    """How far every output of the folded network is off, in parts of the largest value."""
    both = lambda model, x: (outputs(model, x), outputs(nfflax.fold(model), x))  # noqa: E731
    return far(*compiled(both, model, x))


def far(wanted, found):
    off = jax.tree.map(lambda w, f: np.abs(w - f).max() / np.abs(w).max(), wanted, found)
    return jax.tree.leaves(off)


@pytest.mark.parametrize("preset", NETWORKS)
def test_outputs_and_every_map_stay_what_they_are(preset):
    model = model_of(small(preset))
    x = formula_input((2, 16, 16, model.spec.stem.in_channels))
    assert max(errors(model, x)) < 1e-5


@pytest.mark.parametrize("preset", NETWORKS)
def test_all_that_is_left_are_plain_convolutions_in_the_compute_dtype(preset):
    abstract = nnx.eval_shape(
        lambda: nfflax.build(small(preset), rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    )
    folded = nnx.eval_shape(nfflax.fold, abstract)
    assert isinstance(folded, nfflax.NFNet)
    assert (folded.folded, folded.spec) == (True, abstract.spec)
    assert not abstract.folded
    parts = [part for _, part in nnx.iter_graph(folded)]
    convs = [part for part in parts if isinstance(part, Conv)]
    assert len(convs) == sum(isinstance(part, Conv) for _, part in nnx.iter_graph(abstract))
    assert {type(conv) for conv in convs} == {Conv}
    arrays = [leaf for conv in convs for leaf in jax.tree.leaves(conv)]
    assert len(arrays) == 2 * len(convs)  # a kernel and a bias each
    assert {leaf.dtype for leaf in arrays} == {jnp.dtype(jnp.bfloat16)}
    head = jax.tree.leaves(folded.classifier)
    assert all(leaf.dtype == jnp.float32 for leaf in head)  # the head is computed in float32
    assert not jax.tree.leaves(nnx.state(folded, nnx.BatchStat))
    for path, variable in nnx.to_flat_state(nnx.state(folded)):
        role = role_of(variable)
        assert role is not None, path
        assert len(role.axes) in (variable.ndim, variable.ndim - 1), path  # stacks have one more


@pytest.mark.slow
def test_kernels_are_those_of_float32_rounded():
    spec = small("nfnet_f0")
    fold_both = lambda *models: [nnx.state(nfflax.fold(m)) for m in models]  # noqa: E731
    states = compiled(fold_both, model_of(spec), model_of(spec, dtype=jnp.bfloat16))
    single, half = (nnx.to_pure_dict(state) for state in states)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.astype(b.dtype), b), single, half)


def test_a_folded_network_is_for_inference_only():
    folded = nnx.eval_shape(nfflax.fold, abstract_model(small("nfnet_f0")))
    assert nfflax.fold(folded) is folded
    x = jnp.zeros((1, 32, 32, 3))
    with pytest.raises(ValueError, match="is folded: only what it was made from trains"):
        folded(x, train=True)
    folded.train()
    with pytest.raises(ValueError, match="is folded"):
        folded(x)
    with pytest.raises(ValueError, match="tells the signals"):
        folded.trace(x)
    for export in (to_timm, to_deepmind):
        with pytest.raises(nfflax.WeightsError, match="it is folded for inference"):
            export(folded)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"fsdp": 4}, {"fsdp": 2, "tensor": 2}], ids=str)
def test_a_sharded_network_stays_sharded(sizes):
    changes = SMALL | {"stem.width": 16, "stages.width": 32, "stages.group_width": 8}
    model = model_of(nfflax.load_spec("nfnet_f0", changes))
    x = formula_input((8, 16, 16, 3))
    wanted = nnx.jit(lambda model, x: model(x))(nfflax.fold(model), x)
    mesh = make_mesh(nfflax.load_run("digits", {f"mesh.{k}": v for k, v in sizes.items()}).mesh)
    graph, params = nnx.split(model)
    placed = jax.device_put(nnx.to_pure_dict(params), param_shardings(model, mesh))
    with jax.set_mesh(mesh):
        folded = nfflax.fold(nnx.merge(graph, placed))
        found = nnx.jit(lambda model, x: model(x))(folded, x)
    places = dict(nnx.to_flat_state(nnx.State(param_shardings(folded, mesh))))
    split = 0
    for path, variable in nnx.to_flat_state(nnx.state(folded)):
        array, place = variable[...], places[path]
        if path[-1] == "kernel":
            assert array.sharding.is_equivalent_to(place, array.ndim), path
            split += not place.is_fully_replicated
    assert split > 10
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["nfnet_f0", "nf_regnet_b0", "nf_resnet50"])
def test_published_networks_stay_what_they_are(preset):
    model = nfflax.build(preset, rngs=nnx.Rngs(0))
    nfflax.weights.load_deepmind(model, haiku_formula_tree(model))
    assert max(errors(model, formula_input((1, 64, 96, 3)))) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["nfnet_f0", "resnet50_bn"])
def test_a_backbone_with_frozen_parts_folds_too(preset):
    spec, normed = small(preset), preset == "resnet50_bn"
    make = lambda: Backbone(  # noqa: E731
        nfflax.plan(spec), (1, 2), activated=not normed, frozen=1, rngs=nnx.Rngs(0)
    )
    backbone = filled(nnx.eval_shape(make))
    both = lambda model, x: (model(x), nfflax.fold(model)(x))  # noqa: E731
    wanted, found = compiled(both, backbone, formula_input((2, 16, 16, spec.stem.in_channels)))
    assert list(found) == [1, 2]
    assert max(far(wanted, found)) < 1e-5


SHAPES = [
    {"stages.depth": [1, 1], "stages.width": [8, 12], "stages.stride": [1, 2]},
    {"stages.depth": [2, 3], "stages.width": [8, 8], "stages.stride": [2, 2]},
    {"stages.depth": [1, 1, 2], "stages.width": [4, 8, 8], "stages.stride": [1, 1, 3]},
]


@functools.cache
def options():
    """Spec keys, each with values that any of the small networks may have."""
    return st.fixed_dictionaries(
        {},
        optional={
            "stages.shortcut": st.sampled_from(["avgpool+1x1", "strided 1x1"]),
            "stages.spatial_convs": st.sampled_from([1, 2]),
            "stages.kernel": st.sampled_from([1, 3, 5]),
            "stages.group_width": st.sampled_from([0, 1, 2]),
            "attention.kind": st.sampled_from(["none", "se", "eca"]),
            "attention.position": st.sampled_from(["inside", "after"]),
            "attention.gain": st.sampled_from([1.0, 2.0]),
            "block.skip_gain": st.sampled_from(["none", "ones", "zeros"]),
            "numerics.activation": st.sampled_from(["relu", "silu", "gelu", "tanh"]),
            "numerics.gamma": st.sampled_from(["activation", "conv", "none"]),
            "numerics.padding": st.sampled_from(["same", "symmetric"]),
            "numerics.ws_eps_mode": st.sampled_from(["floor", "add"]),
            "stem.pool": st.sampled_from(["none", "max"]),
            "stem.in_channels": st.sampled_from([1, 4]),
            "head.num_classes": st.sampled_from([0, 3]),
            "head.width": st.sampled_from([0, 7]),
            "norm.kind": st.sampled_from(["none", "batch"]),
        },
    )


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(FAMILIES),
    st.sampled_from(SHAPES),
    options(),
    st.sampled_from([None, 8, 4]),
    st.tuples(st.integers(9, 24), st.integers(9, 24)),
)
def test_any_small_network_stays_what_it_is(preset, shape, changes, output_stride, size):
    try:
        spec = nfflax.load_spec(preset, SMALL | shape | changes)
        plan = nfflax.plan(spec, output_stride=output_stride)
    except (SpecError, ValueError):  # options that exclude each other
        return
    model = model_of(plan)
    assert max(errors(model, formula_input((2, *size, model.spec.stem.in_channels)))) < 1e-4
