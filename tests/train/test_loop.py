"""The loop: a stopped and resumed run is the uninterrupted one, to the bit; all counts once."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

import nfflax
from nfflax.optim import DivergedError
from nfflax.train.checkpoint import Checkpoints, load_weights
from nfflax.train.evaluate import evaluate
from nfflax.train.history import History, read_history
from nfflax.train.loop import train
from nfflax.train.mesh import make_mesh
from nfflax.train.program import make_program
from nfflax.train.stopping import PREEMPTED

# Every kind of thing that a resumed run must take up again: clipping and momentum, an average,
# mixing, dropout, stochastic depth, an epoch that ends inside a batch.
NETWORK: dict[str, Any] = {
    "extends": "nfnet",
    "name": "tiny",
    "stem": {"width": [16], "stride": 1},
    "stages": {"depth": [3], "width": [32], "stride": [1], "group_width": 8},
    "head": {"num_classes": 10, "dropout": 0.2},
    "regularization": {"stochastic_depth": 0.2},
    "resolution": {"train": 8, "test": 8},
}
RUN = {
    "name": "tiny",
    "model": {"spec": NETWORK, "dtype": "float32"},
    "train": {"batch_size": 16, "steps": 7, "examples": 60},
    "data": {"source": "digits", "flip": False, "workers": 1},
    "augment": {"layers": 0},
    "schedule": {"warmup_steps": 2, "learning_rate": 2.0},
    "agc": {"clipping": 0.1},
    "ema": {"decay": 0.9},
    "eval": {"every_steps": 0, "every_epochs": 0, "batch_size": 104},
    "checkpoint": {"every_steps": 3, "keep": 10},
    "log": {"every": 1},
}


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """The runs below share their programs."""
    keys = ("jax_enable_compilation_cache", "jax_compilation_cache_dir")
    keys += ("jax_persistent_cache_min_compile_time_secs",)
    before = {key: getattr(jax.config, key) for key in keys}
    values = (True, str(tmp_path_factory.mktemp("xla")), 0.0)
    for key, value in zip(keys, values, strict=True):
        jax.config.update(key, value)
    compilation_cache.reset_cache()
    yield
    for key, value in before.items():
        jax.config.update(key, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def run():
    return nfflax.load_run(RUN)


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """The folder of an uninterrupted run, and its result."""
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, train(run, workdir)


def state_at(run, workdir: Path, step: int) -> Any:
    abstract = make_program(run, make_mesh(run.mesh)).abstract
    with Checkpoints(workdir, keep=10, keep_best=1) as checkpoints:
        restored = checkpoints.restore(abstract, step)
    assert restored is not None
    return jax.tree.map(np.asarray, restored.state)


def lines(workdir: Path) -> list[dict[str, Any]]:
    clocks = {"time", "seconds", "step_time", "images_per_second", "input_wait"}
    history = read_history(workdir / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in clocks} for line in history]


def assert_same(run, one: Path, other: Path, step: int) -> None:
    jax.tree.map(
        np.testing.assert_array_equal, state_at(run, one, step), state_at(run, other, step)
    )
    assert lines(one) == lines(other)


def test_a_run_leaves_everything_in_its_folder(run, whole):
    workdir, result = whole
    assert (result.step, result.steps, result.stopped) == (7, 7, None)
    assert [line["step"] for line in lines(workdir) if line["kind"] == "train"] == [*range(1, 8)]
    (found,) = [line for line in lines(workdir) if line["kind"] == "eval"]
    assert (found["step"], found["examples"]) == (7, 360)
    assert found["ema/loss"] != found["loss"]
    assert sorted(int(p.name) for p in (workdir / "checkpoints").iterdir()) == [3, 6, 7]
    assert nfflax.load_run(workdir / "run.json") == run
    losses = [line["loss"] for line in lines(workdir) if line["kind"] == "train"]
    assert all(1 < loss < 4 for loss in losses)
    assert len(set(losses)) == 7


def test_a_resumed_run_is_the_uninterrupted_one(run, whole, tmp_path):
    part = train(run, tmp_path, steps=5)
    assert (part.step, part.steps) == (5, 7)
    train(run, tmp_path, resume=True)
    history = [line for line in lines(tmp_path) if (line["step"], line["kind"]) != (5, "eval")]
    assert history == lines(whole[0])
    jax.tree.map(
        np.testing.assert_array_equal, state_at(run, tmp_path, 7), state_at(run, whole[0], 7)
    )


@pytest.mark.slow
def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(run, whole, tmp_path, capsys):
    train(run, tmp_path, steps=6)
    for file in (tmp_path / "checkpoints" / "6" / "train").rglob("d/*"):
        file.write_bytes(file.read_bytes()[:-7])
    train(run, tmp_path, resume=True, stream=sys.stderr)
    shown = capsys.readouterr().err
    assert "the checkpoint of step 6 is damaged" in shown
    assert "going on from step 3" in shown
    jax.tree.map(
        np.testing.assert_array_equal, state_at(run, tmp_path, 7), state_at(run, whole[0], 7)
    )


def test_a_signal_saves_and_ends(run, whole, tmp_path, monkeypatch):
    """SIGTERM while step 4 is computed: that step is finished, saved, and nothing more is done."""
    write = History.train

    def write_and_stop(self: History, step: int, values: Any) -> None:
        write(self, step, values)
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(History, "train", write_and_stop)
    result = train(run, tmp_path)
    assert result.stopped == PREEMPTED
    assert 4 <= result.step < 7
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    monkeypatch.undo()
    train(run, tmp_path, resume=True)
    assert_same(run, tmp_path, whole[0], 7)


def test_evaluation_counts_every_image_once(run):
    """Whatever the batch: the last one of 104 holds 48 images."""
    mesh = make_mesh(run.mesh)
    source = nfflax.data.open_source(run.data, "test")
    found = {}
    for size in (104, 360):
        program = make_program(nfflax.load_run(run, {"eval.batch_size": size}), mesh)
        with jax.set_mesh(mesh):
            state = program.init()
            found[size] = evaluate(program, {"": state["params"]}, state["stats"], source)
    whole, uneven = found[360], found[104]
    assert uneven["examples"] == 360
    assert (uneven["top1"], uneven["top5"]) == (whole["top1"], whole["top5"])
    assert uneven["loss"] == pytest.approx(whole["loss"], rel=1e-6)


def test_the_average_is_what_others_get(run, whole):
    workdir, result = whole
    weights = load_weights(workdir)
    state = state_at(run, workdir, 7)
    jax.tree.map(np.testing.assert_array_equal, weights.params, state["ema"])
    assert weights.step == result.step
    assert weights.about["class_names"] == [*"0123456789"]
    assert nfflax.load_run(weights.about["run"]) == run


@pytest.mark.slow
def test_a_diverging_run_stops_and_names_the_last_good_checkpoint(run, tmp_path):
    wild = nfflax.load_run(
        run,
        {
            "schedule.learning_rate": 1e30,
            "schedule.warmup_steps": 6.0,
            "agc.clipping": 0,
            "ema.decay": 0,
            "guard.patience": 2,
            "train.steps": 30,
            "checkpoint.every_steps": 1,
        },
    )
    with pytest.raises(DivergedError, match=r"The last good checkpoint is that of step \d"):
        train(wild, tmp_path)
    last = read_history(tmp_path / "metrics.jsonl")[-1]
    assert last["guard/in_a_row"] == 2
    assert json.loads((tmp_path / "run.json").read_text())["guard"]["patience"] == 2


@pytest.mark.slow
def test_batch_normalised_networks_train_their_statistics(run, tmp_path):
    normed = nfflax.load_run(
        run,
        {
            "model.set.norm.kind": "batch",
            "model.set.block.skip_gain": "none",
            "train.steps": 2,
        },
    )
    result = train(normed, tmp_path)
    stats = load_weights(tmp_path).stats
    means = [v for k, v in jax.tree_util.tree_leaves_with_path(stats) if "mean" in str(k)]
    assert means
    assert all(np.any(mean) for mean in means)
    assert np.isfinite(result.evaluation["loss"])
