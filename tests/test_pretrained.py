"""`nfflax.load`: a trained network in one's own code, and what is changed in it on the way."""

import pickle
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from golden_data import (
    assert_equal,
    formula_input,
    golden,
    haiku_formula_tree,
    params,
    random_model,
    timm_formula_state,
    weightless,
)

import nfflax
from nfflax.optim.roles import leaves_by_path
from nfflax.train.convert import convert
from nfflax.train.inference import load_model
from nfflax.weights import to_timm
from nfflax.weights.adapt import adapted_spec, with_channels
from nfflax.weights.safetensors import write_safetensors


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> tuple[str, nfflax.NFNet]:
    """A file of timm's smallest network with random weights, and the network."""
    model = random_model("timm_test_nfnet")
    path = tmp_path_factory.mktemp("weights") / "test_nfnet.safetensors"
    write_safetensors(path, to_timm(model))
    return str(path), model


def test_a_network_as_it_is(published):
    path, wanted = published
    loaded = load_model(path)
    assert loaded.class_names[281] == "n02123045 tabby, tabby cat"
    assert loaded.notes == ("its 1,000 classes are taken for ImageNet's",)
    model = nfflax.load(path)
    assert_equal(params(model), params(wanted))
    assert (model.spec.name, model.deterministic) == ("timm_test_nfnet", True)
    kernels = [net.classifier.kernel for net in (model, wanted) if net.classifier]
    assert nfflax.role_of(kernels[0]) == nfflax.role_of(kernels[1])


def test_a_backbone_of_weights_that_say_their_network(published):
    path, wanted = published
    backbone = nfflax.backbone(weights=path, levels=[2], in_channels=1)
    (info,) = backbone.feature_info
    assert (info.channels, info.stride) == (wanted.feature_info[1].channels, 4)
    assert backbone.spec.stem.in_channels == 1
    kernel = wanted.stages[0].first.conv0.kernel
    np.testing.assert_array_equal(backbone.stages[0].first.conv0.kernel[...], kernel[...])


def test_for_other_classes_channels_and_images(published):
    path, wanted = published
    changes: dict[str, Any] = {"resolution.test": 96, "head.dropout": 0.5}
    how: dict[str, Any] = {"dtype": "bfloat16", "output_stride": 8, "remat": "block"}
    loaded = load_model(
        path, num_classes=7, in_channels=1, overrides=changes, rngs=nnx.Rngs(3), **how
    )
    spec, model = loaded.model.spec, loaded.model
    assert (spec.head.num_classes, spec.stem.in_channels) == (7, 1)
    assert (spec.resolution.test, spec.head.dropout) == (96, 0.5)
    assert (loaded.view.resolution, model.dtype) == (96, np.dtype("bfloat16"))
    assert model.feature_info[-1].stride == 8
    assert any("3 channels before, 1 now" in note for note in loaded.notes)
    assert loaded.class_names == ()
    found, before = leaves_by_path(params(model)), leaves_by_path(params(wanted))
    before = with_channels(before, wanted.spec, 1)
    for path_of, leaf in found.items():
        if path_of[0] != "classifier":
            np.testing.assert_array_equal(leaf, before[path_of])
    kernel = np.asarray(params(model)["classifier"]["kernel"])
    assert kernel.shape == (192, 7)
    assert abs(kernel.std() - 0.01) < 1e-3
    logits = jax.eval_shape(lambda model, x: model(x), model, np.zeros((2, 32, 32, 1), np.float32))
    assert logits.shape == (2, 7)


def test_without_a_classifier(published):
    model = nfflax.load(published[0], num_classes=0)
    assert model.classifier is None
    assert "classifier" not in params(model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": 7}, "the classifier for 1,000 classes cannot be kept"),
        ({"overrides": {"head.num_classes": 7}}, "allowed: rngs=nnx.Rngs"),
        ({"overrides": {"numerics.activation": "relu"}}, 'is "silu" in'),
        ({"overrides": {"resolution.tset": 96}}, "did you mean: resolution.test"),
        ({"spec": "timm_nfnet_l0"}, "stages.depth = "),
        ({"in_channels": 0}, "stem.in_channels"),
    ],
)
def test_what_cannot_be_changed_so(published, changes, message):
    with pytest.raises(nfflax.SpecError) as caught:
        nfflax.load(published[0], **changes)
    assert message in str(caught.value)


def test_channels_that_cannot_be_adapted(tmp_path):
    spec = adapted_spec(nfflax.load_spec("timm_test_nfnet"), in_channels=4)
    path = tmp_path / "four.safetensors"
    write_safetensors(path, to_timm(random_model(spec)))
    with pytest.raises(nfflax.SpecError, match="for 4 channels cannot be adapted to 3"):
        nfflax.load(path, in_channels=3)


def test_a_variation_of_a_preset_is_what_its_user_says(published):
    path, wanted = published
    relu = nfflax.load_spec("timm_test_nfnet", {"numerics.activation": "relu", "name": "mine"})
    loaded = load_model(path, spec=relu)
    assert loaded.model.spec.numerics.activation == "relu"
    assert_equal(params(loaded.model), params(wanted))
    (note,) = loaded.notes
    assert note.endswith("as well as mine: they differ in numerics.activation")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reference", "preset", "through"),
    [
        ("forward_nfnet_f0", "nfnet_f0", "weights.npz"),
        ("forward_nfnet_f0", "nfnet_f0", "folder"),
        ("timm_dm_nfnet_f0", "timm_dm_nfnet_f0", "weights.safetensors"),
        ("timm_nf_resnet50", "timm_nf_resnet50", "weights.npz"),
        ("timm_nfnet_l0", "timm_nfnet_l0", "weights.safetensors"),
    ],
)
def test_full_size_weights_give_the_reference_logits(reference, preset, through, tmp_path):
    """From a file in the publisher's form, through a conversion, to the publisher's numbers."""
    wanted, source = golden(f"{reference}.npz"), tmp_path / "source"
    shapes = weightless(preset)
    if reference.startswith("timm"):
        write_safetensors(source, timm_formula_state(shapes))
    else:
        source.write_bytes(pickle.dumps(haiku_formula_tree(shapes), protocol=4))
    own = nfflax.load(source)
    assert own.spec.name == preset
    convert(source, tmp_path / through, spec=preset)
    model = nfflax.load(tmp_path / through, spec=preset)
    assert_equal(params(model), params(own))
    images_NHWC = formula_input((2, 64, 64, 3))
    with jax.default_matmul_precision("highest"):
        logits = np.asarray(nnx.jit(lambda model, x: model(x))(model, images_NHWC))
    error = np.abs(logits[: len(wanted["logits_64"])] - wanted["logits_64"]).max()
    assert error <= 1e-5 * np.abs(wanted["logits_64"]).max()
