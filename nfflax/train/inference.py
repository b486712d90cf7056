"""A trained network in one line, and what it sees in images.

loaded = load_model("runs/digits")
found = predictions(loaded.model, images_NHWC)  # uint8, as loaded.view makes them
"""

import dataclasses
import functools
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from nfflax.data.views import EvalView
from nfflax.nn.builder import build
from nfflax.nn.net import NFNet
from nfflax.pixels import normalize
from nfflax.spec.errors import Problem
from nfflax.spec.files import Origin
from nfflax.spec.load import Source, load_spec
from nfflax.spec.run import Run
from nfflax.spec.schema import Spec
from nfflax.train.errors import CheckpointError
from nfflax.train.transfer import Pretrained, open_weights
from nfflax.weights.adapt import CLASSES, adapted_spec, new_classifier
from nfflax.weights.fold import fold


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A trained network and what is known of it."""

    model: NFNet
    """In evaluation mode, with the average of its weights where the run kept one."""
    run: Run | None
    """How it was trained; None for a released file."""
    class_names: tuple[str, ...]
    """In the order of the outputs; empty where they are not known."""
    step: int | None
    """Updates made until then; None for a released file."""
    notes: tuple[str, ...]
    """What its user should know, such as checkpoints that were passed over as damaged."""

    @property
    def view(self) -> EvalView:
        """What makes an encoded or decoded image of any size into one for the network."""
        return EvalView.of(self.model.spec)


def load_model(
    place: str | os.PathLike[str],
    *,
    spec: Source | None = None,
    num_classes: int | None = None,
    in_channels: int | None = None,
    overrides: Mapping[str, Any] | None = None,
    rngs: nnx.Rngs | None = None,
    **how: Any,
) -> Loaded:
    """The trained network at a place: a run's folder, one of its checkpoints, a file, an address,
    `hf://owner/repo`, or the name of a preset with published weights (docs/weights.md).

    `spec` is the network of a file that does not say it; where it is known, it must be the same.
    Another `num_classes` gets a new classifier, drawn from `rngs`, and 0 none; other `in_channels`
    an adapted first convolution. `overrides` changes what leaves the meaning of weights as it is,
    by dotted key: `{"resolution.test": 320, "head.dropout": 0.5}`. `how` goes to `nfflax.build`;
    the compute type is the run's, or float32, unless `how` says otherwise.
    """
    found = open_weights(os.fspath(place), None if spec is None else load_spec(spec))
    if overrides:
        wanted = load_spec(found.spec, overrides)
        found = found.seen_as(wanted, Origin("overrides"))
        num_classes = wanted.head.num_classes if num_classes is None else num_classes
        in_channels = wanted.stem.in_channels if in_channels is None else in_channels
    return network_of(found, num_classes=num_classes, in_channels=in_channels, rngs=rngs, **how)


def network_of(
    found: Pretrained,
    *,
    num_classes: int | None = None,
    in_channels: int | None = None,
    rngs: nnx.Rngs | None = None,
    **how: Any,
) -> Loaded:
    """The network of weights that were opened, as `load_model` makes it."""
    before = found.spec.head.num_classes
    if in_channels is not None:
        found = found.with_channels(in_channels)
    final, params, stats = _with_classes(found, num_classes, rngs)
    if found.run is not None:
        how = {"dtype": found.run.model.dtype, "unroll": found.run.model.unroll} | how
    graph = nnx.graphdef(nnx.eval_shape(lambda: build(final, rngs=nnx.Rngs(0), **how)))
    names = found.class_names if final.head.num_classes == before else ()
    return Loaded(nnx.merge(graph, params, stats), found.run, names, found.step, found.notes)


def _with_classes(
    found: Pretrained, num_classes: int | None, rngs: nnx.Rngs | None
) -> tuple[Spec, dict[Any, Any], Any]:
    """(spec, parameters, statistics) for so many classes."""
    before = found.spec.head.num_classes
    spec = adapted_spec(found.spec, num_classes=num_classes)
    classes = spec.head.num_classes
    if classes not in (0, before) and rngs is None:
        message = f"the classifier for {before:,} classes cannot be kept: a new one is drawn"
        allowed = "rngs=nnx.Rngs(0), to draw it from, or num_classes=0, for none"
        raise CheckpointError([Problem(found.path, CLASSES, message, classes, allowed)])
    params, stats = found.arrays()
    if classes != before:
        params = {key: value for key, value in params.items() if key != "classifier"}
        if classes and rngs is not None:
            params["classifier"] = new_classifier(spec, rngs)
    return spec, params, stats


class Predictions(NamedTuple):
    """For every image the likeliest classes, the likeliest first."""

    classes: np.ndarray
    """Numbers of the classes, (images, top)."""
    probabilities: np.ndarray
    """Their share of the softmax, (images, top)."""


def predictions(
    model: NFNet, images_NHWC: ArrayLike, *, top: int = 5, batch_size: int | None = None
) -> Predictions:
    """The `top` likeliest classes of uint8 images, as `Loaded.view` makes them.

    With `batch_size` the network always gets so many at a time, the last ones filled up, and is
    compiled once for any number of images. Without it, it gets all at once. The network is folded
    first: whoever calls this often gives it `nfflax.fold(model)`, which is folded already.
    """
    images_NHWC = np.asarray(images_NHWC)
    classes, count = model.spec.head.num_classes, len(images_NHWC)
    if not classes:
        message = "has no classifier, so there is nothing to predict"
        raise CheckpointError([Problem(model.spec.name, "head.num_classes", message, classes)])
    size, top = batch_size or count, min(top, classes)
    graph, state = nnx.split(fold(model))
    parts = [(np.zeros((0, top), np.int32), np.zeros((0, top), np.float32))]
    for start in range(0, count, size or 1):
        rows_NHWC = images_NHWC[start : start + size]
        missing = ((0, size - len(rows_NHWC)), (0, 0), (0, 0), (0, 0))
        found = jax.device_get(_likeliest(graph, top, state, np.pad(rows_NHWC, missing)))
        parts.append(tuple(values[: len(rows_NHWC)] for values in found))
    return Predictions(*(np.concatenate(values) for values in zip(*parts, strict=True)))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _likeliest(
    graph: nnx.GraphDef, top: int, state: nnx.State, images_NHWC: jax.Array
) -> tuple[jax.Array, jax.Array]:
    model = nnx.merge(graph, state)
    x_NHWC = normalize(images_NHWC, model.spec.preprocess, dtype=model.dtype)
    shares, classes = jax.lax.top_k(jax.nn.softmax(model(x_NHWC, train=False)), top)
    return classes, shares
