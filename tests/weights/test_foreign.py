"""Files and folders from elsewhere: their format by their content, their network by what fits."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from golden_data import GOLDEN, random_model, small_spec

import nfflax
from nfflax.weights import WeightsError, foreign, to_deepmind, to_timm
from nfflax.weights.adapt import adapted_spec
from nfflax.weights.foreign import CLASS_NAMES, SPEC, abstract_network, leaves_of, read_foreign
from nfflax.weights.hub_folder import write_hub_folder
from nfflax.weights.naming import to_named
from nfflax.weights.safetensors import write_safetensors

SMALL = {"stages.depth": [1, 2, 1, 1]}


@pytest.fixture(scope="module")
def official():
    return random_model(small_spec("nfnet_f0", SMALL))


@pytest.fixture(scope="module")
def twins(official):
    """The official network and the same with timm's numerics, as if they were presets."""
    return [official.spec, small_spec("timm_dm_nfnet_f0", SMALL)]


def names(found) -> list[str]:
    return [spec.name for spec in found.specs]


@pytest.mark.parametrize("name", ["weights", "weights.npz", "weights.pth", "weights.safetensors"])
def test_the_format_goes_by_the_content_and_not_by_the_name(official, tmp_path, name):
    path = tmp_path / name
    path.write_bytes(pickle.dumps(to_deepmind(official), protocol=4))
    assert read_foreign(path).format == "deepmind"
    write_safetensors(path, to_timm(official))
    assert read_foreign(path).format == "timm"
    write_safetensors(path, to_named(official))
    found = read_foreign(path)
    assert (found.format, found.num_classes, found.in_channels) == ("nfflax", 5, 3)
    path.write_bytes((GOLDEN / "torch_pickles" / "dm_nfnet_legacy.pth").read_bytes())
    assert read_foreign(path).format == "timm"
    path.write_text("hello, this is a text and no file of weights")
    with pytest.raises(WeightsError, match=name):
        read_foreign(path)


def test_a_preset_is_found_by_names_and_shapes_whatever_its_classes_and_channels(tmp_path):
    preset = nfflax.load_spec("timm_test_nfnet")
    spec = adapted_spec(preset, num_classes=7, in_channels=1)
    path = tmp_path / "weights.safetensors"
    write_safetensors(path, to_timm(random_model(spec)))
    found = read_foreign(path)
    assert found.specs == (spec,)
    assert not found.is_known


def test_weights_of_deepmind_fit_two_specs_and_the_format_chooses(
    official, twins, tmp_path, monkeypatch
):
    patterns = {"nfnet_f?": twins[:1], "timm_dm_nfnet_f?": twins[1:], "timm_*": twins[1:]}
    monkeypatch.setattr(foreign, "list_specs", patterns.__getitem__)
    path = tmp_path / "weights"
    path.write_bytes(pickle.dumps(to_deepmind(official), protocol=4))
    assert names(read_foreign(path)) == ["nfnet_f0", "timm_dm_nfnet_f0"]
    write_safetensors(path, to_timm(official))
    found = read_foreign(path)
    assert names(found) == ["timm_dm_nfnet_f0", "nfnet_f0"]
    assert not found.is_known
    arrays = to_timm(official)
    arrays["head.fc.bias"] = arrays["head.fc.bias"][:, None]
    write_safetensors(path, arrays)
    assert read_foreign(path).specs == ()


def test_a_folder_says_its_network(official, tmp_path):
    write_hub_folder(tmp_path / "ours", official, class_names="abcde")
    found = read_foreign(tmp_path / "ours")
    assert (found.format, found.specs, found.is_known) == ("nfflax", (official.spec,), True)
    assert found.class_names == tuple("abcde")
    changes = {"name": "mine", "numerics.activation": "relu", "stages.depth": [1, 2, 1, 1]}
    spec = nfflax.load_spec("timm_test_nfnet", changes)
    write_hub_folder(tmp_path / "timm", random_model(spec), layout="timm")
    found = read_foreign(tmp_path / "timm")
    assert (found.format, found.is_known) == ("timm", True)
    assert found.specs[0].numerics == spec.numerics
    assert found.problems(spec) == []


@pytest.mark.parametrize("preset", ["nfnet_f0", "timm_nf_regnet_b0", "resnet50_bn"])
def test_our_files_say_their_network_and_classes_and_hold_all_arrays(preset, tmp_path):
    spec = small_spec(preset, SMALL)
    model = random_model(spec)
    arrays = {path: np.asarray(leaf[...]) for path, leaf in leaves_of(model).items()}
    path = tmp_path / "weights.safetensors"
    said = {
        SPEC: json.dumps(spec.model_dump(mode="json")),
        CLASS_NAMES: json.dumps(["a", "b", "c", "d", "e"]),
    }
    named = {
        name: array[part]
        for at, array in arrays.items()
        for name, part in foreign.naming.block_names(at, array.shape)
    }
    write_safetensors(path, named, said)
    found = read_foreign(path)
    assert found.specs[0] == spec
    assert (found.is_known, found.class_names) == (True, ("a", "b", "c", "d", "e"))
    values = found.values(abstract_network(spec))
    assert values.keys() == arrays.keys()
    for at, array in arrays.items():
        np.testing.assert_array_equal(values[at], array)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({SPEC: '{"extends": "/etc/passwd"}'}, "must be resolved"),
        ({SPEC: "{}"}, "stages"),
        ({SPEC: "[" * 100_000}, "is no spec"),
        ({SPEC: None, CLASS_NAMES: '{"a": 1}'}, "no list of names"),
    ],
)
def test_metadata_that_are_no_spec(official, tmp_path, said, message):
    path: Path = tmp_path / "weights.safetensors"
    whole = json.dumps(official.spec.model_dump(mode="json"))
    write_safetensors(path, to_named(official), {k: v or whole for k, v in said.items()})
    with pytest.raises(WeightsError, match=message):
        read_foreign(path)


def test_a_place_that_says_the_network_wins_over_shapes(official, tmp_path):
    path = tmp_path / "weights"
    write_safetensors(path, to_timm(official))
    found = read_foreign(path, known=official.spec)
    assert (found.is_known, found.specs[0].stages) == (True, official.spec.stages)
