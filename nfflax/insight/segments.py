"""A network cut into segments, with the bytes that each of them leaves in a train step.

A segment is the stem, a stage's transition block, the stack of a stage's equal blocks, or the head.
Stacks run as loops, and what a loop keeps is exactly what automatic differentiation asks for: with
layers that leave their arguments only (nn/lean.py) that is their input maps. Outside loops, where a
stack of one block is too, XLA's CPU compiler keeps more: it merges what is computed in the forward
pass and again in the backward pass. docs/cost.md has the comparison with compiled programs.
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
            kept += inputs * (self._activation(in_loop=False) if i else 0)
            kept += inputs * self._patches(conv.kernel, conv.stride) * self.item
            largest = max(largest, inputs, area(size) * conv.out_channels)
        if self.plan.spec.stem.pool == "max":
            kept += area(size) * convs[-1].out_channels * self.item
        params, macs = _totals(convs)
        kept_bytes = self.batch * kept + self._formed(params)
        working = 2 * self.batch * largest * self.item
        return Segment("stem", None, params, macs, kept_bytes, working, 0.0)

    def _blocks(self, blocks: tuple[BlockPlan, ...], first: int, size: tuple[int, int]) -> Segment:
        """Equal blocks, of which `first` is the place in their stage; more than one are a loop."""
        block, count = blocks[0], len(blocks)
        shape, in_loop = Shape.of(block, size), count > 1
        gate, copied = self._gate(block), self._copied(block)
        kept = self.batch * self._all_maps(block, shape, in_loop=in_loop)
        kept += copied + self._cast(gate)
        if not in_loop:
            kept += self._formed(block.params - gate)
        working = 2 * self.batch * max(shape.inputs, shape.outputs, shape.wide_mid) * self.item
        recomputed = 0.0
        if self.remat != "none":
            left = self.batch * self._left_maps(block, shape) + copied
            # The convolutions' outputs are there under "conv": only what is cheap is done again.
            recomputed = sum(b.macs for b in blocks) if self.remat == "block" else 0.0
            if in_loop or not self.on_cpu:
                working += kept - left
                kept = left
        places = f"{first}-{first + count - 1}" if in_loop else str(first)
        name = f"stage {block.stage}.{places}"
        return Segment(name, block.stage, *_totals(blocks), count * kept, working, recomputed)

    def _all_maps(self, block: BlockPlan, shape: Shape, *, in_loop: bool) -> float:
        """Bytes of what a block leaves when nothing is recomputed, one image."""
        item = self.item
        activated = item + self._activation(in_loop=in_loop)  # each feeds a convolution
        spatial = shape.wide_mid + (block.spatial_convs - 1) * shape.mid
        kept = activated * (shape.inputs + spatial + shape.mid)
        kept += item * shape.wide_mid * (self._patches(block.kernel, block.stride) - 1)
        if block.projection and shape.pooled != shape.inputs:
            kept += item * shape.pooled
        if self._attends("inside"):  # the gate's gradient needs what it is multiplied with
            kept += item * shape.mid
        return kept + item * self._scaled(shape)

    def _left_maps(self, block: BlockPlan, shape: Shape) -> float:
        """Bytes of what a block leaves under remat, one image: its input, and its convolutions."""
        if self.remat == "block":
            return shape.inputs * self.item
        spatial = block.spatial_convs * shape.mid
        return (shape.inputs + shape.wide_mid + spatial + self._scaled(shape)) * self.item

    def _scaled(self, shape: Shape) -> int:
        """Numbers in the last convolution's output, where a gate or a gain after it needs them."""
        has_gain = self.plan.spec.block.skip_gain != "none"
        return shape.outputs if has_gain or self._attends("after") else 0

    def _attends(self, position: str) -> bool:
        """Whether blocks have a gate there."""
        attention = self.plan.spec.attention
        return attention.kind != "none" and attention.position == position

    def _head(self, size: tuple[int, int]) -> Segment:
        parts = [part for part in (self.plan.final_conv, self.plan.classifier) if part]
        kept = largest = area(size) * self.plan.num_features * self._activation(in_loop=False)
        kernels = 0
        if conv := self.plan.final_conv:
            kept += area(size) * conv.in_channels * self.item
            kernels = self._formed(conv.params)
        params, macs = _totals(parts)
        params += self.plan.head_norm_params
        kept_bytes = self.batch * kept + kernels
        return Segment("head", None, params, macs, kept_bytes, self.batch * largest, 0.0)

    def _activation(self, *, in_loop: bool) -> float:
        """Bytes per number that an activation leaves, with the norm it may begin with."""
        traced = activation_bytes(self.plan, self.dtype)
        if in_loop:
            return traced
        # The input, from which XLA computes the rest; on a CPU a GELU's hyperbolic tangent, too.
        return min(traced, self.item) * (2 if self.on_cpu else 1)

    def _patches(self, kernel: int, stride: int) -> float:
        """How much larger than its input is what a convolution outside loops keeps of it.

        On a CPU a strided one keeps what each position of the kernel sees (nn/conv_cpu.py).
        """
        return (kernel / stride) ** 2 if self.on_cpu and stride > 1 else 1.0

    def _gate(self, block: BlockPlan) -> int:
        """Weights of a block's gate, which are no kernels."""
        squeezes = self.plan.spec.attention.kind == "se"
        return 2 * block.attention_width * block.attention_hidden if squeezes else 0

    def _formed(self, kernels: int) -> int:
        """Bytes of kernels outside loops, standardised and in the compute type, on a CPU."""
        as_stored = self.plan.spec.norm.kind == "batch" and self.item == FLOAT32
        return kernels * self.item if self.on_cpu and not as_stored else 0

    def _copied(self, block: BlockPlan) -> int:
        """Bytes of kxk kernels, which XLA copies to the layout that it convolves in."""
        taps = block.kernel**2
        weights = block.spatial_convs * taps * block.mid_channels**2 // block.groups
        return weights * FLOAT32 if taps > 1 else 0

    def _cast(self, weights: int) -> int:
        """Bytes of weights in a compute type that is not float32."""
        return weights * self.item if self.item < FLOAT32 else 0


@functools.cache
def activation_bytes(plan: Plan, dtype: Dtype) -> int:
    """Bytes per number of its input that a network's activation leaves for the backward pass.

    Asked of JAX; so it holds for BatchNorm and for registered activations, too.
    """
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from nfflax.nn.block import Activate
    from nfflax.nn.lean import kept_in_a_loop

    def activate(x_NHWC: jax.Array) -> jax.Array:
        return Activate(plan.spec, x_NHWC.shape[-1], rngs=nnx.Rngs(0))(x_NHWC, True)

    return kept_in_a_loop(activate, jax.ShapeDtypeStruct((2, 3, 5, 7), jnp.dtype(dtype)))


def _totals(parts: Sequence[ConvPlan | BlockPlan]) -> tuple[int, float]:
    """Parameters and multiply-adds."""
    return sum(part.params for part in parts), sum(part.macs for part in parts)


def bytes_of(dtype: Dtype) -> int:
    return {"float32": 4, "bfloat16": 2}[dtype]


def area(size: tuple[int, int]) -> int:
    return size[0] * size[1]


def strided(size: tuple[int, int], stride: int) -> tuple[int, int]:
    return -(-size[0] // stride), -(-size[1] // stride)
