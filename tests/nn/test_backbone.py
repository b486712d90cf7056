"""A network as the front of another one: its maps, what of it exists, and what of it trains."""

import math
import pickle
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_data import abstract_model, random_model

import nfflax
from nfflax import role_of
from nfflax.nn import Backbone, Frozen
from nfflax.nn.activations import Activation
from nfflax.weights import to_deepmind

PAGE = Path(__file__).resolve().parents[2] / "docs" / "backbones.md"

# Every kind of part once: a tap inside the stem, a stack, a stage without one, a final convolution.
SPEC = {
    "name": "front",
    "stem": {"width": [4, 4, 8], "stride": [2, 1, 2]},
    "stages": {"depth": [2, 1], "width": 8, "stride": [1, 2], "group_width": 4},
    "attention": {"kind": "se"},
    "block": {"skip_gain": "ones"},
    "head": {"width": 12, "num_classes": 3},
    "regularization": {"stochastic_depth": 0.5},
}
NORMED = SPEC | {"block": {"skip_gain": "none"}, "norm": {"kind": "batch"}}
IMAGES = np.random.default_rng(0).normal(size=(4, 16, 16, 3)).astype(np.float32)
KEY = jax.random.key(0)
EVERY = (1, 2, 3, 4)


def abstract(spec, levels=EVERY, **how) -> Backbone:
    """A backbone without its arrays."""
    return nnx.eval_shape(lambda: nfflax.backbone(spec, levels, rngs=nnx.Rngs(0), **how))


def cut_from(whole: nfflax.NFNet, levels=EVERY, **how) -> Backbone:
    """A backbone with the arrays of a whole network, looked up by path."""
    graph, state = nnx.split(abstract(whole.spec, levels, **how))
    arrays = dict(nnx.to_flat_state(nnx.state(whole)))
    filled = [(path, v.replace(arrays[path][...])) for path, v in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(filled))


def sizes(model: nnx.Module, kind) -> dict[str, int]:
    """Size by dotted path, of the variables of a kind."""
    flat = nnx.to_flat_state(nnx.state(model, kind))
    return {".".join(map(str, path)): math.prod(variable.shape) for path, variable in flat}


@pytest.fixture(scope="module")
def whole():
    return random_model(nfflax.load_spec(SPEC))


# --- maps --------------------------------------------------------------------------------------


@nnx.jit
def maps_of(models):
    return [model(IMAGES) for model in models]


def test_maps_are_those_of_the_whole_network(whole, tmp_path):
    """Pre-activation as `features` has them, or as the network makes them before it reads on."""
    path = tmp_path / "front.npz"
    path.write_bytes(pickle.dumps(to_deepmind(whole), protocol=4))
    loaded = nfflax.backbone(SPEC, (3, 1), weights=path, frozen=2)
    found, active = maps_of([loaded, cut_from(whole, activated=True)])
    wanted = nnx.jit(lambda m: m.features(IMAGES))(whole)
    assert list(found) == [1, 3]
    assert list(active) == [1, 2, 3, 4]
    for level, map_NHWC in wanted.items():
        if level in found:
            np.testing.assert_allclose(found[level], map_NHWC, rtol=1e-4, atol=1e-5)
        info = whole.feature_info[level - 1]
        variance = {1: 1.0, 2: 1.08, 3: 1.04, 4: 1.04}[level]
        assert info.variance == pytest.approx(variance)
        gelu = jax.nn.gelu(map_NHWC) * 1.7015043497085571
        scale = 1.0 if level == 4 else variance**-0.5
        np.testing.assert_allclose(active[level], gelu * scale, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_loaded_weights_are_adapted_to_grey_images_and_fold(whole, tmp_path):
    path = tmp_path / "front.npz"
    path.write_bytes(pickle.dumps(to_deepmind(whole), protocol=4))
    grey = nfflax.backbone(SPEC, EVERY, weights=path, in_channels=1)
    assert len(grey.spec.preprocess.mean) == 1
    images = IMAGES[..., :1]
    found = nnx.jit(lambda m: m(images))(grey)
    folded = nnx.jit(lambda m: m(images))(nfflax.fold(grey))
    wanted = nnx.jit(lambda m: m.features(np.repeat(images, 3, axis=-1)))(whole)
    for level in EVERY:
        np.testing.assert_allclose(found[level], wanted[level], rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(folded[level], wanted[level], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("gamma", "of_stages", "of_the_final_convolution"),
    [("activation", 2.0, 2.0), ("conv", 2.0, 1.0), ("none", 1.0, 1.0)],
)
def test_activated_maps_have_gamma_wherever_the_numerics_apply_it(
    gamma, of_stages, of_the_final_convolution, monkeypatch
):
    doubled = Activation(jnp.asarray, 2.0)
    monkeypatch.setattr("nfflax.nn.backbone.get_activation", lambda name: doubled)
    model = abstract(SPEC | {"numerics": {"gamma": gamma}}, activated=True)
    first, *_, last = model.feature_info
    assert float(model._activated(jnp.ones(()), first)) == of_stages
    assert float(model._activated(jnp.ones(()), last)) == of_the_final_convolution


def feature_shapes(spec, size, output_stride, levels):
    """({level: shape}, what feature_info says of them)."""
    compiled = nfflax.plan(spec, output_stride=output_stride)
    model = nnx.eval_shape(lambda: Backbone(compiled, levels, rngs=nnx.Rngs(0)))
    images = jax.ShapeDtypeStruct((2, *size, compiled.spec.stem.in_channels), jnp.float32)
    found = jax.eval_shape(lambda m, x: m(x), model, images)
    wanted = {
        info.level: (2, *(-(-side // info.stride) for side in size), info.channels)
        for info in model.feature_info
    }
    return {level: map_NHWC.shape for level, map_NHWC in found.items()}, wanted


def test_feature_info_tells_the_maps_of_other_strides_and_channels():
    deeper = {"depth": 1, "width": 8, "stride": [1, 2, 2, 2], "group_width": 4}
    spec = SPEC | {"stages": deeper, "stem": SPEC["stem"] | {"in_channels": 5}}
    found, wanted = feature_shapes(spec, (32, 64), 8, (2, 4, 5))
    assert found == wanted == {2: (2, 8, 16, 8), 4: (2, 4, 8, 8), 5: (2, 4, 8, 8)}


@pytest.mark.slow
@pytest.mark.parametrize("preset", nfflax.list_specs())
def test_feature_info_tells_the_maps_of_every_preset(preset):
    levels = [info.level for info in nfflax.plan(preset).feature_info]
    for size, output_stride in (((64, 96), 8), ((161, 128), 16)):
        found, wanted = feature_shapes(preset, size, output_stride, levels)
        assert found == wanted
        assert list(found) == levels


# As timm's feature_info has them.
@pytest.mark.parametrize(
    ("preset", "levels"),
    [
        ("timm_nfnet_f1", {1: (64, 2), 2: (256, 4), 3: (512, 8), 4: (1536, 16), 6: (3072, 32)}),
        ("timm_nf_resnet50", {1: (64, 2), 2: (256, 4), 3: (512, 8), 4: (1024, 16), 5: (2048, 32)}),
        ("timm_nf_regnet_b1", {1: (40, 2), 2: (40, 4), 3: (80, 8), 4: (160, 16), 6: (960, 32)}),
    ],
)
def test_levels_are_those_of_timm_and_the_last_stage_besides(preset, levels):
    found = {info.level: (info.channels, info.stride) for info in nfflax.plan(preset).feature_info}
    assert levels.items() <= found.items()


# --- what exists -------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [SPEC, NORMED], ids=["norm-free", "batch norm"])
def test_nothing_exists_above_the_highest_level(spec):
    compiled = nfflax.plan(spec)
    parameters = sizes(abstract_model(nfflax.load_spec(spec)), nnx.Param)
    below = {1: ("stem.convs.0", "stem.convs.1", "stem.acts.0"), 2: ("stem.", "stages.0.")}
    below |= {3: ("stem.", "stages."), 4: ("stem.", "stages.", "final_conv.")}
    for level, parts in below.items():
        cut = compiled.upto(level)
        found = sizes(abstract(spec, [level]), nnx.Param)
        assert found == {k: v for k, v in parameters.items() if k.startswith(parts)}
        assert cut.params == sum(found.values())
        assert [i.level for i in cut.feature_info] == [*range(1, level + 1)]
        assert cut.blocks == compiled.blocks[: len(cut.blocks)]


def test_a_cut_plan_counts_and_shows_what_it_has():
    compiled = nfflax.plan("nfnet_f0")
    cut = compiled.upto(4)
    assert cut.macs(512) == nfflax.plan("nfnet_f0", resolution=512).upto(4).macs()
    assert cut.macs() < compiled.macs()
    assert "classifier" in compiled.table()
    assert "classifier" not in cut.table()
    with pytest.raises(ValueError, match="no feature level 5: nfnet_f0 has"):
        cut.upto(5)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"levels": (2, 9)}, r"no feature level \[9\]: front has \[1, 2, 3, 4\]"),
        ({"levels": ()}, r"levels is empty: front has \[1, 2, 3, 4\]"),
        ({"levels": (1, 2), "frozen": 3}, "frozen = 3: allowed are 0 to 2"),
        ({"frozen": -1}, "frozen = -1"),
        ({"output_stride": 4}, "output_stride = 4"),
        ({"unroll": 0}, "unroll = 0"),
        ({"rngs": None}, "rngs is missing"),
        ({"spec": None}, "spec is missing"),
        ({"spec": NORMED, "activated": True}, "activated = True: front normalises"),
    ],
)
def test_bad_arguments_are_named(how, message):
    with pytest.raises(ValueError, match=message):
        nfflax.backbone(**{"spec": SPEC, "levels": EVERY, "rngs": nnx.Rngs(0)} | how)


# --- what trains -------------------------------------------------------------------------------


def test_frozen_parameters_are_of_another_kind_and_keep_their_roles():
    free, frozen = abstract(SPEC), abstract(SPEC, frozen=2)
    flat = dict(nnx.to_flat_state(nnx.state(free)))
    below = {path for path in flat if path[0] == "stem" or path[:2] == ("stages", 0)}
    found = dict(nnx.to_flat_state(nnx.state(frozen)))
    assert {path for path, variable in found.items() if isinstance(variable, Frozen)} == below
    assert {path: role_of(v) for path, v in found.items()} == {
        path: role_of(v) for path, v in flat.items()
    }
    assert not sizes(abstract(SPEC, frozen=4), nnx.Param)


def test_gradients_and_draws_stay_above_what_is_frozen(whole):
    """All that trains gets a gradient, nothing else does; the image gets one, too."""
    model = cut_from(whole, frozen=2)
    model.train()
    graph, state = nnx.split(model)
    state = nnx.to_pure_dict(state)

    def loss(state, images, key):
        maps = nnx.merge(graph, state)(images, rngs=key)
        return jnp.sum(maps[4] ** 2), maps

    gradients = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
    (of_state, of_images), first = gradients(state, IMAGES, KEY)
    flat = nnx.traversals.flatten_mapping(of_state)
    moved = {".".join(map(str, path)) for path, gradient in flat.items() if np.any(gradient)}
    assert moved == set(sizes(model, nnx.Param))
    assert np.abs(of_images).max() > 0

    _, other = gradients(state, IMAGES, jax.random.key(3))
    same = [level for level in EVERY if np.array_equal(first[level], other[level])]
    assert same == [1, 2]
    everything = abstract(SPEC, frozen=4)
    everything.train()
    jax.eval_shape(lambda m: m(IMAGES), everything)  # nothing to draw: no key


def residuals(frozen: int, remat: str) -> int:
    """Bytes that the backward pass needs from the forward pass."""
    graph, state = nnx.split(abstract(SPEC, frozen=frozen, remat=remat))

    def backward(state):
        return jax.vjp(lambda s: nnx.merge(graph, s)(IMAGES), nnx.to_pure_dict(state))[1]

    leaves = jax.tree.leaves(jax.eval_shape(backward, state))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


@pytest.mark.parametrize("remat", ["none", pytest.param("block", marks=pytest.mark.slow)])
def test_nothing_is_kept_for_the_backward_pass_of_what_is_frozen(remat):
    kept = [residuals(frozen, remat) for frozen in (0, 2, 4)]
    assert kept[0] > 4 * kept[1] > 0 == kept[2]


@pytest.mark.slow
def test_frozen_norms_keep_their_statistics():
    model = cut_from(random_model(nfflax.load_spec(NORMED)), (3,), frozen=2)
    before = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    model.train()
    nnx.jit(lambda m: m(IMAGES, rngs=KEY))(model)
    after = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    same = jax.tree.map(np.array_equal, before, after)
    assert all(jax.tree.leaves([same["stem"], same["stages"][0]]))
    assert not any(jax.tree.leaves(same["stages"][1]))


# --- the page ----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(len(re.findall("^```python", PAGE.read_text(), re.M))))
def test_the_page_runs(number):
    """Each example after the first one, traced only, with drawn weights in place of loaded ones."""
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    text = "\n".join(blocks[:1] + blocks[number : number + 1] * (number > 0))
    text = re.sub(r'weights="\w+"', "rngs=nnx.Rngs(0)", text)
    nnx.eval_shape(lambda: exec(text, {}))
