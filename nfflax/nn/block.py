"""The residual block of every family: x + alpha * skip_gain * f(beta * activation(x)).

f is 1x1, one or two grouped kxk, 1x1, with channel attention after or inside. Which of these a
block has is in its BlockPlan; where implementations differ is in the spec's `numerics`.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import einops
import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from nfflax.nn.activations import get_activation, saving
from nfflax.nn.attention import EfficientChannelAttention, SqueezeExcite
from nfflax.nn.conv import resolve_padding
from nfflax.nn.init import ONES, ZEROS
from nfflax.nn.roles import SCALAR_ROLE, param, vector_role
from nfflax.nn.wsconv import Conv, WSConv
from nfflax.spec.parts import BlockPlan
from nfflax.spec.schema import Spec


class BlockSignals(NamedTuple):
    """What signal propagation plots show of one block (arXiv:2101.08692, section 3)."""

    avg_sq_mean: jax.Array
    avg_var: jax.Array
    res_avg_var: jax.Array


class Activate(nnx.Module):
    """The nonlinearity with its gamma, after a BatchNorm where the spec asks for one."""

    def __init__(self, spec: Spec, channels: int, *, axis: str = "out", rngs: nnx.Rngs):
        self.name = spec.numerics.activation
        self.scaled = spec.numerics.gamma == "activation"
        self.norm: Callable[..., jax.Array] | None = (
            batch_norm(spec, channels, axis, rngs) if spec.norm.kind == "batch" else None
        )

    def __call__(self, x_NHWC: jax.Array, train: bool) -> jax.Array:
        if self.norm is not None:
            # In float32, as its statistics; then back to the compute dtype.
            normed_NHWC = self.norm(x_NHWC, use_running_average=not train)
            x_NHWC = normed_NHWC.astype(x_NHWC.dtype)
        activation = get_activation(self.name)
        y_NHWC = saving(activation.function)(x_NHWC)
        return y_NHWC * activation.gamma if self.scaled else y_NHWC


def batch_norm(spec: Spec, channels: int, axis: str, rngs: nnx.Rngs) -> nnx.BatchNorm:
    """BatchNorm over the whole (also the sharded) batch, with roles on its parameters."""
    return nnx.BatchNorm(
        channels,
        use_running_average=True,
        momentum=spec.norm.momentum,
        epsilon=spec.norm.eps,
        scale_metadata={"init": ONES, "role": vector_role(axis)},
        bias_metadata={"init": ZEROS, "role": vector_role(axis)},
        rngs=rngs,
    )


def make_conv(
    spec: Spec,
    in_channels: int,
    out_channels: int,
    kernel: int = 1,
    stride: int = 1,
    *,
    groups: int = 1,
    dilation: int = 1,
    in_axis: str = "in",
    out_axis: str = "out",
    zero_gain: bool = False,
    rngs: nnx.Rngs,
) -> Conv:
    """The spec's convolution: scaled weight-standardised, or plain under batch normalisation."""
    numerics = spec.numerics
    geometry = {
        "padding": numerics.padding,
        "kernel_dilation": dilation,
        "feature_group_count": groups,
        "in_axis": in_axis,
        "out_axis": out_axis,
    }
    shape = (in_channels, out_channels, (kernel, kernel), stride)
    if spec.norm.kind == "batch":
        return Conv(*shape, **geometry, rngs=rngs)
    gamma = get_activation(numerics.activation).gamma if numerics.gamma == "conv" else 1.0
    return WSConv(
        *shape,
        **geometry,
        gain_init=ZEROS if zero_gain else ONES,
        eps=numerics.ws_eps,
        eps_mode=numerics.ws_eps_mode,
        scale=gamma,
        rngs=rngs,
    )


class Block(nnx.Module):
    """One residual block. beta, drop rate and key come with the call: they vary along a stack."""

    def __init__(self, plan: BlockPlan, spec: Spec, *, rngs: nnx.Rngs):
        mid, out = plan.mid_channels, plan.out_channels
        pooled = plan.projection and spec.stages.shortcut == "avgpool+1x1"
        self.pool_stride = plan.stride if pooled else 1
        # A stride that became a dilation still averages neighbours, at full resolution (timm).
        dilates = plan.dilation != plan.first_dilation
        self.pool_window = 2 if pooled and dilates else self.pool_stride
        self.has_projection = plan.projection
        if plan.projection:
            stride = 1 if pooled else plan.stride
            self.conv_shortcut = make_conv(spec, plan.in_channels, out, stride=stride, rngs=rngs)
        self.act0 = Activate(spec, plan.in_channels, rngs=rngs)
        self.conv0 = make_conv(spec, plan.in_channels, mid, out_axis="mid_out", rngs=rngs)
        self.act1 = Activate(spec, mid, axis="mid_out", rngs=rngs)
        spatial_conv = functools.partial(
            make_conv,
            spec,
            mid,
            mid,
            plan.kernel,
            groups=plan.groups,
            in_axis="group_in",
            out_axis="mid_out",
            rngs=rngs,
        )
        self.conv1 = spatial_conv(stride=plan.stride, dilation=plan.first_dilation)
        self.has_second_conv = plan.spatial_convs == 2
        if self.has_second_conv:
            self.act1b = Activate(spec, mid, axis="mid_out", rngs=rngs)
            self.conv1b = spatial_conv(dilation=plan.dilation)
        self.act2 = Activate(spec, mid, axis="mid_out", rngs=rngs)
        zero_gain = spec.block.last_gain == "zeros"
        self.conv2 = make_conv(spec, mid, out, in_axis="mid_in", zero_gain=zero_gain, rngs=rngs)
        self.attention: Callable[[jax.Array], jax.Array]
        if spec.attention.kind == "se":
            self.attention = SqueezeExcite(plan.attention_width, plan.attention_hidden, rngs=rngs)
        elif spec.attention.kind == "eca":
            self.attention = EfficientChannelAttention(plan.attention_hidden, rngs=rngs)
        self.attention_place = "none" if spec.attention.kind == "none" else spec.attention.position
        self.attention_gain = spec.attention.gain
        self.has_skip_gain = spec.block.skip_gain != "none"
        if self.has_skip_gain:
            init = ONES if spec.block.skip_gain == "ones" else ZEROS
            self.skip_gain = param(rngs, (), init, SCALAR_ROLE)
        self.alpha = plan.alpha
        self.scale_by_keep = spec.regularization.scale_by_keep

    def __call__(
        self,
        x_NHWC: jax.Array,
        beta: float | jax.Array,
        *,
        drop_rate: float | jax.Array = 0.0,
        key: jax.Array | None = None,
        train: bool = False,
        with_signals: bool = False,
    ) -> tuple[jax.Array, BlockSignals | None]:
        """The block's output, and its signals when asked for. Without a key nothing is dropped."""
        h_NHWC = self.act0(x_NHWC, train) * jnp.asarray(beta, x_NHWC.dtype)
        shortcut_NHWC = self._shortcut(x_NHWC, h_NHWC)
        h_NHWC = self.conv0(h_NHWC)
        h_NHWC = self.conv1(self.act1(h_NHWC, train))
        if self.has_second_conv:
            h_NHWC = self.conv1b(self.act1b(h_NHWC, train))
        if self.attention_place == "inside":
            h_NHWC = h_NHWC * self._gate(h_NHWC)
        h_NHWC = self.conv2(self.act2(h_NHWC, train))
        # What scales a whole map is multiplied first, one number per image and channel, so that the
        # map is read once, and kept once for the backward pass.
        scale = gate = self._gate(h_NHWC) if self.attention_place == "after" else 1.0
        if key is not None:
            scale = scale * drop_scale(
                len(x_NHWC), drop_rate, key, x_NHWC.dtype, scale_by_keep=self.scale_by_keep
            )
        if self.has_skip_gain:
            scale = scale * self.skip_gain[...].astype(x_NHWC.dtype)
        y_NHWC = h_NHWC * (scale * self.alpha) + shortcut_NHWC
        if not with_signals:
            return y_NHWC, None
        branch_NHWC = h_NHWC * gate
        return y_NHWC, BlockSignals(*map_signals(y_NHWC), average_variance(branch_NHWC))

    def _shortcut(self, x_NHWC: jax.Array, h_NHWC: jax.Array) -> jax.Array:
        if not self.has_projection:
            return x_NHWC
        if self.pool_window > 1:
            h_NHWC = average_pool(h_NHWC, self.pool_window, self.pool_stride)
        return self.conv_shortcut(h_NHWC)

    def _gate(self, h_NHWC: jax.Array) -> jax.Array:
        return self.attention(h_NHWC) * self.attention_gain


def drop_scale(
    rows: int,
    rate: float | jax.Array,
    key: jax.Array,
    dtype: jax.typing.DTypeLike,
    *,
    scale_by_keep: bool,
) -> jax.Array:
    """Stochastic depth (arXiv:1603.09382): what the branches of images are multiplied by."""
    keep = 1.0 - jnp.asarray(rate, jnp.float32)
    mask_N111 = jax.random.bernoulli(key, keep, (rows, 1, 1, 1)).astype(dtype)
    return mask_N111 / keep.astype(dtype) if scale_by_keep else mask_N111


def average_pool(x_NHWC: jax.Array, window: int, stride: int) -> jax.Array:
    """Mean over the valid pixels of each window (TensorFlow's SAME, PyTorch's ceil_mode)."""
    pads = resolve_padding("same", x_NHWC.shape[1:3], (window, window), (stride, stride), (1, 1))
    height, width = x_NHWC.shape[1:3]
    if stride == window and height % stride == 0 and width % stride == 0:
        # Whole windows are a plain mean, which is faster than a window reduction.
        tiles = "n (h p) (w q) c -> n h w c"
        return einops.reduce(x_NHWC, tiles, "mean", p=stride, q=stride)

    def summed(x: jax.Array) -> jax.Array:
        dims, strides = (1, window, window, 1), (1, stride, stride, 1)
        return lax.reduce_window(x, 0.0, lax.add, dims, strides, ((0, 0), *pads, (0, 0)))

    valid_HW = summed(jnp.ones((1, height, width, 1), jnp.float32))
    return (summed(x_NHWC.astype(jnp.float32)) / valid_HW).astype(x_NHWC.dtype)


def average_variance(x_NHWC: jax.Array) -> jax.Array:
    """Mean over channels of each channel's variance over the batch and the map."""
    return jnp.mean(jnp.var(x_NHWC.astype(jnp.float32), axis=(0, 1, 2)))


def map_signals(x_NHWC: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(mean over channels of the squared channel mean, average channel variance)."""
    mean_C = jnp.mean(x_NHWC.astype(jnp.float32), axis=(0, 1, 2))
    return jnp.mean(mean_C**2), average_variance(x_NHWC)
