"""Trained weights for images of other channels, and for other classes.

Images of n channels are read as RGB, x = M y, where every row of M sums to 1. So the network
answers to a grey image as it did to the RGB image that is as grey, and to an image that repeats RGB
as it did to RGB.

Adding up raw kernels would not do that: weight standardisation undoes their scale and keeps their
mean out. What is composed here is the standardised kernel D. Its mean over a unit is zero and,
because the rows of M sum to 1, so is that of D M: there are a kernel and a gain that weight
standardisation turns into D M exactly.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from nfflax.nn.builder import build
from nfflax.nn.init import draw_all
from nfflax.spec.load import load_spec
from nfflax.spec.schema import Numerics, Spec
from nfflax.weights.errors import WeightsError

Values = Mapping[tuple[Any, ...], np.ndarray]
"""Arrays of a network by their paths in its state."""

CLASSES, CHANNELS = "head.num_classes", "stem.in_channels"
"""The keys of a spec that weights can be adapted in."""
_KERNEL, _GAIN = ("stem", "convs", 0, "kernel"), ("stem", "convs", 0, "gain")
# A unit whose kernel is this small beside a standardised one holds nothing but rounding.
_NOTHING = 1e-12


def channel_mix(before: int, after: int) -> np.ndarray:
    """M (before, after): how each channel a network knows is made from those of its new images.

    To and from one channel it is their mean. Two channels are read as a grey image of their mean;
    of more than three, each is R, G or B in turn. Raises WeightsError for what has no meaning.
    """
    if before == after:
        return np.eye(before)
    if after == 1 or before == 1 or (before == 3 and after == 2):
        return np.full((before, after), 1 / after)
    if before == 3:
        repeats = np.arange(after) % 3 == np.arange(3)[:, None]
        return repeats / repeats.sum(1, keepdims=True)
    message = f"a network for {before} channels cannot be adapted to {after}"
    raise WeightsError(CHANNELS, [f"{message}: allowed are {before} and 1"])


def adapted_spec(
    spec: Spec, *, num_classes: int | None = None, in_channels: int | None = None
) -> Spec:
    """The spec for other classes and channels; the channels' mean and std follow."""
    changes: dict[str, Any] = {}
    if num_classes is not None:
        changes[CLASSES] = num_classes
    if in_channels is not None and in_channels != spec.stem.in_channels:
        changes[CHANNELS] = in_channels
        mix = channel_mix(spec.stem.in_channels, in_channels)
        for key in spec.preprocess.per_channel:
            values = np.asarray(getattr(spec.preprocess, key))
            if len(values) == len(mix) > 1:
                mixed = (mix / mix.sum(0)).T @ values
                changes[f"preprocess.{key}"] = [round(x, 9) for x in _one_if_equal(mixed).tolist()]
    return load_spec(spec, changes) if changes else spec


def with_channels(values: Values, spec: Spec, in_channels: int) -> dict[tuple[Any, ...], Any]:
    """The arrays of `spec`'s network, with a first convolution for images of other channels."""
    changed = dict(values)
    mix = channel_mix(spec.stem.in_channels, in_channels)
    w_HWIO = np.asarray(changed[_KERNEL], np.float64)
    if spec.norm.kind == "batch":
        changed[_KERNEL] = _composed(w_HWIO, mix).astype(np.float32)
        return changed
    # The gain is a factor of each unit: composing without it keeps the kernels where it is zero.
    composed_HWIO = _composed(_standardized(w_HWIO, spec.numerics), mix)
    fan_in = math.prod(composed_HWIO.shape[:-1])
    scale_O = composed_HWIO.std((0, 1, 2)) * fan_in**0.5
    is_nothing_O = scale_O <= _NOTHING
    w_HWIO = np.where(is_nothing_O, 0.0, composed_HWIO) / np.where(is_nothing_O, 1.0, scale_O)
    changed[_KERNEL] = w_HWIO.astype(np.float32)
    # What weight standardisation makes of a kernel of variance 1 / fan_in.
    factor = _factor(np.asarray(1 / fan_in), fan_in, spec.numerics)
    gain_O = np.where(is_nothing_O, 0.0, np.asarray(changed[_GAIN]) * scale_O / factor)
    changed[_GAIN] = gain_O.astype(np.float32)
    return changed


def new_classifier(spec: Spec, rngs: nnx.Rngs) -> dict[str, Any]:
    """The parameters of a classifier, drawn as the spec says, in a plain dict."""
    network = nnx.eval_shape(lambda: build(spec, rngs=nnx.Rngs(0)))
    return nnx.to_pure_dict(jax.jit(draw_all)(rngs.params(), nnx.state(network.classifier)))


def _composed(w_HWIO: np.ndarray, mix: np.ndarray) -> np.ndarray:
    return np.einsum("hwio,ij->hwjo", w_HWIO, mix)


def _standardized(w_HWIO: np.ndarray, numerics: Numerics) -> np.ndarray:
    """The kernel that the network convolves with, but for gain and the constant scale."""
    axes, fan_in = (0, 1, 2), math.prod(w_HWIO.shape[:-1])
    centred_HWIO = w_HWIO - w_HWIO.mean(axes)
    return centred_HWIO * _factor(w_HWIO.var(axes), fan_in, numerics)


def _factor(var: np.ndarray, fan_in: int, numerics: Numerics) -> np.ndarray:
    """What a centred kernel of variance `var` is multiplied by, as nn/wsconv.py has it."""
    if numerics.ws_eps_mode == "floor":
        return np.maximum(var * fan_in, numerics.ws_eps) ** -0.5
    return ((var + numerics.ws_eps) * fan_in) ** -0.5


def _one_if_equal(values: np.ndarray) -> np.ndarray:
    return values[:1] if np.ptp(values) == 0 else values
