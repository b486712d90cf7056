"""Folders in the hub's layout: ours and timm's come back as they were, and nothing half-written.

Real timm loads what is written in its layout: see test_timm_config.py.
"""

import json
import os

import numpy as np
import pytest
from flax import nnx
from golden_data import assert_equal, random_model, small_spec

from nfflax.weights import WeightsError, hub_folder, to_timm
from nfflax.weights.hub_folder import read_hub_folder, write_hub_folder
from nfflax.weights.naming import to_named
from nfflax.weights.published import imagenet_classes
from nfflax.weights.safetensors import read_safetensors, write_safetensors

NAMES = ("nought", "eins", "zwei", "trois", "fünf")


@pytest.fixture(scope="module")
def model():
    return random_model(small_spec("timm_nfnet_l0", {"stem.width": [4, 8, 16, 32]}))


@pytest.fixture(scope="module")
def written(model, tmp_path_factory):
    """The same network in both layouts; tests copy what they change."""
    folder = tmp_path_factory.mktemp("written")
    for layout in ("nfflax", "timm"):
        write_hub_folder(folder / layout, model, layout=layout, class_names=NAMES)
    return folder


def change_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8")) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


@pytest.fixture
def copy(written, tmp_path):
    """A folder in our layout to spoil."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in (written / "nfflax").iterdir():
        folder.joinpath(file.name).write_bytes(file.read_bytes())
    return folder


def test_our_layout_comes_back(model, written):
    found = read_hub_folder(written / "nfflax")
    assert (found.layout, found.spec, found.class_names) == ("nfflax", model.spec, NAMES)
    assert_equal(dict(found.arrays), to_named(model))
    assert "stages.1.blocks.11.conv1.kernel" in found.arrays


def test_timms_layout_comes_back(model, written):
    found = read_hub_folder(written / "timm")
    assert (found.layout, found.preset, found.class_names) == ("timm", "", NAMES)
    assert_equal(dict(found.arrays), to_timm(model))
    said = found.spec.model_dump(exclude={"name", "summary"})
    assert said == model.spec.model_dump(exclude={"name", "summary"})


@pytest.mark.parametrize("preset", ["nfnet_f0_bn", "nf_resnet50", "timm_eca_nfnet_l0"])
def test_every_array_is_there_statistics_included(preset, tmp_path):
    model = random_model(small_spec(preset))
    write_hub_folder(tmp_path / "net", model)
    found = read_hub_folder(tmp_path / "net")
    assert found.class_names == ()
    assert_equal(dict(found.arrays), to_named(nnx.state(model)))
    assert any(name.endswith("norm.var") for name in found.arrays) == preset.endswith("_bn")


def test_the_card_says_what_it_is(model, written):
    card = (written / "nfflax" / "README.md").read_text("utf-8")
    assert card.startswith("---\nlibrary_name: nfflax\n")
    assert f"| {model.plan.params:,} |" in card
    assert "nfflax.load(" in card
    assert not (written / "timm" / "README.md").exists()


def test_equal_networks_make_equal_folders(model, written, tmp_path):
    write_hub_folder(tmp_path / "nfflax", model, class_names=NAMES)
    for file in (written / "nfflax").iterdir():
        assert (tmp_path / "nfflax" / file.name).read_bytes() == file.read_bytes()


# What is there already, and what goes wrong on the way


def test_a_folder_in_use_is_replaced_only_when_told(model, tmp_path):
    folder = tmp_path / "net"
    folder.mkdir()
    write_hub_folder(folder, model)  # an empty one is free
    with pytest.raises(WeightsError, match="has files in it"):
        write_hub_folder(folder, model)
    write_hub_folder(folder, model, overwrite=True, class_names=NAMES)
    assert sorted(os.listdir(folder)) == ["README.md", "config.json", "model.safetensors"]
    assert read_hub_folder(folder).class_names == NAMES
    folder.joinpath(".git").mkdir()
    with pytest.raises(WeightsError, match=r"holds \.git, which nfflax has not written"):
        write_hub_folder(folder, model, overwrite=True)
    assert folder.joinpath(".git").exists()
    folder = tmp_path / "file"
    folder.write_text("a file")
    with pytest.raises(WeightsError, match="The file exists"):
        write_hub_folder(folder, model)
    write_hub_folder(folder, model, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["file", "net"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_stops_in_between_leaves_the_old_folder(model, tmp_path, monkeypatch, error):
    folder = tmp_path / "net"
    write_hub_folder(folder, model)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def stops(path, *_):
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(hub_folder, "write_safetensors", stops)
    wanted = WeightsError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(wanted, match=r"cannot be written: No space|^$"):
        write_hub_folder(folder, model, overwrite=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert os.listdir(tmp_path) == ["net"]


def test_what_timm_cannot_say_leaves_nothing(tmp_path):
    with pytest.raises(WeightsError, match=r"numerics\.activation"):
        write_hub_folder(tmp_path / "net", random_model(small_spec("nfnet_f0")), layout="timm")
    assert os.listdir(tmp_path) == []


def test_as_many_names_as_classes(model, tmp_path):
    with pytest.raises(WeightsError, match="There are 1000 class names for 5 classes"):
        write_hub_folder(tmp_path / "net", model, class_names=imagenet_classes())


# Folders of others


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format_version is 2, this nfflax knows 1: upgrade"),
        ({"spec": {"stages": {"depth": 3}}}, "stem.width"),
        ({"spec": {"extends": "/etc/secret.toml"}}, "must be a resolved one"),
        ({"spec": "nfnet_f0"}, "must be a resolved one"),
        ({"class_names": ["one"]}, "1 class_names for 5 classes"),
        ({"class_names": [1, 2, 3, 4, 5]}, "must be a list of names"),
        ({"library_name": "transformers"}, "neither nfflax's .* nor timm's"),
        ({"library_name": None, "architecture": "resnet50"}, "no normalizer-free network"),
    ],
)
def test_configs_that_are_wrong(copy, changes, message):
    change_config(copy, **changes)
    with pytest.raises(WeightsError, match=message) as caught:
        read_hub_folder(copy)
    assert caught.value.source == str(copy / "config.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "no JSON"), (b"[" * 100_000, "no JSON"), (b"[]", "JSON object"), (b"\xff", "no JSON")],
)
def test_configs_that_are_no_configs(copy, content, message):
    copy.joinpath("config.json").write_bytes(content)
    with pytest.raises(WeightsError, match=message):
        read_hub_folder(copy)


def test_folders_without_their_files(copy, tmp_path):
    copy.joinpath("model.safetensors").unlink()
    with pytest.raises(WeightsError, match="The folder has neither"):
        read_hub_folder(copy)
    with pytest.raises(WeightsError, match="No such file"):
        read_hub_folder(tmp_path / "none")


def test_half_precision_weights_are_read_as_they_are(model, copy):
    arrays, metadata = read_safetensors(copy / "model.safetensors")
    half = {name: array.astype(np.float16) for name, array in arrays.items()}
    write_safetensors(copy / "model.safetensors", half, metadata)
    assert {a.dtype for a in read_hub_folder(copy).arrays.values()} == {np.dtype(np.float16)}
