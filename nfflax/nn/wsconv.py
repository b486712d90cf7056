"""Convolutions with Scaled Weight Standardisation (arXiv:2101.08692, section 4.2), and plain ones.

Kernels are standardised per output unit in float32, whatever the compute dtype, then cast. A layer
does it itself when called; `standardized` does it beforehand for many layers.
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
    # Axes of length 1 cost XLA on CPU its fast reductions.
    window = tuple(axis for axis in range(w.ndim - 1) if w.shape[axis] == 1)
    return jnp.expand_dims(_standardize(jnp.squeeze(w, window), gain, eps, eps_mode), window)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _standardize(w: jax.Array, gain: jax.Array, eps: float, eps_mode: EpsMode) -> jax.Array:
    return _standardize_forward(w, gain, eps, eps_mode)[0]


def _standardize_forward(w: jax.Array, gain: jax.Array, eps: float, eps_mode: EpsMode):
    axes, fan_in = tuple(range(w.ndim - 1)), w.size // w.shape[-1]
    mean = jnp.mean(w, axes)
    var = jnp.mean(jnp.square(w - mean), axes)
    if eps_mode == "floor":
        inverse = lax.rsqrt(jnp.maximum(var * fan_in, eps))
        moves = var * fan_in > eps  # at its floor the norm is a constant
    else:
        inverse, moves = lax.rsqrt(var + eps) * fan_in**-0.5, True
    scale = inverse * gain
    return w * scale - mean * scale, (w, gain, mean, inverse, moves)


def _standardize_backward(eps: float, eps_mode: EpsMode, saved, dy: jax.Array):
    """Both gradients from two sums per unit, in as few passes over the kernel as there can be."""
    del eps, eps_mode
    w, gain, mean, inverse, moves = saved
    axes, fan_in = tuple(range(w.ndim - 1)), w.size // w.shape[-1]
    total = jnp.sum(dy, axes)
    along = (jnp.sum(dy * w, axes) - total * mean) * inverse
    scale = inverse * gain
    pull = jnp.where(moves, scale * inverse * along, 0.0)
    return dy * scale - w * pull + (mean * pull - scale * total / fan_in), along


_standardize.defvjp(_standardize_forward, _standardize_backward)


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
        return self._convolve(x_NHWC, self.kernel[...])

    def _convolve(self, x_NHWC: jax.Array, w_HWIO: jax.Array) -> jax.Array:
        y_NHWC = conv(
            x_NHWC,
            w_HWIO.astype(x_NHWC.dtype),
            stride=self.strides,
            padding=self.padding,
            dilation=self.kernel_dilation,
            groups=self.feature_group_count,
        )
        if self.bias is not None:
            y_NHWC = y_NHWC + self.bias[...].astype(x_NHWC.dtype)
        return checkpoint_name(y_NHWC, CONV_OUTPUT)


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
        self.rank = len(kernel_size) + 2
        self.is_standardized = False  # what `standardized` sets
        self.eps, self.scale = eps, scale
        self.eps_mode: EpsMode = eps_mode

    def __call__(self, x_NHWC: jax.Array) -> jax.Array:
        return self._convolve(x_NHWC, self.standardized())

    def standardized(self) -> jax.Array:
        """The float32 kernel that the input is convolved with; all of them of stacked layers."""
        if self.is_standardized:
            return self.kernel[...]
        form = functools.partial(standardize, eps=self.eps, eps_mode=self.eps_mode)
        for _ in range(self.kernel.ndim - self.rank):
            form = jax.vmap(form)
        return form(self.kernel[...], self.gain[...] * self.scale)


def standardized(part: Part) -> Part:
    """A copy of any part of a network, stacked or not, with every kernel in it standardised.

    Outside loops over layers and microbatches, and outside what is computed again in the backward
    pass, this is done once, and over whole stacks at a time.
    """

    def ready(module: Any) -> Any:
        if not isinstance(module, WSConv):
            return module
        kernel = module.standardized()
        module = jax.tree.map(lambda leaf: leaf, module)
        module.kernel.set_value(kernel)
        module.is_standardized = True
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
