"""`nfflax eval`: the numbers of a trained network, from its folder alone."""

import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import jax
import numpy as np
import pytest
from flax import nnx
from golden_data import random_model
from trained import TINY, save, tiny_run

import nfflax
from nfflax.cli.eval import _label_notes
from nfflax.data.sources import open_source
from nfflax.train.inference import load_model
from nfflax.weights import to_deepmind
from nfflax.weights.published import imagenet_classes


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run's folder with one checkpoint."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    save(folder, tiny_run())
    return folder


def test_the_numbers_are_those_of_its_network_on_its_images(run, trained):
    found = json.loads(run("eval", trained, "--json").out)
    loaded = load_model(str(trained))
    source = open_source(tiny_run().data, "test")
    images_NHWC = np.stack([loaded.view(source[i].image) for i in range(360)])
    labels = np.array([source[i].label for i in range(360)])
    graph, state = nnx.split(loaded.model)
    forward = jax.jit(lambda state, x_NHWC: nnx.merge(graph, state)(x_NHWC))
    logits = np.asarray(forward(state, (images_NHWC / 255 - 0.5) / 0.5), np.float64)
    own = logits[np.arange(360), labels]
    ranks = (logits > own[:, None]).sum(-1)
    assert found["top1"] == (ranks < 1).mean()
    assert found["top5"] == (ranks < 5).mean()
    loss = np.log(np.exp(logits).sum(-1)) - own
    np.testing.assert_allclose(found["loss"], loss.mean(), rtol=1e-5)
    assert (found["step"], found["images"], found["skipped"]) == (3, 360, 0)
    assert found["notes"] == ["class 0 is '0' in digits, and was 'zero' in training"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--set", "train.epochs=3"], "--set: train.epochs = 3\n    says nothing about evaluation"),
        (["--set", "data.eval=tset"], "did you mean: test"),
        (["--set", "model.set.head.num_classes=5"], "head.num_classes = 5\n    is 10 in "),
        (["--set", "model.set.block.alpha=0.3"], "block.alpha = 0.3\n    is 0.2 in "),
        (["--spec", "nfnet_f0"], "is another network than the one in "),
        (["--resolution", "0"], "'0' is no whole number from 1"),
    ],
)
def test_mistakes_end_with_code_2(run, trained, options, said):
    ran = run("eval", trained, *options)
    assert (ran.code, ran.out) == (2, "")
    assert said in ran.err


def test_folders_called_by_the_synset_are_the_published_classes():
    names = imagenet_classes()
    source = SimpleNamespace(class_names=[name.split()[0] for name in names])
    run = tiny_run(model__set__head__num_classes=1000)
    assert _label_notes(run, cast(Any, source), names) == []
    source.class_names[7] = "n00000000"
    (note,) = _label_notes(run, cast(Any, source), names)
    assert "class 7 is 'n00000000'" in note


def test_more_classes_than_the_network_tells_apart(run, tmp_path):
    save(tmp_path, tiny_run(model__set__head__num_classes=5))
    ran = run("eval", tmp_path)
    assert (ran.code, ran.out) == (2, "")
    assert "has 10 classes, and the network tells 5 apart" in ran.err


def test_a_file_of_weights_on_other_images_as_a_table(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # short names: a table folds long ones
    changes = {"stem.in_channels": 3, "stem.width": [4, 8], "stem.stride": 1}
    spec, path, toy = map(Path, ("net.json", "net_haiku.npz", "toy"))
    network = nfflax.load_spec(TINY, changes | {"attention.kind": "se"})
    spec.write_text(network.model_dump_json())
    path.write_bytes(pickle.dumps(to_deepmind(random_model(network)), protocol=4))
    ran = run("eval", path, "--spec", spec)
    assert (ran.code, ran.out) == (2, "")
    assert "allowed: --set data.source=FOLDER" in ran.err

    run("data", "generate", toy, "--classes", 3, "--train", 3, "--test", 9)
    settings = [f"data.source={toy}", "eval.batch_size=5"]  # 8 devices get 8 images
    options = [word for setting in settings for word in ("--set", setting)]
    ran = run("eval", path, "--spec", spec, "--resolution", 12, *options)
    assert (ran.code, ran.err) == (0, "")
    title, _, header, _, row = ran.out.splitlines()
    assert title == f"{path}  tiny at 12 px, float32"
    assert header.split() == ["data", "images", "loss", "top-1", "top-5"]
    assert row.split()[:3] == [str(toy), "(test)", "9"]
