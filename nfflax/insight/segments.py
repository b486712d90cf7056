"""A network cut into segments, with the bytes that each of them leaves in a train step.

A segment is the stem, a stage's transition block, the stack of a stage's equal blocks, or the head.
Stacks run as loops, and what a loop keeps is exactly what automatic differentiation asks for.
Outside loops, where a stack of one block is too, the compiler computes cheap pieces again.
docs/cost.md has the comparison with compiled programs that these rules come from.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from nfflax.spec.parts import BlockPlan, ConvPlan
from nfflax.spec.plan import Plan

Remat = Literal["none", "block", "conv"]
Dtype = Literal["float32", "bfloat16"]

FLOAT32 = 4  # bytes of parameters, gradients and statistics in any case
# Maps that a GELU leaves outside loops in compiled programs, where tracing finds four or five. For
# TPUs that is its input: XLA computes all else as part of the convolution that uses it. For CPUs it
# keeps the hyperbolic tangent and one product, too.
_FUSED_MAPS = 1
_FUSED_MAPS_ON_CPU = 3


@dataclass(frozen=True)
class Segment:
    """A run of layers between two points of the timeline. Bytes are those of a whole batch."""

    name: str
    """Its blocks, as in "stage 2.0" and "stage 2.1-5"; or "stem", "head"."""
    stage: int | None
    """None for stem and head."""
    params: int
    macs: float
    """Multiply-adds of one image, forward."""
    kept: float
    """What the forward pass leaves for the backward pass."""
    standardized: float
    """Of what is kept, float32 kernels: on a mesh they are split as parameters are."""
    working: float
    """What the backward pass of one of its blocks needs besides, recomputed maps included."""
    recomputed_macs: float
    """Multiply-adds of one image that the backward pass does again."""

    @property
    def gradients(self) -> int:
        """Bytes of the gradients that its backward pass leaves."""
        return self.params * FLOAT32


@dataclass(frozen=True)
class Shape:
    """Numbers in the maps of a block, one image."""

    inputs: int
    pooled: int
    """The shortcut's input: the block's at the output's size."""
    wide_mid: int
    """Inside, before the stride."""
    mid: int
    outputs: int

    @classmethod
    def of(cls, block: BlockPlan, size: tuple[int, int]) -> "Shape":
        before, after = area(size), area(block.resolution)
        return cls(
            before * block.in_channels,
            after * block.in_channels,
            before * block.mid_channels,
            after * block.mid_channels,
            after * block.out_channels,
        )


@dataclass(frozen=True)
class Counter:
    """Walks the plan once, with the size of the current map."""

    plan: Plan
    batch: int
    dtype: Dtype
    remat: Remat
    on_cpu: bool

    @property
    def item(self) -> int:
        return bytes_of(self.dtype)

    def segments(self) -> Iterator[Segment]:
        """From the image to the loss."""
        yield self._stem()
        size = self.plan.input_size
        for conv in self.plan.stem:
            size = strided(size, conv.stride)
        if self.plan.spec.stem.pool == "max":
            size = strided(size, 2)
        for stage in self.plan.stages():
            for first, blocks in ((0, stage[:1]), (1, stage[1:])):
                if blocks:
                    yield self._blocks(blocks, first, size)
                    size = blocks[-1].resolution
        yield self._head(size)

    def _stem(self) -> Segment:
        convs, size, kept, largest = self.plan.stem, self.plan.input_size, 0.0, 0.0
        for i, conv in enumerate(convs):
            inputs = area(size) * conv.in_channels
            size = strided(size, conv.stride)
            kept += inputs * (self.item + (self._activation(in_loop=False) if i else 0))
            largest = max(largest, inputs, area(size) * conv.out_channels)
        if self.plan.spec.stem.pool == "max":
            kept += area(size) * convs[-1].out_channels * self.item
        params, macs = _totals(convs)
        cast, standardized = self._cast(params), self._standardized(params, remat=False)
        kept_bytes = self.batch * kept + cast + standardized
        working = 2 * self.batch * largest * self.item
        return Segment("stem", None, params, macs, kept_bytes, standardized, working, 0.0)

    def _blocks(self, blocks: tuple[BlockPlan, ...], first: int, size: tuple[int, int]) -> Segment:
        """Equal blocks, of which `first` is the place in their stage; more than one are a loop."""
        block, count = blocks[0], len(blocks)
        shape, in_loop = Shape.of(block, size), count > 1
        maps = self.batch * self._all_maps(block, shape, in_loop=in_loop)
        cast, kernels = self._cast(block.params), block.params - self._attention(block)
        standardized = self._standardized(kernels, remat=False)
        kept = maps + cast + standardized
        working = 2 * self.batch * max(shape.inputs, shape.outputs, shape.wide_mid) * self.item
        recomputed = 0.0
        if self.remat != "none":
            left_maps = self.batch * self._left_maps(block, shape)
            # The convolutions' outputs are there under "conv": only what is cheap is done again.
            recomputed = sum(b.macs for b in blocks) if self.remat == "block" else 0.0
            if first or not self.on_cpu:
                working += maps - left_maps + cast
                standardized = self._standardized(kernels, remat=True)
                kept = left_maps + standardized
        places = f"{first}-{first + count - 1}" if in_loop else str(first)
        name = f"stage {block.stage}.{places}"
        left = count * kept, count * standardized
        return Segment(name, block.stage, *_totals(blocks), *left, working, recomputed)

    def _all_maps(self, block: BlockPlan, shape: Shape, *, in_loop: bool) -> float:
        """Bytes of what a block leaves when nothing is recomputed, one image."""
        spec, item = self.plan.spec, self.item
        activated = item + self._activation(in_loop=in_loop)  # each feeds a convolution
        spatial = shape.wide_mid + (block.spatial_convs - 1) * shape.mid
        kept = activated * (shape.inputs + spatial + shape.mid)
        if block.projection and shape.pooled != shape.inputs:
            kept += item * shape.pooled
        if spec.attention.kind != "none":  # the gate's gradient needs what it is multiplied with
            inside = spec.attention.position == "inside"
            kept += item * (shape.mid if inside else shape.outputs)
        if spec.block.skip_gain != "none":  # and so does the skip gain's
            kept += item * shape.outputs
        return kept

    def _left_maps(self, block: BlockPlan, shape: Shape) -> float:
        """Bytes of what a block leaves under remat, one image: its input, and its convolutions."""
        if self.remat == "block":
            return shape.inputs * self.item
        spec, spatial = self.plan.spec, block.spatial_convs * shape.mid
        after = spec.attention.kind != "none" and spec.attention.position == "after"
        # Only a gate or a gain after the last convolution needs its output.
        outputs = shape.outputs if after or spec.block.skip_gain != "none" else 0
        return (shape.inputs + shape.wide_mid + spatial + outputs) * self.item

    def _head(self, size: tuple[int, int]) -> Segment:
        parts = [part for part in (self.plan.final_conv, self.plan.classifier) if part]
        kept = largest = area(size) * self.plan.num_features * self._activation(in_loop=False)
        cast = standardized = 0.0
        if conv := self.plan.final_conv:
            kept += area(size) * conv.in_channels * self.item
            cast = self._cast(conv.params)
            standardized = self._standardized(conv.params, remat=False)
        params, macs = _totals(parts)
        params += self.plan.head_norm_params
        left = self.batch * kept + cast + standardized, standardized
        return Segment("head", None, params, macs, *left, self.batch * largest, 0.0)

    def _activation(self, *, in_loop: bool) -> float:
        """Bytes per number that an activation leaves, with the norm it may begin with."""
        traced = activation_bytes(self.plan, self.dtype)
        fused = _FUSED_MAPS_ON_CPU if self.on_cpu else _FUSED_MAPS
        return traced if in_loop else min(traced, fused * self.item)

    def _standardized(self, kernels: float, *, remat: bool) -> float:
        """Of kernels standardised in float32, once per step. What is computed again needs them."""
        if self.plan.spec.norm.kind == "batch" or not (remat or self.item == FLOAT32):
            return 0.0
        return kernels * FLOAT32

    def _cast(self, weights: float) -> float:
        """Of weights in a compute type that is not float32."""
        return weights * self.item if self.item < FLOAT32 else 0.0

    def _attention(self, block: BlockPlan) -> int:
        """Weights of a block's gate, which are no kernels."""
        squeezes = self.plan.spec.attention.kind == "se"
        return 2 * block.attention_width * block.attention_hidden if squeezes else 0


@functools.cache
def activation_bytes(plan: Plan, dtype: Dtype) -> int:
    """Bytes per number of its input that a network's activation leaves for the backward pass.

    Asked of JAX, by tracing; so it holds for BatchNorm and for registered activations, too.
    """
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from nfflax.nn.block import Activate

    x_NHWC = jax.ShapeDtypeStruct((2, 3, 5, 7), jnp.dtype(dtype))

    def activate(x_NHWC: jax.Array) -> jax.Array:
        return Activate(plan.spec, x_NHWC.shape[-1], rngs=nnx.Rngs(0))(x_NHWC, True)

    left = jax.eval_shape(lambda x: jax.vjp(jax.jit(activate), x)[1], x_NHWC)
    return sum(a.dtype.itemsize for a in jax.tree.leaves(left) if a.shape == x_NHWC.shape)


def _totals(parts: Sequence[ConvPlan | BlockPlan]) -> tuple[int, float]:
    """Parameters and multiply-adds."""
    return sum(part.params for part in parts), sum(part.macs for part in parts)


def bytes_of(dtype: Dtype) -> int:
    return {"float32": 4, "bfloat16": 2}[dtype]


def area(size: tuple[int, int]) -> int:
    return size[0] * size[1]


def strided(size: tuple[int, int], stride: int) -> tuple[int, int]:
    return -(-size[0] // stride), -(-size[1] // stride)
