"""`nfflax convert`: every form there and back to the bit, an account of it, and what is refused."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from flax import nnx
from golden_data import assert_equal, params, random_model, small_spec
from trained import NAMES, save, tiny_run

import nfflax
from nfflax.train import convert as convert_module
from nfflax.train.convert import convert
from nfflax.train.errors import CheckpointError
from nfflax.train.inference import load_model
from nfflax.weights import hub_folder, to_deepmind, to_timm
from nfflax.weights.haiku_pickle import read_haiku_pickle
from nfflax.weights.safetensors import read_safetensors, write_safetensors

SMALL = {"stages.depth": [1, 2, 1, 1]}


@pytest.fixture(scope="module")
def official(tmp_path_factory) -> tuple[Path, nfflax.NFNet, Path]:
    """A file in DeepMind's format, its network, and the network's spec."""
    folder = tmp_path_factory.mktemp("official")
    model = random_model(small_spec("nfnet_f0", SMALL))
    path, spec = folder / "F_haiku.npz", folder / "spec.json"
    path.write_bytes(pickle.dumps(to_deepmind(model), protocol=4))
    spec.write_text(json.dumps(model.spec.model_dump(mode="json")))
    return path, model, spec


def problems(*args: Any, **options: Any) -> list[str]:
    with pytest.raises(CheckpointError) as caught:
        convert(*args, **options)
    return [problem.message for problem in caught.value.problems]


# There and back


def test_through_every_form_and_back_to_the_bit(official, tmp_path):
    path, model, spec = official
    hub, timm, run = tmp_path / "hub", tmp_path / "timm.safetensors", tmp_path / "run"
    convert(path, hub, spec=str(spec))
    convert(hub, timm)
    arrays, metadata = read_safetensors(timm)
    assert_equal(arrays, to_timm(model))
    assert metadata["format"] == "pt"
    convert(timm, run, to="checkpoint")
    convert(run, tmp_path / "back.npz")
    assert_equal(read_haiku_pickle(tmp_path / "back.npz"), to_deepmind(model))
    with open(tmp_path / "back.npz", "rb") as file:  # what the official code does, with dill
        assert_equal(pickle.load(file), to_deepmind(model))
    loaded = load_model(run)
    assert (loaded.run, loaded.step, loaded.model.spec) == (None, None, model.spec)
    assert_equal(params(loaded.model), params(model))


@pytest.mark.parametrize(
    "preset",
    [
        "timm_nf_regnet_b0",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("timm_dm_nfnet_f0", "timm_eca_nfnet_l0", "timm_nf_seresnet50")
        ),
    ],
)
def test_timm_through_ours_and_back_to_the_bit(preset, tmp_path):
    model = random_model(small_spec(preset, SMALL))
    source, ours, back = (tmp_path / name for name in ("a.safetensors", "ours", "b.safetensors"))
    write_safetensors(source, to_timm(model))
    convert(source, ours, spec=model.spec)
    convert(ours, back)
    assert_equal(read_safetensors(back)[0], to_timm(model))


def test_statistics_of_batch_normalisation_go_along_and_timm_has_no_place_for_them(tmp_path):
    run = tiny_run(model__set__norm__kind="batch")
    stats = nnx.to_pure_dict(nnx.state(random_model(run.spec), nnx.BatchStat))
    average = save(tmp_path / "run", run, stats=stats)
    target = tmp_path / "own.safetensors"
    found = problems(tmp_path / "run", target)
    assert "timm has no such parameter: final_act.norm.scale" in found
    assert not target.exists()
    done = convert(tmp_path / "run", target, to="nfflax")
    loaded = load_model(target)
    assert_equal(params(loaded.model), average)
    assert_equal(nnx.to_pure_dict(nnx.state(loaded.model, nnx.BatchStat)), stats)
    assert loaded.class_names == NAMES
    assert (done.source_format, done.sha256) == ("checkpoint", "")


# The account


def test_it_says_what_became_of_every_array(run, official, tmp_path):
    path, model, spec = official
    target = tmp_path / "small.safetensors"
    changes = ("--num-classes", 3, "--in-channels", 1)
    ran = run("convert", path, target, "--spec", spec, *changes, "--json")
    assert ran.code == 0
    told = json.loads(ran.out)
    written = read_safetensors(target)[0]
    rows = {row["target"]: row for row in told["arrays"]}
    assert rows.keys() == written.keys()
    assert {key: tuple(row["after"]) for key, row in rows.items()} == {
        key: array.shape for key, array in written.items()
    }
    tree = to_deepmind(model)
    assert {row["source"] for row in told["arrays"]} == {
        f"{module}/{name}" for module, arrays in tree.items() for name in arrays
    }
    kernel = rows["stem.conv1.weight"]
    assert (kernel["before"], kernel["after"]) == ([3, 3, 3, 4], [4, 1, 3, 3])
    done = {key: rows[key]["done"] for key in rows}
    assert done["stem.conv1.weight"] == done["stem.conv1.gain"] == "adapted to 1 channels"
    assert done["stem.conv2.weight"] == "transposed"
    assert done["stem.conv2.gain"] == "reshaped"
    assert done["stem.conv2.bias"] == done["stages.1.1.skipinit_gain"] == "kept"
    assert done["head.fc.weight"] == done["head.fc.bias"] == "drawn anew"
    assert told["numbers"] == sum(array.size for array in written.values())
    assert (told["format"], told["to"], told["written"]) == ("deepmind", "timm", True)
    assert len(told["sha256"]) == 64
    assert any("first convolution is adapted" in note for note in told["notes"])
    assert any("timm computes another network" in note for note in told["notes"])
    assert load_model(target).model.spec.stem.in_channels == 1


def test_for_people_and_without_writing(run, official, tmp_path):
    path, _, spec = official
    target = tmp_path / "new"
    ran = run("convert", path, target, "--spec", spec, "--num-classes", 0, "--dry-run")
    assert (ran.code, ran.err) == (0, "")
    assert not list(tmp_path.iterdir())
    lines = ran.out.splitlines()
    assert lines[0].split() == ["deepmind", "nfflax", "shape", "type"]
    (left_out,) = [line for line in lines if "NFNet/~/linear/w" in line]
    assert left_out.split() == ["NFNet/~/linear/w", "-", "32x5", "float32", "left", "out"]
    assert lines[-1].endswith("not written: a dry run")


# What is refused, and what is left after a failure


def test_all_problems_come_at_once(run, tmp_path):
    target = tmp_path / "there.npz"
    target.write_bytes(b"")
    ran = run("convert", tmp_path / "nowhere", target, "--to", "timm")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("error: 3 problems in the checkpoint\n")
    for part in ("--to deepmind", "--overwrite", "There is no such file or folder"):
        assert part in ran.err


@pytest.mark.parametrize(
    ("name", "to", "message"),
    [
        ("a.pth", None, "is a pickle, which runs code when it is loaded"),
        ("a.onnx", None, "use `nfflax export`"),
        ("a.safetensor", None, "has no suffix that is known"),
        ("a.safetensors", "deepmind", "--to deepmind writes an .npz file"),
        ("a.npz", "checkpoint", "--to checkpoint writes a folder"),
        ("a", "deepmind", "is the name of a folder"),
    ],
)
def test_names_that_promise_something_else(tmp_path, name, to, message):
    of_the_name, of_the_source = problems(tmp_path / "nowhere", tmp_path / name, to=to)
    assert message in of_the_name
    assert of_the_source.startswith("There is no such file")


def test_what_is_there_stays_unless_it_may_go(official, tmp_path):
    path, _, spec = official
    target = tmp_path / "net"
    convert(path, target, spec=str(spec))
    before = {file.name: file.read_bytes() for file in target.iterdir()}
    assert "has files in it" in problems("nowhere", target)[0]
    convert(path, target, spec=str(spec), overwrite=True)
    assert {file.name: file.read_bytes() for file in target.iterdir()} == before
    (target / "thesis.tex").write_text("years of work")
    refused = problems("nowhere", target, overwrite=True)[0]
    assert refused.startswith("holds thesis.tex, which is not of a network")
    assert (target / "thesis.tex").exists()


FULL, STOPPED = OSError(28, "No space left on device"), KeyboardInterrupt()


@pytest.mark.parametrize(
    ("target", "to", "owner", "last_call", "error"),
    [
        ("net.npz", "deepmind", convert_module.pickle, "dump", FULL),
        ("net.npz", "deepmind", convert_module.pickle, "dump", STOPPED),
        ("net", "nfflax", hub_folder, "_card", FULL),
        ("net", "checkpoint", convert_module.Checkpoints, "save", STOPPED),
    ],
)
def test_nothing_is_left_half_written(
    official, tmp_path, monkeypatch, target, to, owner, last_call, error
):
    def fail(*_: Any, **__: Any) -> None:
        raise error

    path, _, spec = official
    monkeypatch.setattr(owner, last_call, fail)
    with pytest.raises(KeyboardInterrupt if error is STOPPED else CheckpointError):
        convert(path, tmp_path / target, spec=str(spec), to=to)
    assert not list(tmp_path.iterdir())
