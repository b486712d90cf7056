"""A trained network on disk that took no training: a run's folder with random weights in it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from golden_data import params, random_model

import nfflax
from nfflax.spec.run import Run
from nfflax.train.checkpoint import Checkpoints

TINY: dict[str, Any] = {
    "extends": "nfnet_tiny",
    "name": "tiny",
    "stem": {"width": [8], "in_channels": 1},
    "stages": {"depth": [2], "width": [16], "stride": 2, "group_width": 8},
    "attention": {"kind": "none"},
    "resolution": {"train": 16, "test": 16},
    "preprocess": {"mean": 0.5, "std": 0.5},
}
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


SETTINGS = {
    "train.batch_size": 32,
    "train.steps": 3,
    "train.examples": 1437,
    "schedule.warmup_steps": 1,
    "data.workers": 0,
    "ema.decay": 0.9,
    "agc.clipping": 0.16,
}


def tiny_run(**changes: Any) -> Run:
    """A run of the tiny network on digits; a dotted key's dots are double underscores."""
    changed = {key.replace("__", "."): value for key, value in changes.items()}
    return nfflax.load_run("digits", {"model.spec": TINY} | SETTINGS | changed)


def words(*changes: str) -> list[str]:
    """The same settings, and changes such as "model.weights=runs/first", for a command line."""
    settings = [*(f"{key}={value}" for key, value in SETTINGS.items()), *changes]
    return [word for setting in settings for word in ("--set", setting)]


def weights(run: Run, seed: int = 0) -> dict[Any, Any]:
    """Parameters of the run's network, drawn by NumPy and small enough for moderate logits."""
    drawn = params(random_model(run.spec, seed))
    drawn["classifier"]["kernel"] *= 0.01
    return drawn


def save(folder: Path, run: Run, steps: tuple[int, ...] = (3,), **parts: Any) -> dict[Any, Any]:
    """Leave checkpoints in a run's folder, as training does; returns the last one's average."""
    folder.mkdir(exist_ok=True)
    (folder / "spec.json").write_text(json.dumps(run.spec.model_dump(mode="json")))
    about = {"run": run.model_dump(mode="json"), "class_names": list(NAMES)}
    average = {}
    with Checkpoints(folder, keep=len(steps), keep_best=0) as checkpoints:
        for step in steps:
            raw, average = weights(run, step), weights(run, step + 100)
            rest = {"stats": {}, "opt": {}, "step": np.int32(step)} | parts
            checkpoints.save(step, {"params": raw, "ema": average, **rest}, about)
    return average
