"""timm's names, shapes and layouts: to its state dict and back, and every way that can go wrong.

What is common to all formats (number types, sharding, abstract networks) is in test_deepmind.py.
"""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from golden_data import (
    abstract_model,
    assert_equal,
    formula_param,
    golden,
    params,
    random_model,
    small_spec,
    timm_formula_state,
    weightless,
)
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from nfflax.weights import WeightsError, load_timm, to_timm

REFERENCE = golden("timm_params.json")
# With squeeze-and-excitation after and inside the bottleneck, with ECA, and without attention.
FAMILIES = [
    "timm_dm_nfnet_f0",
    "timm_nfnet_l0",
    "timm_eca_nfnet_l0",
    "timm_nf_regnet_b0",
    "timm_nf_resnet50",
    "timm_nf_seresnet50",
]


@pytest.fixture
def model():
    return random_model(small_spec("timm_nfnet_l0"))


@pytest.fixture
def state_dict(model):
    return timm_formula_state(model)


# Names, shapes and layouts


@pytest.mark.parametrize("name", REFERENCE)
def test_names_and_shapes_are_those_of_timm(name):
    state_dict = to_timm(weightless(f"timm_{name}"))
    assert {key: list(array.shape) for key, array in state_dict.items()} == REFERENCE[name]


@pytest.mark.parametrize(
    ("preset", "ours", "theirs", "layout"),
    [
        ("timm_nfnet_l0", lambda m: m.stem.convs[1].kernel, "stem.conv2.weight", "oihw->hwio"),
        ("timm_nf_resnet50", lambda m: m.stem.convs[0].kernel, "stem.conv.weight", "oihw->hwio"),
        (
            "timm_nfnet_l0",
            lambda m: m.stages[1].rest.conv1b.kernel[10],
            "stages.1.11.conv2b.weight",
            "oihw->hwio",
        ),
        (
            "timm_nfnet_l0",
            lambda m: m.stages[1].rest.conv1b.gain[1],
            "stages.1.2.conv2b.gain",
            "oihw->o",
        ),
        (
            "timm_nfnet_l0",
            lambda m: m.stages[2].first.conv_shortcut.bias,
            "stages.2.0.downsample.conv.bias",
            "o->o",
        ),
        (
            "timm_nfnet_l0",
            lambda m: m.stages[0].first.attention.fc0.kernel,
            "stages.0.0.attn_last.fc1.weight",
            "oihw->io",
        ),
        (
            "timm_nf_regnet_b0",
            lambda m: m.stages[1].rest.attention.fc1.kernel[1],
            "stages.1.2.attn.fc2.weight",
            "oihw->io",
        ),
        (
            "timm_eca_nfnet_l0",
            lambda m: m.stages[1].rest.attention.kernel[1],
            "stages.1.2.attn_last.conv.weight",
            "oik->k",
        ),
        (
            "timm_dm_nfnet_f0",
            lambda m: m.stages[1].rest.skip_gain[10],
            "stages.1.11.skipinit_gain",
            "->",
        ),
        ("timm_nfnet_l0", lambda m: m.classifier.kernel, "head.fc.weight", "oi->io"),
        ("timm_nfnet_l0", lambda m: m.final_conv.kernel, "final_conv.weight", "oihw->hwio"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_parameter_gets_the_numbers_of_its_own_name(preset, ours, theirs, layout):
    """By the formula, which goes by the name; `layout` says which axis is which (i: one of one)."""
    model = random_model(small_spec(preset))
    state_dict = timm_formula_state(model)
    load_timm(model, state_dict)
    wanted = formula_param(theirs, state_dict[theirs].shape, "timm")
    assert_equal(np.asarray(ours(model)), np.einsum(layout, wanted))


# There and back


@pytest.mark.parametrize("preset", FAMILIES)
def test_the_round_trip_is_exact(preset):
    model, fresh = (random_model(small_spec(preset), seed) for seed in (0, 1))
    state_dict = to_timm(model)
    load_timm(fresh, state_dict)
    assert_equal(params(fresh), params(model))
    assert_equal(to_timm(fresh), state_dict)
    assert {type(array) for array in state_dict.values()} == {np.ndarray}


def test_without_a_classifier(model):
    spec = small_spec("timm_nfnet_l0", {"head.num_classes": 0})
    backbone, fresh = random_model(spec), random_model(spec, seed=1)
    state_dict = to_timm(backbone)
    assert not [key for key in state_dict if key.startswith("head")]
    load_timm(fresh, state_dict)
    assert_equal(params(fresh), params(backbone))
    with pytest.raises(WeightsError) as caught:
        load_timm(backbone, to_timm(model))
    assert sorted(caught.value.problems) == [
        "unexpected: head.fc.bias",
        "unexpected: head.fc.weight",
    ]


@pytest.mark.parametrize("pure", [False, True], ids=["state", "pure dict"])
@pytest.mark.parametrize("preset", FAMILIES)
def test_gradients_go_under_the_same_names(preset, pure):
    """The gradient of half the squared parameters is the parameters themselves."""
    model = random_model(small_spec(preset))

    def loss(model):
        return sum(jnp.sum(leaf**2) / 2 for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))

    gradients = nnx.jit(nnx.grad(loss))(model)
    state_dict = to_timm(nnx.to_pure_dict(gradients) if pure else gradients)
    assert_equal(state_dict, to_timm(model))


# What does not fit


def test_all_problems_come_at_once_and_nothing_changes(model, state_dict):
    before = jax.tree.map(np.array, params(model))
    block = "stages.1.11"
    del state_dict["final_conv.gain"]
    del state_dict[f"{block}.attn_last.fc1.weight"]
    state_dict["stem.conv1.weight"] = np.zeros((3, 3, 3, 4), np.float32)
    state_dict["stem.conv1.gain"] = np.ones(4, np.float32)
    state_dict["head.fc.bias"] = np.full(5, "0.1")
    state_dict["head.fc.scale"] = np.ones(5, np.float32)
    state_dict[f"{block}.conv1.bias"] = [[1.0], [2.0, 3.0]]
    with pytest.raises(WeightsError) as caught:
        load_timm(model, state_dict)
    assert sorted(caught.value.problems) == [
        "missing: final_conv.gain (for final_conv.gain [24])",
        f"missing: {block}.attn_last.fc1.weight "
        "(for stages.1.blocks.11.attention.fc0.kernel [12, 3])",
        "not numeric: head.fc.bias is <U3",
        f"not numeric: {block}.conv1.bias is no array but list",
        "unexpected: head.fc.scale",
        "wrong shape: stem.conv1.gain is [4], the model has [4, 1, 1, 1]",
        "wrong shape: stem.conv1.weight is [3, 3, 3, 4], the model has [4, 3, 3, 3]",
    ]
    assert_equal(params(model), before)


def test_the_official_names_are_no_names_of_timm(model, state_dict):
    """A file of the other format: everything is missing, everything is unexpected."""
    other = {key.replace(".", "/"): array for key, array in state_dict.items()}
    with pytest.raises(WeightsError) as caught:
        load_timm(model, other)
    assert len(caught.value.problems) == 2 * len(state_dict)


@pytest.mark.parametrize("preset", ["nfnet_f0_bn", "resnet50_bn"])
def test_batch_normalised_networks_have_no_names_in_timm(preset):
    with pytest.raises(WeightsError) as caught:
        to_timm(weightless(preset))
    problems = caught.value.problems
    assert "timm has no such parameter: final_act.norm.scale" in problems
    assert "timm has no such parameter: stages.1.blocks.0.act0.norm.bias" in problems
    with pytest.raises(WeightsError, match="timm has no such parameter"):
        load_timm(abstract_model(preset), {})


def test_a_module_around_the_network_is_refused(model):
    class Detector(nnx.Module):
        def __init__(self):
            self.backbone = model
            self.scale = nnx.Param(jnp.ones(()))

    with pytest.raises(WeightsError) as caught:
        to_timm(Detector())
    assert "timm has no such parameter: scale" in caught.value.problems


# Number formats and places


def test_half_precision_becomes_float32(model, state_dict):
    half = {key: array.astype(ml_dtypes.bfloat16) for key, array in state_dict.items()}
    load_timm(model, half)
    assert_equal(to_timm(model), {key: array.astype(np.float32) for key, array in half.items()})
    assert {leaf.dtype for leaf in jax.tree.leaves(params(model))} == {np.dtype(np.float32)}


def test_a_network_on_a_mesh_keeps_its_sharding(model, state_dict):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere = NamedSharding(mesh, P())
    nnx.update(model, jax.device_put(nnx.state(model, nnx.Param), everywhere))
    load_timm(model, state_dict)
    assert {leaf.sharding for leaf in jax.tree.leaves(params(model))} == {everywhere}
    assert_equal(to_timm(model), state_dict)
