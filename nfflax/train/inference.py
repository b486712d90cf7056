"""A trained network in one line, and what it sees in images.

loaded = load_model("runs/digits")
found = predictions(loaded.model, images_NHWC)  # uint8, as loaded.view makes them
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from nfflax.data.augment import normalize
from nfflax.data.views import EvalView
from nfflax.nn.builder import build
from nfflax.nn.net import NFNet
from nfflax.spec.errors import Problem
from nfflax.spec.load import Source, load_spec
from nfflax.spec.run import Run
from nfflax.train.errors import CheckpointError
from nfflax.train.transfer import open_weights


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


def load_model(path: str, *, spec: Source | None = None, **how: Any) -> Loaded:
    """The network of a run's folder, of one of its checkpoints, or of a file DeepMind released.

    `spec` is the network of a file that is none of the released ones; where the network is known,
    it must be the same, and may have another resolution. `how` goes to `nfflax.build`; the compute
    type is the run's unless `how` says otherwise.
    """
    asked = None if spec is None else load_spec(spec)
    found = open_weights(path, asked)
    if found.run is not None:
        how = {"dtype": found.run.model.dtype, "unroll": found.run.model.unroll} | how
    graph = nnx.graphdef(nnx.eval_shape(lambda: build(found.spec, rngs=nnx.Rngs(0), **how)))
    model = nnx.merge(graph, *found.arrays())
    return Loaded(model, found.run, found.class_names, found.step, found.notes)


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
    compiled once for any number of images. Without it, it gets all at once.
    """
    images_NHWC = np.asarray(images_NHWC)
    classes, count = model.spec.head.num_classes, len(images_NHWC)
    if not classes:
        message = "has no classifier, so there is nothing to predict"
        raise CheckpointError([Problem(model.spec.name, "head.num_classes", message, classes)])
    size, top = batch_size or count, min(top, classes)
    graph, state = nnx.split(model)
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
