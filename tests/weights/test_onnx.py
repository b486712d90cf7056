"""A network as an ONNX file: every operator against JAX, and whole networks in ONNX Runtime."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest
from flax import nnx
from golden_data import params, random_model, small_spec
from trained import NAMES, TINY

import nfflax
from nfflax.nn.activations import get_activation, register_activation
from nfflax.spec.activations import PUBLISHED_GAMMAS, QUADRATURE_GAMMAS
from nfflax.weights import WeightsError
from nfflax.weights.exported import probe
from nfflax.weights.onnx_file import export_onnx
from nfflax.weights.onnx_graph import ACTIVATIONS, OPSET, Graph

SPEC = nfflax.load_spec(
    TINY
    | {
        "stages": {"depth": [2], "width": [8], "stride": 2, "group_width": 2},
        "attention": {"kind": "se"},
    }
)
SIDE = 17  # odd: windows that hang over the edge


def runtime(path):
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def alive(spec, **how):
    """A network in which nothing is zero, one or otherwise easy, BatchNorm's statistics included.

    Its signals have about unit size, so that no logit is the difference of huge numbers.
    """
    graph, state = nnx.split(nfflax.build(spec, rngs=nnx.Rngs(0), **how))
    rng = np.random.default_rng(0)
    changed = jax.tree.map(
        lambda leaf: (
            np.float32(np.abs(leaf * rng.uniform(0.5, 1.5, leaf.shape) + 0.3))
            if leaf.ndim < 3
            else np.asarray(leaf)
        ),
        state,
    )
    return nnx.merge(graph, changed)


@pytest.fixture(scope="module")
def model():
    return random_model(SPEC)


@pytest.fixture(scope="module")
def file(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("exports") / "net.onnx"
    written = export_onnx(model, path, resolution=SIDE, class_names=NAMES)
    assert written.difference < 1e-5
    assert written.shape == ("batch", 1, SIDE, SIDE)
    assert written.bytes == path.stat().st_size
    assert [other.name for other in path.parent.iterdir()] == ["net.onnx"]
    return path


def test_every_activation_is_what_jax_makes_of_it(tmp_path):
    assert set(ACTIVATIONS) == PUBLISHED_GAMMAS.keys() | QUADRATURE_GAMMAS.keys()
    x_NC11 = np.linspace(-9, 9, 48, dtype=np.float32).reshape(2, 24, 1, 1)
    graph = Graph()
    each = [emit(graph, "x", name) for name, emit in ACTIVATIONS.items()]
    joined = graph.add("Concat", *each, at="all", axis=1)
    shape = ("batch", 24 * len(each), 1, 1)
    model = graph.model(("x", ("batch", 24, 1, 1)), ("y", joined, shape), {})
    onnx.checker.check_model(model, full_check=True)
    onnx.save_model(model, tmp_path / "all.onnx")
    found = np.asarray(runtime(tmp_path / "all.onnx").run(None, {"x": x_NC11})[0])

    @jax.jit
    def wanted(x_NC):  # log_softmax goes over the channels, which are last in nfflax
        return jnp.concatenate([get_activation(name).function(x_NC) for name in ACTIVATIONS], 1)

    np.testing.assert_allclose(found[:, :, 0, 0], wanted(x_NC11[:, :, 0, 0]), 2e-6, 1e-6)


def test_any_batch_runs(model, file):
    session = runtime(file)
    expected = probe(model, SIDE, 2)
    x_NCHW = expected.inputs_NHWC.transpose(0, 3, 1, 2)
    for count, images in ((1, x_NCHW[:1]), (3, x_NCHW[[0, 1, 0]])):
        (found,) = session.run(["logits"], {"input": images})
        wanted = expected.logits_NC[[0, 1, 0]][:count]
        assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_the_file_says_all_that_a_user_needs(model, file):
    read = onnx.load(file)
    assert [(opset.domain, opset.version) for opset in read.opset_import] == [("", OPSET)]
    about = {entry.key: entry.value for entry in read.metadata_props}
    assert (about["network"], about["nfflax"]) == (SPEC.name, nfflax.__version__)
    assert json.loads(about["class_names"]) == list(NAMES)
    assert json.loads(about["preprocess"])["mean"] == [0.5]
    assert nfflax.load_spec(json.loads(about["spec"])) == model.spec
    names = {array.name for array in read.graph.initializer}
    assert {"stages.0.blocks.1.conv1.kernel", "classifier.bias"} <= names


def test_more_than_one_file_can_hold(model, tmp_path, monkeypatch):
    """Arrays go into a second file, which goes when it is no longer needed."""
    monkeypatch.setattr("nfflax.weights.onnx_file.LARGEST_FILE", 0)
    path = tmp_path / "net.onnx"
    export_onnx(model, path, resolution=SIDE)
    assert {file.name for file in tmp_path.iterdir()} == {"net.onnx", "net.onnx.data"}
    monkeypatch.undo()
    export_onnx(model, path, resolution=SIDE, overwrite=True)
    assert [file.name for file in tmp_path.iterdir()] == ["net.onnx"]


def test_a_file_that_is_not_the_network_is_not_kept(model, tmp_path, monkeypatch):
    monkeypatch.setattr("nfflax.weights.onnx_file._run", lambda *_: np.full((2, 10), np.nan))
    with pytest.raises(WeightsError, match="away from the network"):
        export_onnx(model, tmp_path / "net.onnx", resolution=SIDE)
    assert not list(tmp_path.iterdir())


def test_what_onnx_cannot_hold(tmp_path):
    register_activation("my_sine", jnp.sin)
    spec = nfflax.load_spec(TINY, {"numerics.activation": "my_sine"})

    def model():
        return nfflax.NFNet(nfflax.plan(spec), dtype="bfloat16", rngs=nnx.Rngs(0))

    with pytest.raises(WeightsError, match="my_sine") as error:
        export_onnx(nnx.eval_shape(model), tmp_path / "net.onnx")
    assert len(error.value.problems) == 2
    assert "computes in bfloat16" in str(error.value)
    assert not list(tmp_path.iterdir())


def test_places_that_are_taken(model, file):
    with pytest.raises(WeightsError, match="The file exists"):
        export_onnx(model, file)
    with pytest.raises(WeightsError, match="It is a folder"):
        export_onnx(model, file.parent, overwrite=True)


def test_missing_packages_are_named(model, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(WeightsError, match=r'onnx and onnxruntime: pip install "nfflax\[onnx\]"'):
        export_onnx(model, tmp_path / "net.onnx")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "changes", "how"),
    [
        ("nfnet_f0", {}, {}),
        ("nfnet_f0", {"stem.in_channels": 1, "preprocess.mean": 0.5, "preprocess.std": 0.5}, {}),
        ("nfnet_f0", {"head.num_classes": 0, "head.pool": "max"}, {}),
        ("nfnet_f0", {"attention.position": "inside"}, {}),
        ("nfnet_f0", {}, {"output_stride": 8}),
        ("nf_resnet50", {}, {}),
        ("nf_seresnet50", {}, {}),
        ("nf_regnet_b0", {}, {}),
        ("resnet50_bn", {}, {}),
        ("timm_nfnet_l0", {}, {}),
        ("timm_nfnet_l0", {}, {"output_stride": 16}),
        ("timm_eca_nfnet_l0", {}, {}),
        ("timm_nf_regnet_b0", {}, {}),
        ("timm_nf_resnet50", {}, {}),
    ],
)
def test_every_family(preset, changes, how, tmp_path):
    model = alive(small_spec(preset, changes), **how)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(params(model)))
    written = export_onnx(model, tmp_path / "net.onnx", resolution=37)
    assert written.difference < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["nfnet_f0", "timm_nfnet_l0", "nf_resnet50", "nf_regnet_b0"])
def test_full_networks(preset, tmp_path):
    written = export_onnx(alive(preset), tmp_path / "net.onnx")
    assert written.difference < 1e-4
