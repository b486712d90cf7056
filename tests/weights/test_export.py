"""A network as a program of JAX's own: it runs without nfflax, and is kept only if it is right."""

import hashlib
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx
from golden_data import haiku_formula_tree, random_model
from jax import export as jax_export
from trained import NAMES, TINY

import nfflax
from nfflax.weights import WeightsError, load_deepmind
from nfflax.weights.export import export
from nfflax.weights.exported import probe

# A transition block and a stack of one, in groups.
SPEC = nfflax.load_spec(
    TINY
    | {
        "stem": {"width": [8], "in_channels": 3, "stride": 4},
        "stages": {"depth": [2], "width": [8], "stride": 2, "group_width": 2},
    }
)
SIDE = 17

# Runs the exported folder where nfflax and flax cannot be imported.
ELSEWHERE = """
import sys
for name in ("nfflax", "flax", "optax", "orbax"):
    sys.modules[name] = None
sys.path.insert(0, sys.argv[1])
import numpy as np
from run import run
images = np.load(sys.argv[2])
np.savez(sys.argv[3], **{str(n): run(images[:n]) for n in (1, 7)})
"""


@pytest.fixture(scope="module")
def model():
    return random_model(SPEC)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """An export for all platforms, with a batch of any size."""
    place = tmp_path_factory.mktemp("exports") / "net"
    written = export(model, place, resolution=SIDE, class_names=NAMES)
    assert written.difference < 1e-5
    assert (written.path, written.platforms) == (place, ("cpu", "cuda", "tpu"))
    assert written.shape == ("batch", SIDE, SIDE, 3)
    assert written.bytes == sum(file.stat().st_size for file in place.iterdir())
    return place


def assert_alike(found, wanted):
    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_it_runs_where_there_is_no_nfflax(model, folder, tmp_path):
    expected = probe(model, SIDE, 7)
    assert np.ptp(expected.logits_NC, axis=0).min() > 0  # images make a difference
    np.save(tmp_path / "images.npy", expected.images_NHWC)
    script, images, out = tmp_path / "elsewhere.py", tmp_path / "images.npy", tmp_path / "out.npz"
    script.write_text(ELSEWHERE)
    subprocess.run([sys.executable, script, folder, images, out], check=True, timeout=300)
    with np.load(out) as found:
        for count in (1, 7):
            assert_alike(found[str(count)], expected.logits_NC[:count])


def test_every_platform_has_its_own_lowering(folder):
    program = jax_export.deserialize(bytearray((folder / "program.bin").read_bytes()))
    assert program.platforms == ("cpu", "cuda", "tpu")
    assert program.nr_devices == 1
    # Grouped convolutions as such for CUDA and TPU, dense ones for CPU, chosen when it is compiled.
    text = program.mlir_module()
    assert "feature_group_count = 2" in text
    assert "feature_group_count = 1" in text
    assert "stablehlo.case" in text


def test_the_metadata_says_all_that_a_user_needs(model, folder):
    about = json.loads((folder / "metadata.json").read_text("utf-8"))
    assert (about["format"], about["format_version"]) == ("nfflax-stablehlo", 1)
    assert (about["nfflax"], about["jax"]) == (nfflax.__version__, jax.__version__)
    assert about["input"]["shape"] == ["batch", SIDE, SIDE, 3]
    assert (about["input"]["dtype"], about["input"]["layout"]) == ("uint8", "NHWC")
    assert about["output"] == {"name": "logits", "shape": ["batch", 10], "dtype": "float32"}
    assert about["class_names"] == list(NAMES)
    assert nfflax.load_spec(about["spec"]) == model.spec
    for name, digest in about["sha256"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    how = about["preprocess"]
    assert (how["mean"], how["std"], how["resolution"]) == ([0.5], [0.5], SIDE)
    assert how["steps"][1].startswith(f"Resize to {SIDE + 32} x {SIDE + 32} pixels")


def test_a_program_that_is_not_the_network_is_not_kept(model, tmp_path, monkeypatch):
    def wrong(model):
        folded = nfflax.fold(model)
        folded.classifier.bias[...] += 0.01 * np.abs(probe(model, SIDE, 2).logits_NC).max()
        return folded

    monkeypatch.setattr("nfflax.weights.export.fold", wrong)
    with pytest.raises(WeightsError, match=r"0\.01 of the largest logit away from the network"):
        export(model, tmp_path / "net", platforms=("cpu",), resolution=SIDE)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("platforms", "message"),
    [
        (("cpu", "gpu"), "Did you mean cuda"),
        (("cpu", "tpuu"), "Did you mean tpu"),
        (("cuda",), "cpu must be among them"),
        (("cpu", "cpu"), "named twice"),
    ],
)
def test_platforms_that_are_none(model, tmp_path, platforms, message):
    with pytest.raises(WeightsError, match=message):
        export(model, tmp_path / "net", platforms=platforms)
    assert not list(tmp_path.iterdir())


def test_what_does_not_fit_the_network(model, tmp_path):
    with pytest.raises(WeightsError) as error:
        export(model, tmp_path / "net", resolution=0, class_names=NAMES[:3])
    assert len(error.value.problems) == 2
    assert "3 class names for 10 classes" in str(error.value)


def test_only_an_earlier_export_is_replaced(model, folder, tmp_path):
    with pytest.raises(WeightsError, match="has files in it"):
        export(model, folder)
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(WeightsError, match="no earlier export"):
        export(model, tmp_path, overwrite=True)
    assert (tmp_path / "thesis.tex").exists()


def test_a_missing_package_is_named(model, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(WeightsError, match=r'flatbuffers.*pip install "nfflax\[export\]"'):
        export(model, tmp_path / "net")


@pytest.mark.slow
def test_bfloat16_a_fixed_batch_and_inputs_that_are_normalised_already(tmp_path):
    """bfloat16 weights take half the place, in a file of a format that does not know them."""
    small = nfflax.build(SPEC, rngs=nnx.Rngs(0), dtype="bfloat16")
    how = {"platforms": ("cpu",), "resolution": SIDE, "batch": 2, "pixels": False}
    written = export(small, tmp_path / "net", **how)
    assert written.shape == (2, SIDE, SIDE, 3)
    with np.load(tmp_path / "net" / "weights.npz") as arrays:
        kernels = [array for array in arrays.values() if array.ndim >= 4]
        assert {array.dtype for array in kernels} == {np.dtype(np.uint16)}
    again = export(small, tmp_path / "net", overwrite=True, **how)
    assert again.difference == written.difference


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["nfnet_f0", "nf_resnet50"])
def test_full_networks(preset, tmp_path):
    model = nfflax.build(preset, rngs=nnx.Rngs(0))
    load_deepmind(model, haiku_formula_tree(model))
    written = export(model, tmp_path / "net", resolution=64)
    assert written.difference < 1e-5
