"""A network as an ONNX file, which ONNX Runtime, TensorRT, OpenVINO and others read.

export_onnx(model, "f0.onnx")

It takes "input", (batch, channels, height, width), normalised float32: ONNX's own layout, and what
the tools around it expect.
"""

import importlib.util
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nfflax.nn.net import NFNet
from nfflax.weights.errors import WeightsError
from nfflax.weights.exported import (
    CHECKED_IMAGES,
    Exported,
    about,
    difference,
    output_name,
    probe,
    require_exportable,
)
from nfflax.weights.fold import fold
from nfflax.weights.whole import require_free

if TYPE_CHECKING:
    from onnx import ModelProto

# One file of protocol buffers holds less than 2 GB. Beyond, arrays go into a second file.
LARGEST_FILE = 2_000_000_000


def export_onnx(
    model: NFNet,
    path: str | Path,
    *,
    resolution: int | None = None,
    batch: int | None = None,
    class_names: Sequence[str] = (),
    overwrite: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Exported:
    """Write the folded network as an ONNX file, checked in ONNX Runtime before it is kept.

    `resolution` is the spec's for tests unless given. Any batch will do unless `batch` fixes it.
    Spec, preprocessing and classes are in the file's metadata. A network of more than 2 GB gets a
    second file beside the first, `path` with ".data" after it.
    """
    side = model.spec.resolution.test if resolution is None else resolution
    require_exportable(model, side, class_names)
    require_ready(path, overwrite=overwrite)
    _require_operators(model)

    from nfflax.weights.onnx_graph import Graph  # imports onnx
    from nfflax.weights.onnx_network import add_network

    say("making the graph")
    graph = Graph()
    logits = add_network(graph, fold(model), "input", side)
    size = "batch" if batch is None else batch
    shape = (size, model.spec.stem.in_channels, side, side)
    outputs = model.spec.head.num_classes or model.num_features
    texts = {
        key: value if isinstance(value, str) else json.dumps(value)
        for key, value in about(model, side, class_names).items()
    }
    made = graph.model(("input", shape), (output_name(model), logits, (size, outputs)), texts)

    def check(file: Path) -> float:
        expected = probe(model, side, batch or CHECKED_IMAGES)
        found = _run(file, expected.inputs_NHWC.transpose(0, 3, 1, 2))
        return difference(model, found, expected.logits_NC, Path(path))

    written, share = _written(made, Path(path), check, say)
    return Exported(Path(path), "onnx", written, (), shape, share)


def require_ready(path: str | Path, *, overwrite: bool) -> None:
    """Raise WeightsError where no network at all could be exported so."""
    missing = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        problem = f'This needs {" and ".join(missing)}: pip install "nfflax[onnx]".'
        raise WeightsError(str(path), [problem])
    if Path(path).is_dir():
        raise WeightsError(str(path), ["It is a folder. An ONNX file needs a name of its own."])
    for file in (Path(path), _arrays_of(Path(path))):
        require_free(file, overwrite=overwrite)


def _written(
    made: "ModelProto",
    place: Path,
    check: Callable[[Path], float],
    say: Callable[[str], None],
) -> tuple[int, float]:
    """Save, check and move into place, so that nothing is ever there in part: (bytes, result)."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{place.name}.", dir=place.parent) as new:
            file = Path(new, place.name)
            say("writing")
            _save(made, file)
            say("checking against the network")
            share = check(file)
            names = sorted(os.listdir(new), reverse=True)  # the arrays before what reads them
            size = sum(Path(new, name).stat().st_size for name in names)
            for name in names:
                os.replace(Path(new, name), place.parent / name)
            if _arrays_of(place).name not in names:
                _arrays_of(place).unlink(missing_ok=True)  # of the file that was replaced
    except OSError as error:
        problem = f"It cannot be written: {error.strerror or error}."
        raise WeightsError(str(place), [problem]) from error
    return size, share


def _save(made: "ModelProto", file: Path) -> None:
    import onnx

    size = sum(len(array.raw_data) for array in made.graph.initializer)
    if size > LARGEST_FILE:
        onnx.save_model(
            made, file, save_as_external_data=True, location=_arrays_of(file).name, size_threshold=0
        )
    else:
        onnx.save_model(made, file)
    onnx.checker.check_model(str(file), full_check=True)


def _run(file: Path, inputs_NCHW: np.ndarray) -> np.ndarray:
    """What ONNX Runtime makes of the file."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (logits_NC,) = session.run(None, {"input": inputs_NCHW})
    return np.asarray(logits_NC)


def _arrays_of(file: Path) -> Path:
    """The second file of a large network."""
    return file.with_name(f"{file.name}.data")


def _require_operators(model: NFNet) -> None:
    """Raise WeightsError where a file cannot hold the network."""
    from nfflax.weights.onnx_graph import ACTIVATIONS

    problems, activation = [], model.spec.numerics.activation
    if model.dtype != np.float32:
        problems.append(f"ONNX files are float32, and this network computes in {model.dtype}.")
    if activation not in ACTIVATIONS:
        problem = f"numerics.activation = {activation!r} has no operators of ONNX. Those that do: "
        problems.append(problem + ", ".join(ACTIVATIONS) + ".")
    if problems:
        raise WeightsError(model.spec.name, problems)
