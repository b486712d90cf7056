"""A network as a program of JAX's own, which runs without nfflax: a folder with all that it takes.

nfflax.export(model, "f0")     # then: python f0/run.py images.npy

    program.bin     StableHLO for every platform asked for, as `jax.export` serialises it
    weights.npz     what the program computes with: its first argument
    metadata.json   input, output, preprocessing, classes, spec, versions, checksums
    run.py          loads and runs it with jax, numpy and flatbuffers

The weights are an argument and not constants of the program: so NFNet-F0 is read and compiled in
0.8 GB on CPU, and not 1.8 GB, and sooner (docs/export.md). Constants would also end at the 2 GB
that the program's format can hold.
"""

import hashlib
import importlib.util
import json
import runpy
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import export as jax_export
from jax.sharding import AxisType

from nfflax.nn.net import NFNet
from nfflax.pixels import normalize
from nfflax.spec.errors import nearest
from nfflax.weights.errors import WeightsError
from nfflax.weights.exported import (
    CHECKED_IMAGES,
    Exported,
    about,
    difference,
    on_cpu,
    output_name,
    probe,
    require_exportable,
)
from nfflax.weights.fold import fold
from nfflax.weights.whole import require_free, whole_folder

FORMAT, FORMAT_VERSION = "nfflax-stablehlo", 1
PLATFORMS = ("cpu", "cuda", "tpu")

_KNOWN_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
_ALSO_CALLED = {"gpu": "cuda", "nvidia": "cuda", "amd": "rocm"}


def export(
    model: NFNet,
    folder: str | Path,
    *,
    platforms: Sequence[str] = PLATFORMS,
    resolution: int | None = None,
    batch: int | None = None,
    pixels: bool = True,
    class_names: Sequence[str] = (),
    overwrite: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Exported:
    """Write the folded network as a program for `platforms`, checked on CPU before it is kept.

    It takes uint8 images (batch, resolution, resolution, channels), cut and resized as
    `metadata.json` says, and returns float32 logits. Without `pixels` it takes the network's own
    input: normalised, float32. Any batch will do unless `batch` fixes it; `resolution` is the
    spec's for tests unless given. `overwrite` replaces an earlier export. `say` is told what is
    being done.
    """
    side = model.spec.resolution.test if resolution is None else resolution
    require_exportable(model, side, class_names)
    require_ready(folder, platforms, overwrite=overwrite)

    say("lowering the program")
    folded = fold(model)
    shape = ("batch" if batch is None else batch, side, side, model.spec.stem.in_channels)
    program, weights = _lowered(folded, platforms, shape, pixels)
    described = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "jax": jax.__version__,
        "calling_convention_version": program.calling_convention_version,
        "platforms": list(program.platforms),
        "input": {
            "name": "images",
            "shape": shape,
            "layout": "NHWC",
            "dtype": "uint8" if pixels else "float32",
            "normalized_inside": pixels,
        },
        "output": {
            "name": output_name(model),
            "shape": (shape[0], *program.out_avals[0].shape[1:]),
            "dtype": "float32",
        },
    } | about(model, side, class_names)
    with whole_folder(folder, overwrite=overwrite) as new:
        say("writing")
        (new / "program.bin").write_bytes(program.serialize())
        np.savez(new / "weights.npz", **weights)  # pyright: ignore[reportArgumentType]
        described["sha256"] = {name: _sha256(new / name) for name in ("program.bin", "weights.npz")}
        text = json.dumps(described, indent=2, allow_nan=False)
        (new / "metadata.json").write_text(text + "\n", "utf-8")
        script = resources.files("nfflax.weights").joinpath("run_exported.py")
        (new / "run.py").write_text(script.read_text("utf-8"), "utf-8")
        say("checking against the network")
        expected = probe(model, side, batch or CHECKED_IMAGES)
        with on_cpu(model.spec):
            run = runpy.run_path(str(new / "run.py"))["run"]
            found = run(expected.images_NHWC if pixels else expected.inputs_NHWC)
        share = difference(model, found, expected.logits_NC, Path(folder))
        size = sum(file.stat().st_size for file in new.iterdir())
    return Exported(Path(folder), "stablehlo", size, tuple(platforms), shape, share)


def require_ready(folder: str | Path, platforms: Sequence[str], *, overwrite: bool) -> None:
    """Raise WeightsError where no network at all could be exported so."""
    if importlib.util.find_spec("flatbuffers") is None:
        problem = 'Exporting needs the flatbuffers package: pip install "nfflax[export]".'
        raise WeightsError(str(folder), [problem])
    _require_platforms(platforms)
    _require_replaceable(Path(folder), overwrite)


def _lowered(
    model: NFNet, platforms: Sequence[str], shape: tuple[int | str, ...], pixels: bool
) -> tuple[jax_export.Exported, dict[str, np.ndarray]]:
    """The program of a folded network, and the arrays that are its first argument."""
    graph, state = nnx.split(model)
    leaves, tree = jax.tree.flatten(state)
    names = [".".join(map(str, path)) for path, _ in nnx.to_flat_state(state)]
    weights = dict(zip(names, map(_storable, jax.device_get(leaves)), strict=True))

    def run(weights: dict[str, jax.Array], images: jax.Array) -> jax.Array:
        restored = [
            weights[name].view(leaf.dtype) for name, leaf in zip(names, leaves, strict=True)
        ]
        network = nnx.merge(graph, jax.tree.unflatten(tree, restored))
        if pixels:
            images = normalize(images, network.spec.preprocess, dtype=network.dtype)
        return network(images, train=False)

    sizes = jax_export.symbolic_shape(", ".join(map(str, shape)))
    images = jax.ShapeDtypeStruct(sizes, jnp.uint8 if pixels else jnp.float32)
    # On a mesh of one device convolutions are lowered as for one, however many there are here.
    here = jax.local_devices()[:1]
    one = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,), devices=here)
    with jax.set_mesh(one):
        lower = jax_export.export(jax.jit(run), platforms=tuple(platforms))
        return lower(jax.tree.map(jax.typeof, weights), images), weights


def _storable(array: np.ndarray) -> np.ndarray:
    """As NumPy's own formats can hold it: bfloat16, which they do not know, as its 16 bits."""
    return array.view(np.uint16) if array.dtype == jnp.bfloat16 else array


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _require_platforms(platforms: Sequence[str]) -> None:
    problems = []
    for name in platforms:
        if name not in _KNOWN_PLATFORMS:
            near = _ALSO_CALLED.get(name.lower()) or nearest(name, _KNOWN_PLATFORMS)
            hint = f" Did you mean {near}?" if near else ""
            problems.append(f"It is none of {', '.join(_KNOWN_PLATFORMS)}: {name!r}.{hint}")
    if len(set(platforms)) < len(platforms):
        problems.append("One of them is named twice.")
    if not problems and "cpu" not in platforms:
        problems.append("cpu must be among them: every program is checked there.")
    if problems:
        raise WeightsError(f"platforms {', '.join(platforms)}", problems)


def _require_replaceable(folder: Path, overwrite: bool) -> None:
    """Only an earlier export is ever replaced, so that a slip of the pen costs no other folder."""
    require_free(folder, overwrite=overwrite)
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    try:
        earlier: Any = json.loads((folder / "metadata.json").read_text("utf-8"))
        is_ours = earlier["format"] == FORMAT
    except (OSError, ValueError, TypeError, KeyError):
        is_ours = False
    if not is_ours:
        raise WeightsError(str(folder), ["The folder is no earlier export, and is not replaced."])
