"""DeepMind's names, shapes and numbers: to their tree and back, and every way that can go wrong."""

import os
import pickle
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from golden_data import (
    abstract_model,
    assert_equal,
    formula_input,
    formula_param,
    golden,
    haiku_formula_tree,
    params,
    random_model,
    small_spec,
    weightless,
)
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import nfflax
from nfflax.nn import SqueezeExcite
from nfflax.weights import WeightsError, load_deepmind, to_deepmind

PRESETS = {
    "F0": "nfnet_f0",
    "B0": "nf_regnet_b0",
    "ResNet50": "nf_resnet50",
    "ResNet50_se": "nf_seresnet50",
}
FAMILIES = list(PRESETS.values())


@pytest.fixture
def model():
    return random_model(small_spec("nfnet_f0"))


@pytest.fixture
def tree(model):
    return haiku_formula_tree(model)


# The formula that stands in for stored weights


@pytest.mark.parametrize("vector", golden("formula.json"), ids=lambda v: v["path"])
def test_the_formula_gives_the_values_that_it_gave_the_official_code(vector):
    path, shape, layout = vector["path"], vector["shape"], vector["layout"]
    is_input = layout == "make_input"
    value = formula_input(shape) if is_input else formula_param(path, shape, layout)
    first = vector["first_values"]
    assert value.dtype == np.float32
    assert value.shape == tuple(shape)
    assert value.ravel()[: len(first)].tolist() == first
    assert value.sum(dtype=np.float64) == pytest.approx(vector["sum_f64"], rel=1e-12)


# Names, shapes and order


@pytest.mark.parametrize("variant", PRESETS)
def test_names_and_shapes_are_the_official_ones(variant):
    tree = to_deepmind(weightless(PRESETS[variant]))
    found = {m: {name: list(a.shape) for name, a in arrays.items()} for m, arrays in tree.items()}
    assert found == golden("haiku_params.json")[variant]


@pytest.mark.parametrize(
    ("preset", "root", "block"),
    [
        ("nfnet_f0", "NFNet", "nf_block"),
        ("nf_regnet_b0", "NF_RegNet", "nf_block"),
        ("nf_seresnet50", "NF_ResNet", "nf_res_block"),
    ],
)
def test_each_block_gets_the_numbers_of_its_own_name(preset, root, block):
    """Blocks count through the stages: 1 in the first, 12 in the second, then the third's."""
    model = random_model(small_spec(preset))
    tree = haiku_formula_tree(model)
    load_deepmind(model, tree)
    second, third = model.stages[1].rest, model.stages[2].first
    assert second is not None
    assert isinstance(third.attention, SqueezeExcite)
    for position in (0, 1, 10):
        module = f"{root}/~/{block}_{position + 2}"
        kernel, gain = (np.asarray(p)[position] for p in (second.conv1.kernel, second.skip_gain))
        assert_equal(kernel, formula_param(f"{module}/~/conv1/w", kernel.shape))
        assert_equal(gain, formula_param(f"{module}/skip_gain", ()))
    squeeze = third.attention.fc1.kernel[...]
    path = f"{root}/~/{block}_13/~/squeeze_excite/~/linear_1/w"
    assert_equal(squeeze, formula_param(path, squeeze.shape))
    stem = "initial_conv" if root != "NFNet" else "stem_conv0"
    kernel = model.stem.convs[0].kernel[...]
    assert_equal(kernel, formula_param(f"{root}/~/{stem}/w", kernel.shape))


# There and back


@pytest.mark.parametrize("preset", FAMILIES)
def test_the_round_trip_is_exact(preset):
    model, fresh = (random_model(small_spec(preset), seed) for seed in (0, 1))
    tree = to_deepmind(model)
    load_deepmind(fresh, tree)
    assert_equal(params(fresh), params(model))
    assert_equal(to_deepmind(fresh), tree)


def test_without_a_classifier(model):
    spec = small_spec("nfnet_f0", {"head.num_classes": 0})
    backbone, fresh = random_model(spec), random_model(spec, seed=1)
    tree = to_deepmind(backbone)
    assert "NFNet/~/linear" not in tree
    load_deepmind(fresh, tree)
    assert_equal(params(fresh), params(backbone))
    with pytest.raises(WeightsError) as caught:
        load_deepmind(backbone, to_deepmind(model))
    assert sorted(caught.value.problems) == [
        "unexpected: NFNet/~/linear/b",
        "unexpected: NFNet/~/linear/w",
    ]


def test_every_leaf_is_an_array(model):
    """A skip gain of a stack, too: NumPy makes scalars of the entries of a vector."""
    assert {type(leaf) for leaf in jax.tree.leaves(to_deepmind(model))} == {np.ndarray}


@pytest.mark.parametrize("as_path", [str, Path])
def test_from_a_pickled_file(model, tree, tmp_path, as_path):
    file = tmp_path / "F0_haiku.npz"
    file.write_bytes(pickle.dumps(tree, protocol=4))
    load_deepmind(model, as_path(file))
    assert_equal(to_deepmind(model), tree)


def test_a_pickled_file_is_what_the_error_names(model, tree, tmp_path):
    file = tmp_path / "F0_haiku.npz"
    del tree["NFNet/~/linear"]["b"]
    file.write_bytes(pickle.dumps(tree, protocol=4))
    with pytest.raises(WeightsError) as caught:
        load_deepmind(model, file)
    assert caught.value.source == os.fspath(file)
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize("pure", [False, True], ids=["state", "pure dict"])
@pytest.mark.parametrize("preset", FAMILIES)
def test_gradients_go_under_the_same_names(preset, pure):
    """The gradient of half the squared parameters is the parameters themselves."""
    model = random_model(small_spec(preset))

    def loss(model):
        return sum(jnp.sum(leaf**2) / 2 for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))

    gradients = nnx.jit(nnx.grad(loss))(model)
    assert isinstance(gradients, nnx.State)
    tree = to_deepmind(nnx.to_pure_dict(gradients) if pure else gradients)
    assert_equal(tree, to_deepmind(model))


# Root names


@pytest.mark.parametrize("root", ["my_net", "NF_ResNet"])
def test_any_root_name_is_accepted(model, tree, root):
    renamed = {module.replace("NFNet", root, 1): arrays for module, arrays in tree.items()}
    load_deepmind(model, renamed)
    assert_equal(to_deepmind(model), tree)


def test_a_stray_entry_beside_another_root_is_the_only_problem(model, tree):
    renamed = {module.replace("NFNet", "my_net", 1): arrays for module, arrays in tree.items()}
    with pytest.raises(WeightsError) as caught:
        load_deepmind(model, renamed | {"ema": {"decay": np.ones(())}})
    assert caught.value.problems == ("unexpected: ema/decay",)


# What does not fit


def test_all_problems_come_at_once_and_nothing_changes(model, tree):
    before = jax.tree.map(np.array, params(model))
    block = "NFNet/~/nf_block_11"
    del tree["NFNet/~/final_conv"]
    del tree[block]["skip_gain"]
    tree["NFNet/~/stem_conv0"]["w"] = np.zeros((4, 3, 3, 3), np.float32)
    tree["NFNet/~/linear"] = {
        "w": np.full(tree["NFNet/~/linear"]["w"].shape, "0.1"),
        "b": np.zeros(5, complex),
        "gain": np.ones(5, np.float32),
    }
    tree[f"{block}/~/conv0"]["bias"] = [[1.0], [2.0, 3.0]]  # pyright: ignore[reportArgumentType]
    tree["NFNet/~/nf_block"]["skip_gain"] = None  # pyright: ignore[reportArgumentType]
    with pytest.raises(WeightsError) as caught:
        load_deepmind(model, tree)
    assert sorted(caught.value.problems) == [
        "missing: NFNet/~/final_conv/bias (for final_conv.bias [32])",
        "missing: NFNet/~/final_conv/gain (for final_conv.gain [32])",
        "missing: NFNet/~/final_conv/w (for final_conv.kernel [1, 1, 16, 32])",
        f"missing: {block}/skip_gain (for stages.1.blocks.10.skip_gain [])",
        "not numeric: NFNet/~/linear/b is complex128",
        "not numeric: NFNet/~/linear/w is <U3",
        "not numeric: NFNet/~/nf_block/skip_gain is object",
        f"not numeric: {block}/~/conv0/bias is no array but list",
        "unexpected: NFNet/~/linear/gain",
        "wrong shape: NFNet/~/stem_conv0/w is [4, 3, 3, 3], the model has [3, 3, 3, 4]",
    ]
    assert "10 problems" in str(caught.value)
    assert_equal(params(model), before)


def test_a_tree_that_is_not_nested(model):
    with pytest.raises(WeightsError) as caught:
        load_deepmind(model, {"NFNet/~/linear": np.zeros(5)})  # pyright: ignore
    assert "unexpected: NFNet/~/linear" in caught.value.problems


def test_an_empty_tree(model):
    with pytest.raises(WeightsError) as caught:
        load_deepmind(model, {})
    assert "missing: NFNet/~/linear/b (for classifier.bias [5])" in caught.value.problems


@pytest.mark.parametrize(
    ("spec", "culprit"),
    [
        ("nfnet_f0_bn", "final_act.norm.scale"),
        ("resnet50_bn", "final_act.norm.scale"),
        ("timm_eca_nfnet_l0", "stages.3.blocks.2.attention.kernel"),
    ],
)
def test_networks_that_the_release_has_no_names_for(spec, culprit):
    """Batch normalisation and efficient channel attention, in either direction."""
    with pytest.raises(WeightsError) as caught:
        to_deepmind(weightless(spec))
    assert f"the official release has no such parameter: {culprit}" in caught.value.problems
    with pytest.raises(WeightsError, match="official release has no such parameter"):
        load_deepmind(abstract_model(spec), {})


# Number formats and places


@pytest.mark.parametrize(
    "dtype", [ml_dtypes.bfloat16, np.float16, np.float64, np.int8], ids=lambda d: np.dtype(d).name
)
def test_numbers_of_any_type_become_float32(model, tree, dtype):
    cast = jax.tree.map(lambda array: np.asarray(array).astype(dtype), tree)
    load_deepmind(model, cast)
    found = to_deepmind(model)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {np.dtype(np.float32)}
    assert_equal(found, jax.tree.map(lambda array: array.astype(np.float32), cast))


def test_jax_arrays_are_accepted(model, tree):
    load_deepmind(model, jax.tree.map(lambda array: jnp.asarray(array, jnp.bfloat16), tree))
    wanted = jax.tree.map(lambda array: array.astype(ml_dtypes.bfloat16), tree)
    assert_equal(to_deepmind(model), jax.tree.map(lambda array: array.astype(np.float32), wanted))


def test_the_model_does_not_share_memory_with_the_tree(model, tree):
    load_deepmind(model, tree)
    kept = jax.tree.map(np.array, tree)
    for leaf in jax.tree.leaves(tree):
        leaf[...] = 7.0
    assert_equal(to_deepmind(model), kept)


@pytest.fixture
def mesh():
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def test_every_parameter_keeps_its_sharding(model, tree, mesh):
    """Kernels split over the model axis where it divides them, and one parameter on one device."""
    state = nnx.state(model, nnx.Param)

    def place(leaf):
        is_split = leaf.ndim > 1 and leaf.shape[-1] % 2 == 0
        spec = P(*(None,) * (leaf.ndim - 1), "model") if is_split else P()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    nnx.update(model, jax.tree.map(place, state))
    assert model.classifier is not None
    bias = model.classifier.bias
    bias.set_value(jax.device_put(np.zeros(5, np.float32), jax.devices()[3]))
    before = jax.tree.map(lambda leaf: leaf.sharding, params(model))
    load_deepmind(model, tree)
    assert jax.tree.map(lambda leaf: leaf.sharding, params(model)) == before
    kernel = model.final_conv.kernel[...]
    assert kernel.addressable_shards[0].data.shape[-1] == kernel.shape[-1] // 2
    assert_equal(to_deepmind(model), tree)


def test_a_network_on_no_particular_device_stays_free_to_move(model, tree, mesh):
    """Else a loaded network could not meet a batch that is split over devices."""
    load_deepmind(model, tree)
    batch = jax.device_put(np.ones((8, 32), np.float32), NamedSharding(mesh, P("data")))
    logits = jax.jit(lambda layer, x: layer(x))(model.classifier, batch)
    assert len(logits.sharding.device_set) == mesh.size


def test_an_abstract_network_becomes_a_real_one(tree):
    model = abstract_model(small_spec("nfnet_f0"))
    load_deepmind(model, tree)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params(model)))
    assert_equal(to_deepmind(model), tree)


def test_a_backbone_inside_a_larger_module(tree):
    class Detector(nnx.Module):
        def __init__(self, backbone: nfflax.NFNet):
            self.backbone = backbone
            self.scale = nnx.Param(jnp.ones(()))

    detector = Detector(random_model(small_spec("nfnet_f0")))
    load_deepmind(detector.backbone, tree)
    assert_equal(to_deepmind(detector.backbone), tree)
    assert detector.scale[...] == 1
