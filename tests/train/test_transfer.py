"""Starting from weights, and a trained network in one line: what comes out, and what is refused."""

import json
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from golden_data import assert_equal, params, random_model
from PIL import Image
from trained import NAMES, TINY, save, tiny_run, words

import nfflax
from nfflax.cli import main
from nfflax.optim.roles import leaves_by_path
from nfflax.spec.execution import Mesh
from nfflax.spec.files import Origin
from nfflax.train.errors import CheckpointError
from nfflax.train.history import METRICS, read_history
from nfflax.train.inference import load_model, predictions
from nfflax.train.mesh import make_mesh
from nfflax.train.program import make_program
from nfflax.train.state import shardings_of
from nfflax.train.transfer import Pretrained, open_weights, require_same, with_weights
from nfflax.weights import foreign, to_deepmind, to_timm
from nfflax.weights.adapt import with_channels
from nfflax.weights.safetensors import write_safetensors

RGB = [0.4, 0.5, 0.6]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[str, dict[Any, Any]]:
    """A run's folder with one checkpoint, and the average in it."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    return str(folder), save(folder, tiny_run())


@pytest.fixture
def refused(trained):
    """The problems of a run that cannot start from the trained weights."""

    def problems(**changes: Any) -> dict[str, Any]:
        run = tiny_run(name="next", **changes)
        program = make_program(run, make_mesh(run.mesh))
        with pytest.raises(CheckpointError) as caught:
            with_weights({}, program)
        return {problem.key or problem.file: problem for problem in caught.value.problems}

    return problems


@pytest.fixture
def released(tmp_path):
    """A file in DeepMind's format with random weights, and those weights."""
    spec = nfflax.load_spec(TINY, {"stem.in_channels": 3, "stem.width": [4, 8], "stem.stride": 1})
    spec = nfflax.load_spec(spec, {"attention.kind": "se", "head.num_classes": 7})
    model = random_model(spec)
    path = tmp_path / "tiny_haiku.npz"
    path.write_bytes(pickle.dumps(to_deepmind(model), protocol=4))
    return str(path), spec, params(model)


# Starting from weights


@pytest.fixture(scope="module")
def fine_tuned(trained):
    """A state on 2 x 2 x 2 devices, for other classes and another resolution, and what made it."""
    folder, _ = trained
    changes = {"model__set__head__num_classes": 12, "model__set__resolution__train": 24}
    run = tiny_run(model__weights=folder, mesh__fsdp=2, mesh__tensor=2, **changes)
    mesh = make_mesh(run.mesh)
    program = make_program(run, mesh)
    sevens = lambda leaf: jax.device_put(np.full(leaf.shape, 7, leaf.dtype), leaf.sharding)  # noqa: E731
    fresh = jax.tree.map(sevens, program.abstract)
    with jax.set_mesh(mesh):
        return fresh, *with_weights(fresh, program), program


def test_the_average_becomes_parameters_and_average(trained, fine_tuned):
    _, state, _, _ = fine_tuned
    for part in ("params", "ema"):
        found = {key: value for key, value in state[part].items() if key != "classifier"}
        assert_equal(found, {key: trained[1][key] for key in found})


def test_a_classifier_for_other_classes_starts_anew_and_so_does_all_else(fine_tuned):
    fresh, state, notes, _ = fine_tuned
    assert state["params"]["classifier"]["kernel"].shape == (32, 12)
    for part in ("params", "ema"):
        assert_equal(state[part]["classifier"], fresh["params"]["classifier"])
    assert_equal(state["opt"], fresh["opt"])
    assert state["step"] == fresh["step"]
    assert "the classifier starts anew: 10 classes before, 12 now" in notes


def test_everything_lies_where_the_train_step_wants_it(fine_tuned):
    _, state, _, program = fine_tuned
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == shardings_of(program.abstract)
    kernel = state["params"]["stages"][0]["rest"]["conv0"]["kernel"]
    assert kernel.addressable_shards[0].data.size < kernel.size


def test_no_memory_is_shared_between_parameters_and_average(fine_tuned):
    _, state, _, _ = fine_tuned
    for raw, average in zip(*(jax.tree.leaves(state[k]) for k in ("params", "ema")), strict=True):
        pointers = [x.addressable_shards[0].data.unsafe_buffer_pointer() for x in (raw, average)]
        assert pointers[0] != pointers[1]


def test_another_network_is_refused_with_all_differences(trained, refused):
    folder, _ = trained
    problems = refused(
        model__weights=folder,
        model__set__stages__depth=[3],
        model__set__numerics__activation="relu",
        model__set__head__dropout=0.5,
    )
    assert set(problems) == {
        "model.spec",
        "model.set.stages.depth",
        "model.set.numerics.activation",
    }
    assert problems["model.spec"].nearest == f"{folder}/spec.json"
    assert "they differ in 2 keys" in problems["model.spec"].message
    depth = problems["model.set.stages.depth"]
    assert (depth.value, depth.message) == ([3], f"is [2] in {folder}")


def test_what_a_mean_is_subtracted_from_matters_and_how_an_image_is_cut_does_not(trained, refused):
    changes = {"model__set__preprocess__mean": 0.4, "model__set__preprocess__crop": "center"}
    assert set(refused(model__weights=trained[0], **changes)) == {
        "model.spec",
        "model.set.preprocess.mean",
    }


def test_a_path_that_is_not_there_suggests_a_run(trained, refused, monkeypatch):
    folder = Path(trained[0])
    monkeypatch.chdir(folder.parent)
    for name in ("frist", "x" * 1000, "no\0where"):
        (problem,) = refused(model__weights=name).values()
        assert problem.message.startswith("There is no such file or folder.")
        assert problem.nearest == ("first" if name == "frist" else "")
    Path("runs").mkdir()
    try:
        shutil.copytree(folder, "runs/second")
        (problem,) = refused(model__weights="second").values()
        assert problem.nearest == "runs/second"
    finally:
        shutil.rmtree("runs")


def test_a_folder_without_checkpoints(refused, tmp_path):
    (problem,) = refused(model__weights=str(tmp_path)).values()
    assert "holds no checkpoint" in problem.message


@pytest.mark.slow
def test_train_evaluate_and_fine_tune_each_in_one_command(tmp_path, capsys):
    """From 8 devices in a row to 2 x 2 x 2, to more classes and larger images."""
    spec, first, second = tmp_path / "tiny.json", tmp_path / "first", tmp_path / "second"
    spec.write_text(json.dumps(TINY))

    def train(workdir: Path, *changes: str) -> int:
        return main(["train", "digits", "--workdir", str(workdir), *words(*changes)])

    assert train(first, f"model.spec={spec}") == 0
    last = read_history(first / METRICS)[-1]
    capsys.readouterr()
    assert main(["eval", str(first), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["step"], last["step"]) == (3, 3)
    for key in ("loss", "top1", "top5"):  # to the bit
        assert found[key] == last[f"ema/{key}"]

    changes = ["head.num_classes=12", "resolution.train=24", "resolution.test=32"]
    changes = [f"model.spec={first}/spec.json", *(f"model.set.{change}" for change in changes)]
    assert train(second, f"model.weights={first}", "mesh.fsdp=2", "mesh.tensor=2", *changes) == 0
    assert "the classifier starts anew: 10 classes before, 12 now" in capsys.readouterr().err
    loaded = load_model(str(second))
    assert loaded.model.spec.head.num_classes == 12
    assert (loaded.step, loaded.view.resolution) == (3, 32)
    # Three steps at a small rate later, the weights are still those that it started from.
    before, after = (params(load_model(str(folder)).model) for folder in (first, second))
    distance = np.abs(before["stem"]["convs"][0]["kernel"] - after["stem"]["convs"][0]["kernel"])
    assert 0 < distance.max() < 0.05


# Starting from weights of timm's, on images of other channels


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A state on 2 x 2 x 2 devices from a file for RGB, for grey images; the file's network."""
    path = tmp_path_factory.mktemp("weights") / "rgb.safetensors"
    model = random_model(nfflax.load_spec(TINY, {"stem.in_channels": 3, "preprocess.mean": RGB}))
    write_safetensors(path, to_timm(model))
    run = tiny_run(model__weights=str(path), mesh__fsdp=2, mesh__tensor=2)
    mesh = make_mesh(run.mesh)
    program = make_program(run, mesh)
    with jax.set_mesh(mesh):
        return *with_weights(program.abstract, program), program, model


def test_the_first_convolution_is_adapted_where_the_train_step_wants_it(adapted):
    state, notes, program, model = adapted
    before = leaves_by_path(params(model))
    wanted = with_channels(before, model.spec, 1)
    for part in ("params", "ema"):
        found = leaves_by_path(state[part])
        assert found.keys() == wanted.keys()
        for path, leaf in found.items():
            np.testing.assert_array_equal(leaf, wanted[path])
        shardings = leaves_by_path(shardings_of(program.abstract[part]))
        assert {path: leaf.sharding for path, leaf in found.items()} == shardings
    assert any("3 channels before, 1 now" in note for note in notes)


def test_evaluation_adapts_nothing(adapted):
    *_, model = adapted
    grey = nfflax.load_spec(model.spec, {"stem.in_channels": 1, "preprocess.mean": 0.5})
    found = Pretrained("rgb", model.spec, "", lambda _: {})
    require_same(found, grey, Origin("a run"))
    with pytest.raises(CheckpointError) as caught:
        require_same(found, grey, Origin("a run"), same_classes=True)
    keys = {problem.key for problem in caught.value.problems}
    assert keys == {"", "stem.in_channels", "preprocess.mean"}


# A trained network in one line


def test_a_run_and_its_checkpoint_are_the_same_network(trained):
    folder, average = trained
    for path in (folder, f"{folder}/checkpoints/3"):
        loaded = load_model(path)
        assert_equal(params(loaded.model), average)
        assert (loaded.step, loaded.class_names) == (3, NAMES)
        assert loaded.run == tiny_run()
        assert loaded.model.deterministic


def test_how_it_is_built_is_free(trained):
    model = load_model(trained[0], dtype="bfloat16", remat="block").model
    assert model.dtype == np.dtype("bfloat16")


def test_a_damaged_checkpoint_is_passed_over_and_said(tmp_path):
    save(tmp_path, tiny_run(), steps=(1, 2))
    shutil.rmtree(tmp_path / "checkpoints" / "2" / "params")
    found = open_weights(str(tmp_path))
    assert found.step == 1
    (note,) = found.notes
    assert note.startswith("the checkpoint of step 2 is damaged (")


def test_statistics_of_batch_normalisation_come_along(tmp_path):
    run = tiny_run(model__set__norm__kind="batch")
    model = random_model(run.spec)
    stats = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    save(tmp_path, run, stats=stats)
    found = load_model(str(tmp_path)).model
    assert jax.tree.leaves(stats)
    assert_equal(nnx.to_pure_dict(nnx.state(found, nnx.BatchStat)), stats)


def test_predictions_are_the_softmax_of_normalised_images(trained):
    loaded = load_model(trained[0], dtype="float32")
    images_NHWC = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 1), np.uint8)
    graph, state = nnx.split(loaded.model)
    forward = jax.jit(lambda state, x_NHWC: nnx.merge(graph, state)(x_NHWC))
    logits = np.asarray(forward(state, (images_NHWC / 255 - 0.5) / 0.5), np.float64)
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    found = predictions(loaded.model, images_NHWC, top=3, batch_size=32)
    order = np.argsort(-shares, axis=-1)[:, :3]
    np.testing.assert_array_equal(found.classes, order)
    wanted = np.take_along_axis(shares, order, -1)
    np.testing.assert_allclose(found.probabilities, wanted, rtol=1e-4)
    empty = predictions(loaded.model, images_NHWC[:0], top=99)
    assert empty.classes.shape == empty.probabilities.shape == (0, 10)


def test_a_network_without_classifier_predicts_nothing():
    model = random_model(nfflax.load_spec(TINY, {"head.num_classes": 0}))
    with pytest.raises(CheckpointError, match="has no classifier"):
        predictions(model, np.zeros((1, 16, 16, 1), np.uint8))


# Files in DeepMind's format


def test_a_file_of_another_network_needs_its_spec(released):
    path, spec, values = released
    with pytest.raises(CheckpointError, match="as none of the presets that it could be of does"):
        load_model(path)
    loaded = load_model(path, spec=nfflax.load_spec(spec, {"head.num_classes": 1000}))
    assert_equal(params(loaded.model), values)
    assert (loaded.run, loaded.step, loaded.class_names) == (None, None, ())
    assert loaded.model.spec.head.num_classes == 7


def test_a_released_file_is_known_by_its_number_of_weights(released, monkeypatch, tmp_path):
    """nfnet_f0 to f6 are told apart by it; here a small file stands in for theirs."""
    released_names = nfflax.list_specs("nfnet_f?")
    assert len({nfflax.plan(name).params for name in released_names}) == len(released_names) == 8
    path, spec, values = released
    monkeypatch.setattr(foreign, "list_specs", lambda _: [spec])
    assert_equal(params(load_model(path).model), values)
    relu = nfflax.load_spec(spec, {"numerics.activation": "relu"})
    with pytest.raises(
        CheckpointError, match=r'activation = "relu"\n    is "gelu" in .*tiny_haiku'
    ):
        load_model(path, spec=relu)


def test_a_released_file_onto_a_mesh(released):
    path, spec, values = released
    arrays, _ = open_weights(path, spec).arrays(make_mesh(Mesh(fsdp=2, tensor=2)))
    assert_equal(arrays, values)
    kernel = arrays["stages"][0]["rest"]["conv0"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 4


def test_a_file_that_does_not_fit_or_is_none(released, tmp_path):
    path, spec, _ = released
    with pytest.raises(CheckpointError, match=r"missing: .*nf_block_2"):
        load_model(path, spec=nfflax.load_spec(spec, {"stages.depth": [3]}))
    other = tmp_path / "notes.txt"
    other.write_text("hello")
    with pytest.raises(CheckpointError, match=r"notes\.txt"):
        load_model(str(other))


# The page about it


@pytest.fixture
def page(tmp_path, monkeypatch):
    """The page's text, and a working directory with the run that it speaks of."""
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    save(Path("runs/digits"), tiny_run())
    return (Path(__file__).parents[2] / "docs" / "finetuning.md").read_text("utf-8")


def test_its_run_starts_from_that_run(page):
    (text,) = re.findall(r"^```toml run\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    Path("my_run.toml").write_text(text)
    run = nfflax.load_run("my_run.toml")
    found = open_weights(run.model.weights, run.spec)
    assert (found.spec.head.num_classes, run.spec.head.num_classes) == (10, 12)


def test_its_python_runs(page):
    text = "\n".join(re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE))
    Image.fromarray(np.zeros((20, 20), np.uint8)).save("black.png")
    names: dict[str, Any] = {"np": np, "paths": [Path("black.png")]}
    exec(text, names)
    assert set(names["names"]) <= set(NAMES)
    assert 0.1 <= names["shares"][0] <= 1
    assert names["model"].spec.resolution.test == 64
