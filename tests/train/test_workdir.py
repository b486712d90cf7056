"""A run's folder: written whole or not at all, and never used by two runs."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

import nfflax
from nfflax.train.errors import CheckpointError
from nfflax.train.workdir import claim

OURS = ["run.json", "spec.json", "versions.json"]


def digits(changes: dict[str, Any] | None = None) -> nfflax.Run:
    return nfflax.load_run("digits", {"train.examples": 1437} | (changes or {}))


def use(workdir: Path, run: nfflax.Run | None = None, how: str = "") -> None:
    """Claim a folder for a run, with "resume" or "overwrite" where that is said."""
    claim(workdir, run or digits(), resume="resume" in how, overwrite="overwrite" in how)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("used")
    use(workdir)
    (workdir / "checkpoints" / "5" / "params").mkdir(parents=True)
    (workdir / "metrics.jsonl").write_text("{}\n")
    (workdir / "notes.txt").write_text("mine")
    return workdir


@pytest.fixture
def workdir(used: Path, tmp_path: Path) -> Path:
    """A folder that a run has used; with a file that is the user's."""
    return Path(shutil.copytree(used, tmp_path / "used"))


@pytest.mark.parametrize("name", ["digits", "nfnet", "finetune", "nf_resnet", "pretrain"])
def test_what_is_written_loads_again(name: str, tmp_path: Path) -> None:
    run = nfflax.load_run(name)
    use(tmp_path / "new" / "folder", run)
    folder = tmp_path / "new" / "folder"
    assert names(folder) == OURS
    assert nfflax.load_run(folder / "run.json") == run
    assert nfflax.load_spec(folder / "spec.json") == run.spec
    versions = json.loads((folder / "versions.json").read_text())
    assert versions["nfflax"] == nfflax.__version__
    assert {"jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "python"} < set(versions)


@pytest.mark.parametrize("how", ["", "resume", "overwrite"])
def test_an_unused_folder_is_taken_in_any_way(how: str, tmp_path: Path) -> None:
    use(tmp_path, how=how)
    assert names(tmp_path) == OURS


def test_a_used_folder_needs_a_decision(workdir: Path) -> None:
    before = (workdir / "run.json").read_text()
    with pytest.raises(CheckpointError, match=r"holds a run already\n.*--resume.*--overwrite"):
        use(workdir, digits({"train.seed": 1}))
    assert (workdir / "run.json").read_text() == before
    with pytest.raises(CheckpointError, match="at once"):
        use(workdir, how="resume overwrite")


def test_the_same_run_goes_on(workdir: Path) -> None:
    left = names(workdir)
    changes = {
        "name": "again",
        "summary": "on another machine",
        "mesh.data": 8,
        "eval.every_steps": 3,
        "checkpoint.keep": 5,
        "log.every": 1,
        "data.workers": 4,
        "data.worker_kind": "process",
        "data.prefetch": 9,
        "model.remat": "block",
        "model.unroll": 2,
    }
    use(workdir, digits(changes), how="resume")
    assert names(workdir) == left
    assert nfflax.load_run(workdir / "run.json") == digits(changes)


def test_another_run_does_not_go_on(workdir: Path) -> None:
    changes = {
        "train.batch_size": 64,
        "model.set.head.num_classes": 11,
        "augment.layers": 2,
        "optimizer.freeze": ["stem"],
        "log.every": 1,
    }
    with pytest.raises(CheckpointError) as raised:
        use(workdir, digits(changes), how="resume")
    found = {problem.key: problem for problem in raised.value.problems}
    assert set(found) == {
        "augment.layers",
        "model.spec.head.num_classes",
        "optimizer.freeze",
        "train.batch_size",
    }
    assert found["train.batch_size"].value == 64
    there = digits().train.batch_size
    assert f"is {there} in {workdir / 'run.json'}" in found["train.batch_size"].message
    assert nfflax.load_run(workdir / "run.json") == digits()


def test_overwriting_removes_the_run_and_nothing_else(workdir: Path) -> None:
    use(workdir, digits({"train.seed": 1}), how="overwrite")
    assert names(workdir) == ["notes.txt", *OURS]
    assert nfflax.load_run(workdir / "run.json").train.seed == 1


def test_what_is_not_ours_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("three years")
    with pytest.raises(CheckpointError, match="no run that could be overwritten"):
        use(tmp_path, how="overwrite")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "run.json").write_text('{"command": "make"}')
    for how in ("overwrite", "resume", ""):
        with pytest.raises(CheckpointError, match="which no run of nfflax has written"):
            use(tmp_path, how=how)
    assert names(tmp_path) == ["checkpoints", "run.json", "thesis.tex"]


def test_a_damaged_run_file(workdir: Path) -> None:
    os.truncate(workdir / "run.json", 100)
    with pytest.raises(CheckpointError, match=r"(?s)cannot be read.*is not valid JSON"):
        use(workdir, how="resume")
    use(workdir, how="overwrite")
    assert nfflax.load_run(workdir / "run.json") == digits()


def test_checkpoints_without_their_run(workdir: Path) -> None:
    (workdir / "run.json").unlink()
    with pytest.raises(CheckpointError, match="holds a run already"):
        use(workdir)
    with pytest.raises(CheckpointError, match=r"(?s)cannot be resumed.*No such file"):
        use(workdir, how="resume")


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nowhere"])
@pytest.mark.parametrize("how", ["", "resume", "overwrite"])
def test_impossible_places(place: str, how: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match=r"is not a folder|cannot be used"):
        use(tmp_path / place, how=how)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("how", ["", "resume"])
def test_a_full_disk_leaves_nothing_half_written(
    how: str, workdir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = workdir if how else tmp_path / "new"
    before = {path: path.read_bytes() for path in folder.glob("*.*")}

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        use(folder, how=how)
    assert {path: path.read_bytes() for path in folder.glob("*.*")} == before
