"""Metrics on disk: every step told once, whatever killed the run, and the same to every tracker."""

import json
import math
import struct
import sys
import time
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from nfflax.spec.errors import SpecError
from nfflax.spec.load import load_run
from nfflax.train.errors import TrainError
from nfflax.train.history import History, read_history, ready_wandb


def run_with(**log):
    return load_run("digits", {f"log.{key}": value for key, value in log.items()})


@pytest.fixture(scope="module")
def plain_run():
    """A run that writes metrics.jsonl and nothing else, a line per step."""
    return run_with(tensorboard=False, every=1)


@pytest.fixture
def tracker(monkeypatch):
    """Stands in for tensorboardX and wandb, and remembers what it is told."""
    told = SimpleNamespace(scalars=[], boards=[], logged=[], inits=[], exits=[], closed=0, logins=0)

    class SummaryWriter:
        def __init__(self, folder: str, **options: Any):
            told.boards.append((folder, options["purge_step"]))

        def add_scalar(self, *scalar: Any):
            told.scalars.append(scalar)

        def close(self):
            told.closed += 1

    class WandbRun:
        offline, url = False, "https://example.org/run"

        def define_metric(self, name: str, step_metric: str):
            assert step_metric == "step"

        def log(self, values: dict):
            told.logged.append(values)

        def finish(self, exit_code: int):
            told.exits.append(exit_code)

    def init(**options: Any) -> WandbRun:
        told.inits.append(options)
        if told.refuses:
            raise wandb.Error("no key")
        return WandbRun()

    def login():
        told.logins += 1

    told.refuses = False
    board, wandb = ModuleType("tensorboardX"), ModuleType("wandb")
    vars(board).update(SummaryWriter=SummaryWriter)
    vars(wandb).update(Error=type("Error", (Exception,), {}), init=init, login=login)
    vars(wandb).update(Settings=lambda **options: options)
    monkeypatch.setitem(sys.modules, "tensorboardX", board)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    return told


def write_steps(workdir, run, steps, start=0):
    with History(workdir, run, start=start) as history:
        for step in steps:
            history.train(step, {"loss": 1 / step})
            if step % 5 == 0:
                history.write(step, "eval", {"top1": step / 100})


def steps_of(workdir, kind):
    history = read_history(workdir / "metrics.jsonl")
    return [entry["step"] for entry in history if entry["kind"] == kind]


def test_a_line_is_json_with_step_kind_time_and_numbers(tmp_path, plain_run):
    before = time.time()
    values = {"loss": 0.1, "ema/top1": math.nan, "guard/norm": math.inf, "guard/skipped": 3}
    with History(tmp_path, plain_run) as history:
        history.write(7, "train", values)
        text = (tmp_path / "metrics.jsonl").read_text("ascii")  # it is there before the run ends
    line = json.loads(text, parse_constant=pytest.fail)  # which NaN and Infinity would call
    assert before - 1 < line.pop("time") < time.time() + 1
    numbers = {"loss": 0.1, "ema/top1": None, "guard/norm": None, "guard/skipped": 3}
    assert line == {"step": 7, "kind": "train"} | numbers
    assert isinstance(line["guard/skipped"], int)
    (entry,) = read_history(tmp_path / "metrics.jsonl")
    assert math.isnan(entry["ema/top1"])


def test_steps_between_two_lines(tmp_path):
    write_steps(tmp_path, run_with(tensorboard=False, every=4), range(1, 11))
    assert steps_of(tmp_path, "train") == [4, 8]
    assert steps_of(tmp_path, "eval") == [5, 10]


@pytest.mark.parametrize("rest", ["", '{"step": 13, "kind": "tr', '{"step": 13}\n', "\0\0\0"])
def test_a_killed_and_resumed_run_tells_every_step_once(rest, tmp_path, plain_run):
    path = tmp_path / "metrics.jsonl"
    write_steps(tmp_path, plain_run, range(1, 13))
    with open(path, "a") as file:
        file.write(rest)  # what was being written when the run was killed
    assert steps_of(tmp_path, "train") == [*range(1, 13)]
    write_steps(tmp_path, plain_run, range(5, 15), start=5)  # evaluates its first step again
    assert steps_of(tmp_path, "train") == [*range(1, 15)]
    assert steps_of(tmp_path, "eval") == [5, 10]
    write_steps(tmp_path, plain_run, range(1, 3))  # no checkpoint was left
    assert steps_of(tmp_path, "train") == [1, 2]


def test_what_cannot_be_written_is_said_in_a_sentence(tmp_path, plain_run, monkeypatch):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(TrainError, match=r"metrics\.jsonl cannot be written: Is a directory"):
        History(tmp_path, plain_run)
    (tmp_path / "metrics.jsonl").rmdir()
    with History(tmp_path, plain_run) as history:
        (tmp_path / "metrics.jsonl").unlink()
        (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
        with pytest.raises(TrainError, match=r"metrics\.jsonl cannot be written: No space left"):
            history.write(1, "train", {"loss": 1.0})


def test_trackers_get_what_the_file_gets(tmp_path, tracker):
    run = run_with(wandb="project", every=2)
    with History(tmp_path, run, start=30) as history:
        history.train(31, {"loss": 9.0})
        history.train(32, {"loss": 0.5, "guard/norm": math.inf})
        history.write(32, "eval", {"ema/top1": 0.25})
        assert not tracker.closed
    assert tracker.boards == [(str(tmp_path / "tensorboard"), 31)]  # hides older events from 31 on
    assert tracker.scalars == [("train/loss", 0.5, 32), ("eval/ema/top1", 0.25, 32)]
    assert tracker.closed == 1
    train = {"step": 32, "train/loss": 0.5, "train/guard/norm": math.inf}
    assert tracker.logged == [train, {"step": 32, "eval/ema/top1": 0.25}]
    assert history.notes == ["Weights & Biases: https://example.org/run"]
    (options,) = tracker.inits
    assert (options["project"], options["name"], options["dir"]) == (
        "project",
        "digits",
        str(tmp_path),
    )
    assert options["config"]["train"]["batch_size"] == run.train.batch_size
    assert tracker.exits == [0]


def test_a_resumed_run_goes_on_at_weights_and_biases(tmp_path, tracker):
    run = run_with(wandb="project", tensorboard=False)
    with pytest.raises(RuntimeError, match="diverged"), History(tmp_path, run):
        raise RuntimeError("diverged")
    with History(tmp_path, run, start=10):
        pass
    first, second = (options["id"] for options in tracker.inits)
    assert first == second
    assert tracker.inits[1]["resume"] == "allow"
    assert tracker.exits == [1, 0]
    other = tmp_path / "other"
    other.mkdir()
    with History(other, run):
        assert tracker.inits[2]["id"] != first


def test_weights_and_biases_that_cannot_be_used(tmp_path, tracker, monkeypatch):
    run = run_with(wandb="project")
    ready_wandb(run)
    assert tracker.logins == 1
    tracker.refuses = True
    with pytest.raises(SpecError, match=r'(?s)log.wandb = "project".*no key.*wandb login'):
        History(tmp_path, run)
    monkeypatch.setitem(sys.modules, "wandb", None)
    for use in (ready_wandb, lambda run: History(tmp_path, run)):
        with pytest.raises(SpecError, match=r'(?s)not installed.*pip install "nfflax\[wandb\]"'):
            use(run)
    ready_wandb(run_with())


def test_without_tensorboardx_a_run_goes_on_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with History(tmp_path, run_with(every=1)) as history:
        history.train(1, {"loss": 1.0})
    assert history.notes == [
        'TensorBoard\'s files are not written: pip install "nfflax[tensorboard]"'
    ]
    assert steps_of(tmp_path, "train") == [1]


def test_tensorboards_files_hold_the_metrics(tmp_path):
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    with History(tmp_path, run_with(every=1), start=4) as history:
        history.train(5, {"loss": 0.25, "guard/norm": math.nan})
        history.write(5, "eval", {"top1": 0.75})
    (path,) = (tmp_path / "tensorboard").iterdir()
    data, events = path.read_bytes(), []
    while data:  # records: length, its checksum, the event, its checksum
        (length,) = struct.unpack("<Q", data[:8])
        events.append(event_pb2.Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    found = [(e.step, value.tag, value.simple_value) for e in events for value in e.summary.value]
    assert found == [(5, "train/loss", 0.25), (5, "eval/top1", 0.75)]
    starts = [event.step for event in events if event.session_log.status]
    assert starts == [5]
