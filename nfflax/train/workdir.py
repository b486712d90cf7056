"""A run's folder: who may use it, and what it says of the run.

A folder belongs to one run. `run.json` is the run in full, `spec.json` its network, `versions.json`
what it was trained with; the first two load like any run or spec file.
"""

import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from nfflax import __version__
from nfflax.spec.base import by_key
from nfflax.spec.errors import NOT_GIVEN, Problem, SpecError
from nfflax.spec.load import load_run
from nfflax.spec.run import Run
from nfflax.train.agree import by_first
from nfflax.train.checkpoint import FOLDER as CHECKPOINTS
from nfflax.train.curve import CURVE
from nfflax.train.errors import CheckpointError
from nfflax.train.events import EVENTS
from nfflax.train.history import METRICS, TENSORBOARD, WANDB

RUN, SPEC, VERSIONS = "run.json", "spec.json", "versions.json"
PROFILE = "profile"
_LEFT = (CHECKPOINTS, METRICS, EVENTS, TENSORBOARD, WANDB, CURVE, PROFILE)
_WRITTEN = (RUN, *_LEFT, SPEC, VERSIONS)
"""All that a run leaves in its folder, in the order of removal: while any of it is there, the last
says that it is ours."""
_SHOWN = 80  # characters of a value that a message repeats
_PACKAGES = "jax jaxlib flax optax orbax-checkpoint grain".split()

# What a resumed run may change: how it is carried out, not what it learns.
_FREE_TABLES = ("eval", "mesh", "checkpoint", "log")
_FREE_KEYS = (
    "name",
    "summary",
    "model.spec.name",
    "model.spec.summary",
    "model.remat",
    "model.unroll",
    "data.workers",
    "data.worker_kind",
    "data.prefetch",
)


def claim(workdir: Path, run: Run, *, resume: bool, overwrite: bool) -> None:
    """Make a folder that of `run`, or raise CheckpointError and leave it as it is.

    A folder that a run has used can be gone on with (`resume`: the same run; starts where there is
    nothing to go on with) or have that run removed (`overwrite`). In a run of several processes all
    call this together, and the first does the work.
    """
    by_first(lambda: _claim(Path(workdir).absolute(), run, resume, overwrite))


def _claim(workdir: Path, run: Run, resume: bool, overwrite: bool) -> None:
    try:
        if resume and overwrite:
            _refuse(workdir, "cannot be resumed and overwritten at once", "one of the two")
        present = _present(workdir)
        if overwrite:
            _remove(workdir, present)
        elif RUN in present or CHECKPOINTS in present:
            if not resume:
                options = "--resume, to go on with that run; --overwrite, to remove it"
                _refuse(workdir, "holds a run already", f"{options}; another folder")
            _compare(workdir, run)
        _write(workdir, run)
    except OSError as error:
        message = f"cannot be used: {error.strerror or error}"
        raise CheckpointError([Problem(str(error.filename or workdir), "", message)]) from error


def _present(workdir: Path) -> list[str]:
    """What an earlier run has left in the folder."""
    if os.path.lexists(workdir) and not workdir.is_dir():
        _refuse(workdir, "is not a folder", "a folder, or a path where one can be made")
    present = [name for name in _WRITTEN if os.path.lexists(workdir / name)]
    if present and not _is_ours(workdir):
        message = f"holds {', '.join(present)}, which no run of nfflax has written"
        _refuse(workdir, message, "another folder")
    return present


def _is_ours(workdir: Path) -> bool:
    """Whether nfflax has used this folder: one of two files that say so is readable."""
    try:
        return "nfflax" in json.loads((workdir / VERSIONS).read_text("utf-8"))
    except (OSError, ValueError, TypeError):
        pass
    try:
        load_run(workdir / RUN)
    except SpecError:
        return False
    return True


def _remove(workdir: Path, present: list[str]) -> None:
    """Remove what a run has written, and nothing else."""
    if not present and workdir.is_dir() and any(workdir.iterdir()):
        message = "holds files, but no run that could be overwritten"
        _refuse(workdir, message, "an empty folder, or a new one")
    for name in present:
        path = workdir / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _compare(workdir: Path, run: Run) -> None:
    """Refuse to go on with a run that learns something else than the one in the folder."""
    try:
        there = _flat(load_run(workdir / RUN))
    except SpecError as error:
        message = "holds a run that cannot be read, so it cannot be resumed"
        problem = Problem(str(workdir), "", message, allowed="--overwrite removes it")
        raise CheckpointError([problem, *error.problems]) from None
    here = _flat(run)
    problems = [
        Problem(
            f"run {run.name}",
            key,
            f"is {_shown(there, key)} in {workdir / RUN}: a resumed run cannot change it",
            here.get(key, NOT_GIVEN),
        )
        for key in sorted(here.keys() | there.keys())
        if here.get(key, NOT_GIVEN) != there.get(key, NOT_GIVEN) and key not in _FREE_KEYS
    ]
    if problems:
        raise CheckpointError(problems)


def _flat(run: Run) -> dict[str, Any]:
    """What a run says, by dotted key, without the tables that a resumed run is free to change."""
    return by_key(run.model_dump(mode="json", exclude=set(_FREE_TABLES)))


def _shown(values: Mapping[str, Any], key: str) -> str:
    if key not in values:
        return "not given"
    text = json.dumps(values[key])
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _write(workdir: Path, run: Run) -> None:
    """Write what the folder says of the run: all of it or, on a full disk, nothing."""
    contents = {
        VERSIONS: _versions(),
        SPEC: run.spec.model_dump(mode="json"),
        RUN: run.model_dump(mode="json"),
    }
    workdir.mkdir(parents=True, exist_ok=True)
    temporary = {name: workdir / f"{name}.tmp" for name in contents}
    try:
        for name, content in contents.items():
            with open(temporary[name], "w", encoding="utf-8") as file:
                file.write(json.dumps(content, indent=2) + "\n")
                file.flush()
                os.fsync(file.fileno())
        for name, path in temporary.items():
            os.replace(path, workdir / name)
    except OSError:
        for path in temporary.values():
            path.unlink(missing_ok=True)
        raise


def _versions() -> dict[str, str]:
    versions = {"nfflax": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def _refuse(workdir: Path, message: str, allowed: str) -> NoReturn:
    raise CheckpointError([Problem(str(workdir), "", message, allowed=allowed)])
