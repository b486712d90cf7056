"""Weights from any place into the form that another program wants, with an account of every array.

What is written: a file under timm's names or ours (safetensors), DeepMind's pickle (.npz), a folder
in Hugging Face's layout, or a checkpoint such as a run leaves. It is there in full or not at all.
"""

import hashlib
import json
import os
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from flax import nnx

from nfflax.nn.net import NFNet
from nfflax.spec.errors import Problem, SpecError, nearest
from nfflax.spec.load import Source, load_spec
from nfflax.spec.schema import Numerics, Spec
from nfflax.train.checkpoint import FOLDER as CHECKPOINTS
from nfflax.train.checkpoint import Checkpoints
from nfflax.train.errors import CheckpointError, TrainError
from nfflax.train.inference import Loaded, network_of
from nfflax.train.transfer import Pretrained, open_weights
from nfflax.weights.errors import WeightsError
from nfflax.weights.foreign import CLASS_NAMES, SPEC, abstract_network, format_entries
from nfflax.weights.hub import CONFIG, TORCH_WEIGHTS, WEIGHTS
from nfflax.weights.hub_folder import write_hub_folder
from nfflax.weights.naming import block_names, to_named
from nfflax.weights.safetensors import write_safetensors
from nfflax.weights.timm_config import to_timm_config
from nfflax.weights.whole import require_free, whole_file, whole_folder

Form = Literal["nfflax", "timm", "deepmind", "checkpoint"]

FORMS: dict[Form, str] = {
    "nfflax": "a folder, or a .safetensors file",
    "timm": "a .safetensors file, or a folder",
    "deepmind": "an .npz file",
    "checkpoint": "a folder",
}
"""What can be written, and as what; the first is what such a name means without `to`."""

_SUFFIXES: dict[str, tuple[Form, ...]] = {
    ".safetensors": ("timm", "nfflax"),
    ".npz": ("deepmind",),
    "": ("nfflax", "timm", "checkpoint"),  # a folder
}
# Files that a name promises and that are not written, and what to do instead.
_REFUSED = {
    **dict.fromkeys(
        (".pth", ".pt", ".bin", ".tar", ".ckpt", ".pkl", ".pickle"),
        "is a pickle, which runs code when it is loaded, and is not written. PyTorch and timm read"
        " .safetensors as well",
    ),
    **dict.fromkeys((".h5", ".keras", ".tflite", ".msgpack", ".json"), "is not written"),
    ".onnx": "is a program and not only weights: use `nfflax export`",
}
# In what the official code has no choice.
_OFFICIAL = ("gamma", "padding", "ws_eps", "ws_eps_mode")
# All that a folder written here has in it. Another is never overwritten.
_OURS = {CONFIG, WEIGHTS, "README.md", "spec.json", CHECKPOINTS}


@dataclass(frozen=True)
class Moved:
    """What became of one array."""

    source: str
    """Its name in the source; empty where it has none there."""
    target: str
    """Its name in what was written; empty where it was left out."""
    before: tuple[int, ...] | None
    after: tuple[int, ...] | None
    dtype_before: str
    dtype_after: str
    done: str
    """What was done with it, in a word or two."""


@dataclass(frozen=True)
class Conversion:
    """What was converted, and how."""

    source: str
    target: str
    form: Form
    spec: Spec
    source_format: str
    sha256: str
    """Of the file that was read; empty for a checkpoint, whose arrays have fingerprints."""
    moved: tuple[Moved, ...]
    notes: tuple[str, ...]

    @property
    def numbers(self) -> int:
        """How many numbers were written."""
        return sum(int(np.prod(array.after)) for array in self.moved if array.after is not None)


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    to: Form | None = None,
    spec: Source | None = None,
    num_classes: int | None = None,
    in_channels: int | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> Conversion:
    """Write the weights at a place as `target`, in the form that its name or `to` says.

    Classes and channels are adapted as `nfflax.load` does it, a new classifier drawn from seed 0.
    With `dry_run` nothing is written. Raises SpecError with every problem at once.
    """
    place, name = os.fspath(source), os.fspath(target)
    form, problems = _form(name, to)
    problems += _occupied(name, overwrite)
    try:
        found = open_weights(place, None if spec is None else load_spec(spec))
        loaded = network_of(
            found,
            num_classes=num_classes,
            in_channels=in_channels,
            rngs=nnx.Rngs(0),
            dtype="float32",
        )
        arrays = _under_their_names(form, name, loaded.model)
    except SpecError as error:
        raise CheckpointError([*problems, *error.problems]) from None
    except WeightsError as error:
        instead = "" if form == "nfflax" else "--to nfflax, which any network fits"
        told = [Problem(name, "", text, allowed=instead) for text in error.problems]
        raise CheckpointError([*problems, *told]) from None
    if problems:
        raise CheckpointError(problems)
    moved = tuple(_rows(found, loaded.model.spec, arrays))
    if not dry_run:
        _write(name, form, loaded, dict(arrays.values()), overwrite)
    return Conversion(
        source=place,
        target=name,
        form=form,
        spec=loaded.model.spec,
        source_format=found.foreign.format if found.foreign else "checkpoint",
        sha256=_sha256(found.local),
        moved=moved,
        notes=(*loaded.notes, *_notes(name, form, loaded.model.spec)),
    )


def _form(target: str, to: Form | None) -> tuple[Form, list[Problem]]:
    """What to write, and what speaks against it."""
    suffix = "" if target.endswith(os.sep) or os.path.isdir(target) else Path(target).suffix.lower()
    if suffix in _REFUSED:
        allowed = ".safetensors, .npz, or a folder"
        return to or "nfflax", [Problem(target, "", _REFUSED[suffix], allowed=allowed)]
    if near := "" if suffix in _SUFFIXES else nearest(suffix, [key for key in _SUFFIXES if key]):
        return to or "nfflax", [Problem(target, "", "has no suffix that is known", nearest=near)]
    forms = _SUFFIXES.get(suffix, _SUFFIXES[""])
    if to is None or to in forms:
        return to or forms[0], []
    kind = f"{suffix} file" if suffix in _SUFFIXES and suffix else "folder"
    message = f"is the name of a {kind}, and --to {to} writes {FORMS[to]}"
    return to, [Problem(target, "", message, allowed=f"--to {' or '.join(forms)}")]


def _occupied(target: str, overwrite: bool) -> list[Problem]:
    """What stands where the result is to be, unless it may be overwritten."""
    try:
        require_free(target, overwrite=overwrite)
    except WeightsError as error:
        message, allowed = error.problems[0], "--overwrite, or another name"
        return [Problem(target, "", message, allowed=allowed)]
    if os.path.isdir(target):
        others = sorted(set(os.listdir(target)) - _OURS)
        if others:
            message = f"holds {', '.join(others[:3])}, which is not of a network: not overwritten"
            return [Problem(target, "", message, allowed="another folder")]
    return []


def _under_their_names(
    form: Form, target: str, network: NFNet
) -> dict[str, tuple[str, np.ndarray]]:
    """By our names: (name, array) of everything that is written."""
    if form == "timm" and _is_folder(target):
        to_timm_config(network.spec)
    named = to_named(network) | to_named(nnx.state(network, nnx.BatchStat))
    entries = format_entries("nfflax" if form == "checkpoint" else form, network)
    return {e.ours: (e.theirs, np.asarray(e.export(named[e.ours]), order="C")) for e in entries}


def _rows(
    found: Pretrained, spec: Spec, arrays: Mapping[str, tuple[str, np.ndarray]]
) -> Iterator[Moved]:
    """What became of each array."""
    before = _read(found)
    is_new = found.spec.head.num_classes != spec.head.num_classes
    channels = spec.stem.in_channels
    for ours in [*before, *(name for name in arrays if name not in before)]:
        source, was = before.get(ours, ("", None))
        target, now = arrays.get(ours, ("", None))
        if now is None:
            done = "left out"
        elif was is None or (is_new and ours.startswith("classifier.")):
            done = "drawn anew"
        elif channels != found.spec.stem.in_channels and ours.startswith("stem.convs.0."):
            done = "kept" if ours.endswith("bias") else f"adapted to {channels} channels"
        elif not np.array_equal(was.ravel().astype(now.dtype), now.ravel()):
            done = "transposed"
        else:
            done = "kept" if was.shape == now.shape else "reshaped"
        yield Moved(
            source=source,
            target=target,
            before=None if was is None else was.shape,
            after=None if now is None else now.shape,
            dtype_before="" if was is None else str(was.dtype),
            dtype_after="" if now is None else str(now.dtype),
            done=done,
        )


def _read(found: Pretrained) -> dict[str, tuple[str, np.ndarray]]:
    """By our names: (name, array) of everything that was read."""
    network = abstract_network(found.spec)
    if found.foreign is not None:
        arrays = found.foreign.arrays
        return {e.ours: (e.theirs, arrays[e.theirs]) for e in found.foreign.entries(network)}
    return {
        name: (name, value[part])
        for path, value in found.values(network).items()
        for name, part in block_names(path, value.shape)
    }


def _notes(target: str, form: Form, spec: Spec) -> Iterator[str]:
    """Where the reader of a file computes another network from the same numbers."""
    if form == "timm" and not _is_folder(target):
        try:
            to_timm_config(spec)
        except WeightsError as error:
            yield f"timm computes another network from these numbers: {'; '.join(error.problems)}"
    if form == "deepmind":
        theirs, ours = Numerics(), spec.numerics
        keys = [key for key in _OFFICIAL if getattr(ours, key) != getattr(theirs, key)]
        if keys:
            names = ", ".join(f"numerics.{key}" for key in keys)
            yield f"the official code computes another network from these numbers: see {names}"


def _write(
    target: str, form: Form, loaded: Loaded, arrays: Mapping[str, np.ndarray], overwrite: bool
) -> None:
    names, spec = loaded.class_names, loaded.model.spec
    try:
        if form == "deepmind":
            with whole_file(target) as new, open(new, "wb") as file:
                pickle.dump(_as_tree(arrays), file, protocol=4)
        elif form == "checkpoint":
            with whole_folder(target, overwrite=overwrite) as folder:
                _save(folder, loaded)
        elif _is_folder(target):
            write_hub_folder(
                target, loaded.model, layout=form, class_names=names, overwrite=overwrite
            )
        else:
            said = {SPEC: json.dumps(spec.model_dump(mode="json"))}
            said |= {CLASS_NAMES: json.dumps(names)} if names else {}
            kind = {"format": "pt" if form == "timm" else "nfflax"}  # "pt": layout of PyTorch
            write_safetensors(target, arrays, kind | said)
    except (WeightsError, TrainError) as error:
        problems = error.problems if isinstance(error, WeightsError) else [str(error)]
        raise CheckpointError([Problem(target, "", text) for text in problems]) from None


def _as_tree(arrays: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    tree: dict[str, dict[str, np.ndarray]] = {}
    for name, array in arrays.items():
        module, _, parameter = name.rpartition("/")
        tree.setdefault(module, {})[parameter] = array
    return tree


def _save(folder: Path, loaded: Loaded) -> None:
    """A checkpoint as a run leaves it, without the run."""
    spec, step = loaded.model.spec.model_dump(mode="json"), loaded.step or 0
    _, params, stats = nnx.split(loaded.model, nnx.Param, ...)
    state = {
        "params": nnx.to_pure_dict(params),
        "stats": nnx.to_pure_dict(stats),
        "opt": {},
        "step": np.int32(step),
    }
    (folder / "spec.json").write_text(json.dumps(spec, indent=2) + "\n", encoding="utf-8")
    with Checkpoints(folder, keep=1, keep_best=0) as checkpoints:
        checkpoints.save(step, state, {"spec": spec, "class_names": list(loaded.class_names)})


def _is_folder(target: str) -> bool:
    return _form(target, None)[0] == "nfflax"


def _sha256(local: Path | None) -> str:
    """Of a file, or of the weights in a folder of the hub's; empty for a checkpoint."""
    if local is None:
        return ""
    files = [local / name for name in (WEIGHTS, TORCH_WEIGHTS)] if local.is_dir() else [local]
    for path in files:
        if path.is_file():
            with open(path, "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
    return ""
