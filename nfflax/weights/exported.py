"""What every exported network says of itself, and the check that it still is that network."""

import contextlib
import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

import nfflax
from nfflax.nn.net import NFNet
from nfflax.pixels import normalize
from nfflax.spec.schema import Spec
from nfflax.weights.errors import WeightsError

CHECKED_IMAGES = 2  # where the batch is free

# Greatest difference between logits, as a share of the largest. Folding and another order of sums
# cost 1e-6 in float32, and 4e-4 where wild weights blow the rounding up. Lower precisions round a
# folded kernel in another place, which costs bfloat16 6e-2 on an untrained network's small logits.
_TOLERANCE, _TOLERANCE_OF_LOW_PRECISION = 1e-3, 0.2


@dataclasses.dataclass(frozen=True)
class Exported:
    """What was written, and how well it agrees with the network."""

    path: Path
    """The folder or file."""
    format: str
    """"stablehlo" or "onnx"."""
    bytes: int
    """Size of everything written."""
    platforms: tuple[str, ...]
    """What the program was lowered for; empty for ONNX, which leaves that to its runtime."""
    shape: tuple[int | str, ...]
    """Of the input, with "batch" where any number of images will do."""
    difference: float
    """Largest difference from the network's own logits, as a share of the largest of those."""


class Probe(NamedTuple):
    """Random images, and what the network says to them."""

    images_NHWC: np.ndarray
    """uint8."""
    inputs_NHWC: np.ndarray
    """The same as the network gets them: normalised, float32."""
    logits_NC: np.ndarray


def probe(model: NFNet, side: int, count: int) -> Probe:
    """The network's answer to `count` random images, computed on CPU."""
    spec, rng = model.spec, np.random.default_rng(0)
    images = rng.integers(0, 256, (count, side, side, spec.stem.in_channels), np.uint8)
    graph, state = nnx.split(model)
    with on_cpu(spec):
        inputs = normalize(jax.device_put(images), spec.preprocess)
        logits = _answer(graph, jax.device_get(state), inputs)
    return Probe(images, np.asarray(inputs), np.asarray(logits, np.float32))


@functools.partial(jax.jit, static_argnums=0)
def _answer(graph: nnx.GraphDef, state: nnx.State, inputs_NHWC: jax.Array) -> jax.Array:
    return nnx.merge(graph, state)(inputs_NHWC, train=False)


def on_cpu(spec: Spec) -> contextlib.AbstractContextManager[None]:
    """Where checks are made: on the only device there always is, in full precision."""
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:
        problem = "JAX was told to do without CPU, where what is exported is checked. "
        problem += 'Name it too, as in JAX_PLATFORMS="cuda,cpu".'
        raise WeightsError(spec.name, [problem]) from None


def difference(model: NFNet, found_NC: np.ndarray, wanted_NC: np.ndarray, path: Path) -> float:
    """How far what was written is from the network; too far is a WeightsError."""
    if found_NC.shape != wanted_NC.shape:
        problem = f"The written program answers with {found_NC.shape}, not {wanted_NC.shape}."
        raise WeightsError(str(path), [problem])
    scale = max(float(np.abs(wanted_NC).max()), 1e-30)
    share = float(np.abs(found_NC - wanted_NC).max()) / scale
    limit = _TOLERANCE if model.dtype == np.float32 else _TOLERANCE_OF_LOW_PRECISION
    if not share <= limit:  # so that NaN fails as well
        problem = f"The written program is {share:.2g} of the largest logit away from the network. "
        problem += "Nothing was kept."
        raise WeightsError(str(path), [problem])
    return share


def require_exportable(model: NFNet, resolution: int, class_names: Sequence[str]) -> None:
    """Raise WeightsError or TypeError where a network cannot be exported as asked."""
    if not isinstance(model, NFNet):
        raise TypeError(f"only an NFNet can be exported, and this is a {type(model).__name__}")
    classes, problems = model.spec.head.num_classes, []
    if resolution < 1:
        problems.append(f"resolution = {resolution}: allowed are whole numbers from 1.")
    if class_names and len(class_names) != classes:
        problems.append(f"There are {len(class_names)} class names for {classes} classes.")
    if problems:
        raise WeightsError(model.spec.name, problems)


def about(model: NFNet, resolution: int, class_names: Sequence[str]) -> dict[str, Any]:
    """The network, its labels and what to do to an image, for the reader of what is exported."""
    return {
        "network": model.spec.name,
        "nfflax": nfflax.__version__,
        "preprocess": _preprocess(model.spec, resolution),
        "class_names": list(class_names),
        "spec": model.spec.model_dump(mode="json"),
    }


def output_name(model: NFNet) -> str:
    """What the numbers that come out are."""
    return "logits" if model.spec.head.num_classes else "features"


def _preprocess(spec: Spec, side: int) -> dict[str, Any]:
    """In words and in numbers, how an image becomes one for the network (see EvalView)."""
    how, channels = spec.preprocess, spec.stem.in_channels
    target = int(side / how.crop_fraction) + how.crop_margin
    if how.crop == "squash":
        resize = f"Resize to {target} x {target} pixels, whatever the shape"
    else:
        resize = f"Resize the short side to {target} pixels, the other in proportion"
    kind = {1: "Greyscale", 3: "RGB"}.get(channels, f"{channels} channels")
    return {
        "steps": [
            f"{kind}, values from 0 to 255.",
            f"{resize}, by {how.interpolation} interpolation.",
            f"Cut out the central {side} x {side} pixels.",
            "Divide by 255, subtract the mean, divide by the standard deviation.",
        ],
        "resolution": side,
        "resize_to": target,
        "resize": how.crop,
        "interpolation": how.interpolation,
        "mean": list(how.mean),
        "std": list(how.std),
    }
