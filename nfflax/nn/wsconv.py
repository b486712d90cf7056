"""Convolutions with Scaled Weight Standardisation (arXiv:2101.08692, section 4.2), and plain ones.

Kernels are standardised per output unit in float32, whatever the compute dtype, then cast. What is
costly about it a layer does itself when called, or `measured` did it before for many layers.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from nfflax.nn.conv import Padding, conv
from nfflax.nn.init import ONES, ZEROS, Init, fan_in_normal
from nfflax.nn.lean import lean
from nfflax.nn.roles import kernel_role, param, vector_role

EpsMode = Literal["floor", "add"]
Part = TypeVar("Part")

# Name under which outputs are saved when only convolution outputs are kept for the backward pass.
CONV_OUTPUT = "nfflax_conv_output"


def standardize(
    w: jax.Array, gain: jax.Array, *, eps: float = 1e-4, eps_mode: EpsMode = "floor"
) -> jax.Array:
    """Kernel `w` (..., O) with zero mean and variance gain^2 / fan_in in every output unit.

    "floor" is the official epsilon, a lower bound on var * fan_in; "add" is timm's, added to the
    variance itself.
    """
    parts: Any = _measured(w, gain, eps, eps_mode)
    return _formed(*parts)


# Standardisation is in two parts: the sums over kernels, which can be taken once per step and over
# whole stacks, and the rest, done where a kernel is used, in the pass that casts it or copies it
# from its stack. The gradient of a formed kernel is handed on as it is: `_measured` knows how to
# make it that of the raw one.


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _measured(w: jax.Array, gain: jax.Array, eps: float, eps_mode: EpsMode):
    """`w`, and the scale and shift of every unit that `_formed` needs beside it.

    What leading axes the gain has are those of a stack of kernels.
    """
    return _measured_forward(w, gain, eps, eps_mode)[0]


def _measured_forward(w: jax.Array, gain: jax.Array, eps: float, eps_mode: EpsMode):
    v, axes = _fibres(w, gain)
    fan_in = math.prod(w.shape[gain.ndim - 1 : -1])
    mean = jnp.mean(v, axes, keepdims=True)
    var = jnp.mean(jnp.square(v - mean), axes, keepdims=True)
    if eps_mode == "floor":
        inverse = lax.rsqrt(jnp.maximum(var * fan_in, eps))
        moves = var * fan_in > eps  # at its floor the norm is a constant
    else:
        inverse, moves = lax.rsqrt(var + eps) * fan_in**-0.5, True
    scale = inverse * gain.reshape(mean.shape)
    found = (w, scale.reshape(gain.shape), (mean * scale).reshape(gain.shape))
    return found, (w, gain, mean, inverse, moves)


def _measured_backward(eps: float, eps_mode: EpsMode, saved, cotangents):
    """Both gradients from two sums per unit, in as few passes over the kernel as there can be."""
    del eps, eps_mode
    w, gain, mean, inverse, moves = saved
    (v, axes), (dy, _) = _fibres(w, gain), _fibres(cotangents[0], gain)
    fan_in = math.prod(w.shape[gain.ndim - 1 : -1])
    total = jnp.sum(dy, axes, keepdims=True)
    along = (jnp.sum(dy * v, axes, keepdims=True) - total * mean) * inverse
    scale = inverse * gain.reshape(mean.shape)
    pull = jnp.where(moves, scale * inverse * along, 0.0)
    dw = dy * scale - v * pull + (mean * pull - scale * total / fan_in)
    return dw.reshape(w.shape), along.reshape(gain.shape)


_measured.defvjp(_measured_forward, _measured_backward)


def _fibres(w: jax.Array, gain: jax.Array) -> tuple[jax.Array, tuple[int, ...]]:
    """The kernels without axes of length 1, and which axes hold the weights of one unit.

    Axes of length 1 cost XLA on CPU its fast reductions.
    """
    kept = [axis for axis in range(w.ndim - 1) if w.shape[axis] != 1]
    v = w.reshape(*(w.shape[axis] for axis in kept), w.shape[-1])
    return v, tuple(i for i, axis in enumerate(kept) if axis >= gain.ndim - 1)


@jax.custom_vjp
def _formed(w: jax.Array, scale: jax.Array, shift: jax.Array) -> jax.Array:
    """The standardised kernel, or a stack of them."""
    over = (1,) * (w.ndim - scale.ndim)
    scale, shift = (v.reshape(*v.shape[:-1], *over, v.shape[-1]) for v in (scale, shift))
    return w * scale - shift


_formed.defvjp(
    lambda w, scale, shift: (_formed(w, scale, shift), (scale, shift)),
    lambda vectors, dy: (dy, *map(jnp.zeros_like, vectors)),
)


class Conv(nnx.Module):
    """Plain convolution over one to three spatial axes, channels last.

    Arguments follow `nnx.Conv`, but `use_bias` is off by default: the batch-normalised baselines
    have none. With a bias it is what `nfflax.fold` makes of every convolution.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: Sequence[int] = (3, 3),
        strides: int | Sequence[int] = 1,
        *,
        padding: Padding = "same",
        kernel_dilation: int | Sequence[int] = 1,
        feature_group_count: int = 1,
        use_bias: bool = False,
        in_axis: str = "in",
        out_axis: str = "out",
        rngs: nnx.Rngs,
    ):
        shape = (*kernel_size, in_features // feature_group_count, out_features)
        role = kernel_role(shape, in_axis, out_axis)
        self.kernel = param(rngs, shape, fan_in_normal(shape), role)
        self.bias = param(rngs, (out_features,), ZEROS, vector_role(out_axis)) if use_bias else None
        self.strides = _static(strides)
        self.padding: Padding = padding
        self.kernel_dilation = _static(kernel_dilation)
        self.feature_group_count = feature_group_count

    def __call__(self, x_NHWC: jax.Array) -> jax.Array:
        def convolve(x_NHWC: jax.Array, *parts: jax.Array) -> jax.Array:
            return conv(
                x_NHWC,
                self._formed(*parts).astype(x_NHWC.dtype),
                stride=self.strides,
                padding=self.padding,
                dilation=self.kernel_dilation,
                groups=self.feature_group_count,
            )

        y_NHWC = lean(convolve)(x_NHWC, *self._parts())
        if self.bias is not None:
            y_NHWC = y_NHWC + self.bias[...].astype(x_NHWC.dtype)
        return checkpoint_name(y_NHWC, CONV_OUTPUT)

    def _parts(self) -> tuple[jax.Array, ...]:
        """What a kernel is formed of."""
        return (self.kernel[...],)

    def _formed(self, *parts: jax.Array) -> jax.Array:
        return parts[0]


class WSConv(Conv):
    """Scaled weight-standardised convolution with gain and bias.

    Arguments are those of Conv, and `gain_init`; `eps` and `eps_mode` as `standardize` has them;
    `scale`, a constant that multiplies every kernel (timm's gamma).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: Sequence[int] = (3, 3),
        strides: int | Sequence[int] = 1,
        *,
        gain_init: Init = ONES,
        eps: float = 1e-4,
        eps_mode: EpsMode = "floor",
        scale: float = 1.0,
        out_axis: str = "out",
        rngs: nnx.Rngs,
        **geometry: Any,
    ):
        shape = (in_features, out_features, kernel_size, strides)
        super().__init__(*shape, use_bias=True, out_axis=out_axis, rngs=rngs, **geometry)
        self.gain = param(rngs, (out_features,), gain_init, vector_role(out_axis))
        self.eps, self.scale = eps, scale
        self.eps_mode: EpsMode = eps_mode
        # `measured` sets it, and puts the scale that goes with it in the gain's place.
        self.shift: nnx.Param[jax.Array] | None = None

    def standardized(self) -> jax.Array:
        """The float32 kernel that the input is convolved with; all of them of stacked layers."""
        return self._formed(*self._parts())

    def _parts(self) -> tuple[jax.Array, ...]:
        if self.shift is not None:
            return self.kernel[...], self.gain[...], self.shift[...]
        return _measured(self.kernel[...], self.gain[...] * self.scale, self.eps, self.eps_mode)

    def _formed(self, *parts: jax.Array) -> jax.Array:
        return _formed(*parts)


def measured(part: Part) -> Part:
    """A copy of any part of a network, stacked or not, with every kernel in it measured.

    Outside loops over layers and microbatches, and outside what is computed again in the backward
    pass, this is done once, and over whole stacks at a time.
    """

    def ready(module: Any) -> Any:
        if not isinstance(module, WSConv):
            return module
        kernel, scale, shift = module._parts()
        module = jax.tree.map(lambda leaf: leaf, module)
        module.kernel.set_value(kernel)
        module.gain.set_value(scale)
        module.shift = nnx.data(nnx.Param(shift))
        return module

    return jax.tree.map(ready, part, is_leaf=lambda module: isinstance(module, WSConv))


class WSConvTranspose(nnx.Module):
    """Scaled weight-standardised transposed convolution, for decoders: input size * strides.

    With stride s an output pixel sees 1 / prod(s) of the kernel, so the standardised kernel is
    scaled by sqrt(prod(s)): on average the output keeps the input's variance.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: Sequence[int] = (4, 4),
        strides: int | Sequence[int] = 2,
        *,
        eps: float = 1e-4,
        rngs: nnx.Rngs,
    ):
        shape = (*kernel_size, in_features, out_features)
        self.kernel = param(rngs, shape, fan_in_normal(shape), kernel_role(shape))
        self.gain = param(rngs, (out_features,), ONES, vector_role())
        self.bias = param(rngs, (out_features,), ZEROS, vector_role())
        per_axis = (strides,) * len(kernel_size) if isinstance(strides, int) else strides
        self.strides = tuple(per_axis)
        self.eps = eps

    def __call__(self, x_NHWC: jax.Array) -> jax.Array:
        gain_O = self.gain[...] * math.prod(self.strides) ** 0.5
        w_HWIO = standardize(self.kernel[...], gain_O, eps=self.eps).astype(x_NHWC.dtype)
        # Zeros between the pixels, then an ordinary convolution of the spread map.
        spread = [(0, 0, 0), *((0, 0, s - 1) for s in self.strides), (0, 0, 0)]
        x_NHWC = lax.pad(x_NHWC, jnp.zeros((), x_NHWC.dtype), spread)
        pads = []
        for k, s in zip(w_HWIO.shape[:-2], self.strides, strict=True):  # as jax.lax.conv_transpose
            before = k - 1 if s > k - 1 else -(-(k + s - 2) // 2)
            pads.append((before, k + s - 2 - before))
        return conv(x_NHWC, w_HWIO, padding=pads) + self.bias[...].astype(x_NHWC.dtype)


def _static(value: int | Sequence[int]) -> int | tuple[int, ...]:
    """A module attribute that hashes."""
    return value if isinstance(value, int) else tuple(value)
