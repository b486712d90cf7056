"""A network made ready for inference: what is constant by then is baked into plain convolutions.

model = nfflax.fold(model)     # same calls, same results, less work in each

Scaled weight standardisation, gains, gamma, beta and alpha only scale: zero padding and average
pooling commute with them. So each goes into the kernel beside it, and the maps between blocks stay
what they are. BatchNorm's statistics go into the convolution before it, where nothing else reads
what that makes; elsewhere they become one factor and one offset.
"""

import functools
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from nfflax.nn.activations import get_activation
from nfflax.nn.block import Activate, Block
from nfflax.nn.body import Body, Stem
from nfflax.nn.init import ONES, ZEROS
from nfflax.nn.roles import SCALAR_ROLE, role_of, vector_role
from nfflax.nn.stage import Stage
from nfflax.nn.wsconv import Conv, WSConv

Network = TypeVar("Network", bound=Body)


class Affine(nnx.Module):
    """What is left of a BatchNorm at inference: a factor and an offset per channel, in float32."""

    def __init__(self, norm: nnx.BatchNorm):
        scale_C, shift_C = _constants(norm)
        self.scale = nnx.Param(scale_C, init=ONES, role=vector_role())
        self.bias = nnx.Param(shift_C, init=ZEROS, role=vector_role())

    def __call__(self, x_NHWC: jax.Array, use_running_average: bool = True) -> jax.Array:
        return x_NHWC * self.scale[...] + self.bias[...]


class ScaledGate(nnx.Module):
    """Channel attention times all that scales its residual branch, which may be 0."""

    def __init__(self, gate: Callable[[jax.Array], jax.Array], factor: jax.Array):
        self.gate = gate
        self.factor = nnx.Param(factor, init=ONES, role=SCALAR_ROLE)

    def __call__(self, x_NHWC: jax.Array) -> jax.Array:
        return self.gate(x_NHWC) * self.factor[...]


def fold(model: Network) -> Network:
    """A copy of a network for inference: every convolution is a plain `Conv` with a bias.

    It is of the same class, with the same calls, maps and spec; `folded` is True. Kernels are
    computed in float32 and kept in the compute dtype, where the parameters were on a mesh. Works
    inside `jax.jit` and `nnx.eval_shape`. A folded network is returned as it is.
    """
    return model if model.folded else _folded(*nnx.split(model))


@functools.partial(jax.jit, static_argnums=0)
def _folded(graph: nnx.GraphDef, state: nnx.State) -> nnx.Module:
    model = nnx.merge(graph, state)
    _fold_stem(model.stem, model.dtype)
    for stage in model.stages:
        _fold_stage(stage, model.dtype)
    if model.final_conv is not None:
        model.final_conv = _plain(model.final_conv, model.dtype)
    for _, part in list(nnx.iter_graph(model)):
        if isinstance(part, Activate) and isinstance(part.norm, nnx.BatchNorm):
            part.norm = Affine(part.norm)
    model.folded = True
    return model


def _fold_stem(stem: Stem, dtype: jnp.dtype) -> None:
    gamma = 1.0
    for i, conv in enumerate(stem.convs):
        act = stem.acts[i] if i < len(stem.acts) else None
        # The map of feature level 1 stays what it is.
        norm = None if act is None or i == stem.tapped else _take_norm(act)
        stem.convs[i] = _plain(conv, dtype, before=gamma, norm=norm)
        gamma = 1.0 if act is None else _take_gamma(act)


def _fold_stage(stage: Stage, dtype: jnp.dtype) -> None:
    fold_block = functools.partial(_fold_block, dtype=dtype)
    stage.first = fold_block(stage.first, stage.betas[0])
    if stage.rest is not None:
        betas = jnp.asarray(stage.betas[1:], jnp.float32)
        stage.rest = jax.vmap(fold_block)(stage.rest, betas)
    stage.betas = (1.0,) * len(stage.betas)
    # A loop is faster than its blocks one after another, which XLA slices from the stack first
    # (benchmarks/fold.py), and there is no backward pass to save memory for.
    stage.unroll, stage.remat = 1, "none"


def _fold_block(block: Block, beta: float | jax.Array, *, dtype: jnp.dtype) -> Block:
    """The block, changed in place, as it is without beta, alpha and gains."""
    strength = block.alpha * (block.skip_gain[...] if block.has_skip_gain else 1.0)
    attends_inside, attends_after = (
        block.attention_place == place for place in ("inside", "after")
    )
    gamma = _take_gamma(block.act0) * beta
    if block.has_projection:
        block.conv_shortcut = _plain(block.conv_shortcut, dtype, before=gamma)
    block.conv0 = _plain(block.conv0, dtype, before=gamma, norm=_take_norm(block.act1))
    gamma = _take_gamma(block.act1)
    norm = None if attends_inside else _take_norm(block.act2)
    if block.has_second_conv:
        block.conv1 = _plain(block.conv1, dtype, before=gamma, norm=_take_norm(block.act1b))
        block.conv1b = _plain(block.conv1b, dtype, before=_take_gamma(block.act1b), norm=norm)
    else:
        block.conv1 = _plain(block.conv1, dtype, before=gamma, norm=norm)
    gamma = _take_gamma(block.act2)
    after = 1.0 if attends_after else strength
    block.conv2 = _plain(block.conv2, dtype, before=gamma, after=after)
    if attends_inside or attends_after:
        block.attention = jax.tree.map(lambda leaf: leaf.astype(dtype), block.attention)
    if attends_after:
        factor = jnp.asarray(strength * block.attention_gain, dtype)
        block.attention, block.attention_gain = ScaledGate(block.attention, factor), 1.0
    block.alpha = 1.0
    if block.has_skip_gain:
        block.has_skip_gain = False
        del block.skip_gain
    return block


def _plain(
    conv: Conv,
    dtype: jnp.dtype,
    *,
    before: float | jax.Array = 1.0,
    norm: nnx.BatchNorm | None = None,
    after: float | jax.Array = 1.0,
) -> Conv:
    """The plain convolution that scales by `before`, does what `conv` and then `norm` do, and
    scales by `after`."""
    w_HWIO = conv.standardized() if isinstance(conv, WSConv) else conv.kernel[...]
    *window, inputs, outputs = w_HWIO.shape
    bias_O = jnp.zeros(outputs) if conv.bias is None else conv.bias[...]
    scale_O, shift_O = _constants(norm) if norm is not None else (1.0, 0.0)
    role = role_of(conv.kernel)
    assert role is not None
    in_axis, out_axis = map(str, role.axes[-2:])
    plain = Conv(
        inputs * conv.feature_group_count,
        outputs,
        window,
        conv.strides,
        padding=conv.padding,
        kernel_dilation=conv.kernel_dilation,
        feature_group_count=conv.feature_group_count,
        use_bias=True,
        in_axis=in_axis,
        out_axis=out_axis,
        rngs=nnx.Rngs(0),
    )
    assert plain.bias is not None
    plain.kernel.set_value((w_HWIO * (before * scale_O * after)).astype(dtype))
    plain.bias.set_value(((bias_O * scale_O + shift_O) * after).astype(dtype))
    return plain


def _constants(norm: nnx.BatchNorm) -> tuple[jax.Array, jax.Array]:
    """The factor and the offset that a BatchNorm comes to at inference."""
    assert norm.scale is not None
    assert norm.bias is not None
    scale_C = norm.scale[...] * jax.lax.rsqrt(norm.var[...] + norm.epsilon)
    return scale_C, norm.bias[...] - norm.mean[...] * scale_C


def _take_norm(act: Activate) -> nnx.BatchNorm | None:
    norm, act.norm = act.norm, None
    return norm if isinstance(norm, nnx.BatchNorm) else None


def _take_gamma(act: Activate) -> float:
    gamma = get_activation(act.name).gamma if act.scaled else 1.0
    act.scaled = False
    return gamma
