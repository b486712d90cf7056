"""What a network costs on one device: parameters, multiply-adds, and the memory of a train step.

Counted from the plan; nothing is compiled. A step's memory is a timeline: the forward pass leaves
what the backward pass needs, which goes through the network's segments from the last to the first,
frees what each of them kept and leaves gradients. The peak is its fullest moment.
"""

from dataclasses import dataclass

from nfflax.insight.segments import (
    FLOAT32,
    Counter,
    Dtype,
    Remat,
    Segment,
    Shape,
    area,
    bytes_of,
    strided,
)
from nfflax.spec.plan import Plan, plan
from nfflax.spec.schema import Spec

REMATS: tuple[Remat, ...] = ("none", "conv", "block")
BATCH = 32  # the recipes' batch of 4096 over 128 devices


@dataclass(frozen=True)
class State:
    """Bytes that live from step to step, all float32."""

    params: int
    momentum: int
    average: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.params + self.momentum + self.average


@dataclass(frozen=True)
class Cost:
    """What training a network costs on one device."""

    plan: Plan
    batch: int
    dtype: Dtype
    remat: Remat
    segments: tuple[Segment, ...]

    @property
    def state(self) -> State:
        """Of SGD with momentum and a running average, as the published recipes have it."""
        each = self.plan.params * FLOAT32
        return State(each, each, each)

    @property
    def kept(self) -> float:
        """Bytes that the forward pass leaves for the backward pass."""
        return sum(segment.kept for segment in self.segments)

    @property
    def peak(self) -> float:
        """The most bytes besides the state that live at once in a step."""
        return max(bytes for _, bytes in self.timeline())

    @property
    def memory(self) -> float:
        """The state and the peak: what the device must have."""
        return self.state.total + self.peak

    @property
    def macs(self) -> float:
        """Multiply-adds of one image in a train step: a backward pass takes two forward passes."""
        return sum(3 * segment.macs + segment.recomputed_macs for segment in self.segments)

    def timeline(self) -> list[tuple[str, float]]:
        """(segment, bytes that live while its backward pass runs), in the order they run."""
        kept, gradients, moments = self.kept, 0, []
        for segment in reversed(self.segments):
            gradients += segment.gradients
            moments.append((segment.name, kept + segment.working + gradients))
            kept -= segment.kept
        return moments


def cost(
    spec: str | Spec | Plan,
    *,
    batch: int = BATCH,
    resolution: int | None = None,
    dtype: Dtype = "float32",
    remat: Remat = "none",
    on_cpu: bool = False,
) -> Cost:
    """The cost of a train step with `batch` images on one device.

    `resolution` is the spec's train resolution unless given; a ready Plan brings its own.
    `on_cpu` counts as XLA compiles for CPUs, which keeps more outside loops: it recomputes all
    blocks there before it needs the first, so that remat saves nothing of theirs.
    """
    if isinstance(spec, Plan):
        network = spec
    else:
        network = plan(spec)
        size = resolution or network.spec.resolution.train
        network = plan(network.spec, resolution=size)
    counter = Counter(network, batch, dtype, remat, on_cpu)
    return Cost(network, batch, dtype, remat, tuple(counter.segments()))


def inference_bytes(network: Plan, *, batch: int, dtype: Dtype = "float32") -> int:
    """The most bytes of maps that live at once in a forward pass, weights aside.

    In a block that is the shortcut with one layer's input and output; activations are computed in
    place.
    """
    size, most = network.input_size, 0
    for conv in network.stem:
        inputs, size = area(size) * conv.in_channels, strided(size, conv.stride)
        most = max(most, inputs + area(size) * conv.out_channels)
    if network.spec.stem.pool == "max":
        size = strided(size, 2)
    for block in network.blocks:
        shape = Shape.of(block, size)
        wide = shape.outputs if block.projection else shape.inputs
        layers = shape.inputs + shape.wide_mid, shape.wide_mid + shape.mid, shape.mid * 2
        most = max(most, wide + max(*layers, shape.mid + shape.outputs))
        size = block.resolution
    if network.final_conv:
        conv = network.final_conv
        most = max(most, area(size) * (conv.in_channels + conv.out_channels))
    return batch * bytes_of(dtype) * most


def weight_bytes(network: Plan, dtype: Dtype) -> int:
    """Bytes of a folded network's weights: in the compute type, a classifier in float32."""
    classifier = network.classifier.params if network.classifier else 0
    return (network.params - classifier) * bytes_of(dtype) + classifier * FLOAT32
