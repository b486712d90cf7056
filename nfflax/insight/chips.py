"""Accelerators and their published rates, and pods of them by name: "v5e:16x16", "h100:64".

Rates are makers' peaks. TPUs: cloud.google.com/tpu/docs (v4, v5e, v5p, v6e; read 2026-11). Google
gives a chip's links as both directions together: half of that goes one way. v4's are those of
arXiv:2304.01433 (six links of 50 GB/s). GPUs: NVIDIA's data sheets of H100 SXM and H200 SXM,
arithmetic without sparsity, and a network adapter of 400 Gbit/s for each GPU, as in DGX systems.
"""

import math
import re
from dataclasses import dataclass

from nfflax.spec.errors import Problem, SpecError, nearest

_GIB = 1 << 30
_USABLE = 15.75 / 16


class PodError(SpecError):
    """A pod that is not there to be planned for."""

    subject = "pod"


@dataclass(frozen=True)
class Chip:
    """One accelerator. Rates are per second and for one chip."""

    name: str
    flops: float
    """Peak of bfloat16 arithmetic."""
    memory: int
    """Bytes."""
    memory_rate: float
    """Bytes between memory and chip."""
    link_rate: float
    """Bytes that leave the chip over one link (TPU), or over all of them (GPU)."""
    largest: int
    """Chips that such links connect."""
    dimensions: int = 0
    """Of the torus that a TPU's links make; 0: a switch connects all with all."""
    wraps: int = 0
    """Along a dimension with a multiple of this many chips the links make a ring."""
    network_rate: float = 0.0
    """Bytes that leave the chip for others further away; 0: those are not planned for."""

    @property
    def usable(self) -> int:
        """Bytes for a program and its arrays: XLA offers 15.75 of a v5e's 16 GiB."""
        return round(self.memory * _USABLE)

    @property
    def is_tpu(self) -> bool:
        """Whether programs for it can be compiled without it."""
        return self.dimensions > 0


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 275e12, 32 * _GIB, 1200e9, 50e9, 4096, dimensions=3, wraps=4),
        Chip("v5e", 197e12, 16 * _GIB, 819e9, 50e9, 256, dimensions=2, wraps=16),
        Chip("v5p", 459e12, 95 * _GIB, 2765e9, 100e9, 8960, dimensions=3, wraps=4),
        Chip("v6e", 918e12, 32 * _GIB, 1638e9, 100e9, 256, dimensions=2, wraps=16),
        Chip("h100", 989.4e12, 80 * 10**9, 3350e9, 450e9, 8, network_rate=50e9),
        Chip("h200", 989.4e12, 141 * 10**9, 4800e9, 450e9, 8, network_rate=50e9),
    )
}

_POD = re.compile(r"(?P<chip>[a-z0-9]+):(?P<shape>[0-9]{1,6}(?:x[0-9]{1,6})*)")
_EXAMPLES = "a chip and its arrangement, e.g. v5e:4x4, v5p:4x4x8, h100:64"


@dataclass(frozen=True)
class Pod:
    """Chips that work together."""

    chip: Chip
    shape: tuple[int, ...]
    """Along each dimension of the torus; a number where there is none."""

    @property
    def name(self) -> str:
        """As `pod` reads it."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def count(self) -> int:
        """Chips in all."""
        return math.prod(self.shape)

    def exchange_rate(self, chips: int) -> float:
        """Bytes per second and chip at which `chips` of them pass data around in a ring.

        All of a pod use the links of all dimensions at once; fewer of them are taken to lie along
        one dimension. Along a dimension that is no ring, data goes round in half the links.
        """
        chip = self.chip
        if chip.is_tpu:
            rates = sorted(
                chip.link_rate * (2 if size % chip.wraps == 0 else 1)
                for size in self.shape
                if size > 1
            )
            return sum(rates) if chips == self.count else rates[0]
        if chips <= chip.largest:
            return chip.link_rate
        # Within each node first, then every GPU its share between the nodes: the times add up.
        return 1 / (1 / chip.link_rate + 1 / (chip.largest * chip.network_rate))


def pod(name: str) -> Pod:
    """The pod of this name, such as "v5e:4x4"; raises PodError with what is wrong with it."""
    match = _POD.fullmatch(name)
    if not match:
        raise PodError([Problem("plan", "--topology", "is no pod", name, _EXAMPLES)])
    if match["chip"] not in CHIPS:
        near, allowed = nearest(match["chip"], CHIPS), ", ".join(CHIPS)
        raise PodError([Problem("plan", "--topology", "is no known chip", name, allowed, near)])
    found = Pod(CHIPS[match["chip"]], tuple(map(int, match["shape"].split("x"))))
    chip, count = found.chip, found.count
    dimensions = max(1, chip.dimensions)
    if len(found.shape) != dimensions or not count:
        message = f"a pod of {chip.name} has {dimensions} dimension{'s' * (dimensions > 1)}"
        raise PodError([Problem("plan", "--topology", message, name, _EXAMPLES)])
    if chip.is_tpu and count > chip.largest:
        message = f"{count} chips: more than are connected directly, which is all that is planned"
        allowed = f"up to {chip.largest} of {chip.name}"
        raise PodError([Problem("plan", "--topology", message, name, allowed)])
    if not chip.is_tpu and count > chip.largest and count % chip.largest:
        message = f"{count} GPUs do not fill nodes of {chip.largest}"
        allowed = f"up to {chip.largest}, or a multiple"
        raise PodError([Problem("plan", "--topology", message, name, allowed)])
    return found
