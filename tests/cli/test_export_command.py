"""`nfflax export`: both formats from a run's folder, and everything that stands against it."""

import json
from pathlib import Path

import onnx
import pytest
from trained import NAMES, save, tiny_run


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run's folder with one checkpoint."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    save(folder, tiny_run())
    return folder


def test_a_program_in_a_folder_as_json(run, trained, tmp_path):
    place = tmp_path / "net"
    ran = run("export", trained, place, "--platforms", "cpu,tpu", "--resolution", 17, "--json")
    assert (ran.code, ran.err) == (0, "")
    about = json.loads(ran.out)
    assert about["difference"] < 1e-5
    assert (about["format"], about["platforms"]) == ("stablehlo", ["cpu", "tpu"])
    assert (about["path"], about["input_shape"]) == (str(place), ["batch", 17, 17, 1])
    assert about["bytes"] == sum(file.stat().st_size for file in place.iterdir())
    inside = json.loads((place / "metadata.json").read_text("utf-8"))
    assert (inside["class_names"], inside["output"]["shape"]) == (list(NAMES), ["batch", 10])


def test_onnx_by_its_suffix_for_people(run, trained, tmp_path):
    place = tmp_path / "net.onnx"
    ran = run("export", trained, place, "--resolution", 17, "--batch", 2)
    assert (ran.code, ran.err) == (0, "")
    lines = dict(line.split(maxsplit=1) for line in ran.out.splitlines()[1:])
    assert ran.out.splitlines()[0] == str(place)
    assert lines["input"].strip() == "2 x 1 x 17 x 17"
    assert lines["program"].startswith("ONNX, ")
    assert "of the largest logit away from the network" in lines["checked"]
    props = {entry.key: entry.value for entry in onnx.load(place).metadata_props}
    assert json.loads(props["class_names"]) == list(NAMES)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["net", "--platforms", "cpu,gpu"], "Did you mean cuda?"),
        (["net.onnx", "--platforms", "cpu"], "says nothing about ONNX"),
        (["net.onnx", "--dtype", "bfloat16"], "computes in bfloat16"),
        (["taken"], "has files in it"),
        (["taken", "--overwrite"], "is no earlier export"),
        (["taken", "--format", "onnx"], "is a folder"),
        (["net", "--format", "onx"], "did you mean onnx?"),
        (["net", "--batch", "0"], "no whole number from 1"),
    ],
)
def test_what_cannot_be_done(run, trained, tmp_path, words, message):
    """One clear error, exit code 2, and nothing written."""
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    ran = run("export", trained, tmp_path / words[0], *words[1:])
    assert (ran.code, ran.out) == (2, "")
    assert message in ran.err
    assert [file.name for file in tmp_path.rglob("*")] == ["taken", "notes.txt"]


def test_a_missing_package_is_named_before_anything_is_loaded(run, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    ran = run("export", "nowhere", tmp_path / "net.onnx")
    assert ran.code == 2
    assert 'pip install "nfflax[onnx]"' in ran.err
