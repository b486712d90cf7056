"""How long a train step should take on a pod, and what a chip must hold: arithmetic, not measured.

Three times are told apart: of arithmetic at the chip's peak, of memory traffic and of exchanges at
their published rates. No step is faster than the longest of them. What to expect is more: the
official code reached 30 to 40% of the peak of TPU v3 (EFFICIENCY), and the gradients' exchange at
the end of a step has nothing left to hide behind.
"""

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nfflax.insight.chips import Pod
from nfflax.insight.collectives import Collective
from nfflax.insight.cost import Cost, Dtype, Remat, cost
from nfflax.spec.plan import Plan, plan
from nfflax.spec.run import Run

# Of NFNet-F0 to F5: multiply-adds of a step with 32 images, at train resolution, over the step's
# time on a TPU v3 core (arXiv:2102.06171, table 3) and 61.5 TFLOP/s: 0.30 0.34 0.35 0.40 0.37 0.38.
EFFICIENCY = 0.36

_WEIGHT = 4  # bytes of a parameter, its gradient and each of its moments
_STATE_TRAFFIC = 10  # times that an update reads or writes something as large as the parameters


@dataclass(frozen=True)
class Estimate:
    """A train step on a pod, by arithmetic. Seconds of a step, bytes of a chip."""

    pod: Pod
    mesh: Mapping[str, int]
    batch: int
    flops: float
    """Of the network's own arithmetic on all chips, nothing counted twice."""
    compute: float
    """Seconds of arithmetic at the chip's peak, recomputed parts included."""
    traffic: float
    """Seconds to move what is kept between memory and chip."""
    exchange: float
    """Seconds to move between chips what is exchanged."""
    memory: float
    """Bytes that live at once: state, gradients, maps."""
    state: float
    """Bytes of parameters, their average and the optimiser."""

    @property
    def at_peak(self) -> float:
        """Seconds that no step is faster than."""
        return max(self.compute, self.traffic, self.exchange)

    @property
    def expected(self) -> float:
        """Seconds to expect: arithmetic as efficient as published, nothing hides the exchanges."""
        return max(self.compute / EFFICIENCY, self.traffic) + self.exchange

    @property
    def utilization(self) -> float:
        """Share of the pod's peak that the network's own arithmetic is, in an expected step."""
        return self.flops / (self.expected * self.pod.count * self.pod.chip.flops)

    @property
    def images_per_second(self) -> float:
        """To expect, of the whole pod."""
        return self.batch / self.expected

    @property
    def fits(self) -> bool:
        """Whether a chip's memory should hold it."""
        return self.memory <= self.pod.chip.usable

    def hours(self, images: float) -> float:
        """To expect for so many images."""
        return images / self.images_per_second / 3600


def estimate(
    run: Run,
    pod: Pod,
    mesh: Mapping[str, int],
    *,
    exchanges: Sequence[Collective] | None = None,
) -> Estimate:
    """A train step of a run on a pod whose chips are arranged as `mesh` says, axis by axis.

    `exchanges` are those of the compiled program, where there is one.
    """
    sharing = mesh["tensor"] * mesh["spatial"]
    shards = pod.count // sharing
    accumulate = run.train.accumulate
    rows = max(1, run.train.batch_size // accumulate // shards)
    spec: Any = run.spec  # hashable, being frozen, which a type checker cannot see
    network = _network(spec)
    counted = _counted(spec, rows, run.model.dtype, run.model.remat)
    plain = _counted(spec, rows, run.model.dtype, "none")
    # The ascent of SAM is one more gradient, of a part of the batch.
    passes = 1 + (run.sam.fraction if run.sam.rho else 0)
    share = _share_of_weights(spec, tuple(mesh.items()))
    weights = share * counted.plan.params * _WEIGHT
    copies = 1 + _moments(run) + bool(run.ema.decay)
    again = 1.5 if run.model.remat == "block" else 1  # maps are written and read once more
    # What is kept is written by the forward pass and read by the backward pass.
    moved = 2 * plain.kept * accumulate * passes * again / sharing + _STATE_TRAFFIC * weights
    macs = 3 * network.macs() * passes
    if exchanges is None:
        exchanges = _exchanges(run, network, mesh, rows)
    # A device counted by itself holds gradients whole; here they are split as weights are.
    elsewhere = itertools.accumulate((1 - share) * s.gradients for s in reversed(counted.segments))
    maps = max(b - away for (_, b), away in zip(counted.timeline(), elsewhere, strict=True))
    accumulated = weights if accumulate > 1 else 0
    batch = run.train.batch_size
    return Estimate(
        pod=pod,
        mesh=mesh,
        batch=batch,
        flops=2 * macs * batch,
        compute=2 * counted.macs * passes * batch / pod.count / pod.chip.flops,
        traffic=moved / pod.chip.memory_rate,
        exchange=sum(each.sent / pod.exchange_rate(each.devices) for each in exchanges),
        memory=copies * weights + maps + accumulated,
        state=copies * weights,
    )


def _exchanges(run: Run, network: Plan, mesh: Mapping[str, int], rows: int) -> list[Collective]:
    """What a step exchanges on paper: kernels under fsdp, gradients, sums inside blocks."""
    data, fsdp, tensor = mesh["data"], mesh["fsdp"], mesh["tensor"]
    times = run.train.accumulate
    item = 2 if run.model.dtype == "bfloat16" else 4  # of maps, kernels and gradients that travel
    kernels = round(network.params * item / tensor)
    found = []
    if fsdp > 1:  # gathered for the forward pass and again for the backward pass
        found.append(Collective("all-gather", fsdp, 2 * times, 2 * times * kernels))
        found.append(Collective("reduce-scatter", fsdp, times, times * kernels))
    if data > 1:
        found.append(Collective("all-reduce", data, times, times * kernels // fsdp))
    if tensor > 1:  # each block sums its output, and the gradient of its input
        numbers = sum(math.prod(b.resolution) * 2 * b.out_channels for b in network.blocks)
        size = rows * numbers * item
        count = 2 * len(network.blocks)
        found.append(Collective("all-reduce", tensor, times * count, times * size))
    return found


def _moments(run: Run) -> int:
    """Numbers that the optimiser keeps for each parameter."""
    return 2 if run.optimizer.kind == "adamw" else 1


@functools.lru_cache(8)
def _network(spec: Any) -> Plan:
    """A network as it is trained."""
    return plan(spec, resolution=spec.resolution.train)


@functools.lru_cache(256)
def _counted(spec: Any, rows: int, dtype: Dtype, remat: Remat) -> Cost:
    """What a step with so many images at a time costs."""
    return cost(_network(spec), batch=rows, dtype=dtype, remat=remat)


@functools.lru_cache(256)
def _share_of_weights(spec: Any, mesh: tuple[tuple[str, int], ...]) -> float:
    """The part of all parameters that a chip holds, by the rules that a run follows."""
    import jax
    from jax.sharding import AbstractMesh, AxisType

    from nfflax.train.mesh import param_shardings

    if math.prod(size for name, size in mesh if name in ("fsdp", "tensor")) == 1:
        return 1.0
    names, sizes = zip(*mesh, strict=True)
    arranged: Any = AbstractMesh(sizes, names, axis_types=(AxisType.Auto,) * len(names))
    leaves = _parameters(spec)
    shardings = jax.tree.leaves(param_shardings(leaves, arranged))
    own = whole = 0
    for leaf, sharding in zip(jax.tree.leaves(leaves), shardings, strict=True):
        own += math.prod(sharding.shard_shape(leaf.shape))
        whole += math.prod(leaf.shape)
    return own / whole


@functools.lru_cache(8)
def _parameters(spec: Any) -> Any:
    """The parameters of a network, without arrays, with their roles."""
    from flax import nnx

    import nfflax

    return nnx.state(nnx.eval_shape(lambda: nfflax.build(spec, rngs=nnx.Rngs(0))), nnx.Param)
