"""How fast a run's images come: from the source, to the device, through the augmentation.

Each part is timed alone and at full speed. In training they overlap, so the slowest sets the pace.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from nfflax.data.feed import augmentation, train_feed
from nfflax.data.pipeline import Batches
from nfflax.data.sources import open_source
from nfflax.spec.run import Run

# Images per device in a timed batch: enough to keep it busy, few enough to come soon.
_IMAGES = 128


@dataclass(frozen=True)
class Rates:
    """Images per second of each part, and what is needed to read them."""

    host: float
    """Reading, decoding, cropping; with fresh partners an image and its partner count as one."""
    transfer: float
    """From the host's memory to the devices'."""
    device: float
    """Mixing, RandAugment, normalisation."""
    bytes_per_image: int
    """What goes to the device for one image, its partner and labels included."""
    batch: int
    """Images in a timed batch."""
    devices: int
    """How many devices share it."""
    platform: str
    """What they are: "cpu", "gpu" or "tpu"."""

    @property
    def limit(self) -> str:
        """The slowest part: "host", "transfer" or "device"."""
        parts = {"host": self.host, "transfer": self.transfer, "device": self.device}
        return min(parts, key=parts.__getitem__)

    @property
    def images_per_second(self) -> float:
        """The slowest part's rate, which training cannot exceed."""
        return min(self.host, self.transfer, self.device)


def bench(run: Run, *, seconds: float = 3, say: Callable[[str], None] = lambda _: None) -> Rates:
    """Time each part for about `seconds`, after a warm-up, on all devices of this process."""
    batch_size = run.train.batch_size
    devices = jax.local_devices()
    devices = devices[: math.gcd(batch_size, len(devices))]
    least = min(_IMAGES * len(devices), batch_size)
    rows = next(n for n in range(least, batch_size + 1, len(devices)) if batch_size % n == 0)
    mesh = jax.make_mesh((len(devices),), ("data",), (AxisType.Auto,), devices=devices)

    say(f"opening {run.data.source}")
    source = open_source(run.data, run.data.train)
    with train_feed(run, source, hosts=batch_size // rows) as batches:
        say("reading, decoding, cropping")
        batch = _warm_up(batches, run.data.prefetch, seconds)

        def read() -> None:
            next(batches)

        host = _per_second(read, seconds)

    say("copying to the device")
    sharding = NamedSharding(mesh, PartitionSpec("data"))

    def copy() -> dict[str, jax.Array]:
        return jax.block_until_ready(jax.device_put(batch, sharding))

    there = copy()
    transfer = _per_second(copy, min(seconds, 1.0))

    say("compiling the augmentation")
    with jax.set_mesh(mesh):
        work = jax.jit(augmentation(run)).lower(there, 0).compile()
        say("augmenting on the device")

        def augment() -> None:
            jax.block_until_ready(work(there, 0))

        augment()
        device = _per_second(augment, seconds)
    return Rates(
        host=rows * host,
        transfer=rows * transfer,
        device=rows * device,
        bytes_per_image=sum(array.nbytes for array in batch.values()) // rows,
        batch=rows,
        devices=len(devices),
        platform=devices[0].platform,
    )


def _warm_up(batches: Batches, prefetch: int, seconds: float) -> dict:
    """Start the workers and use up what they prepared meanwhile; a slow source is cut short."""
    start = time.perf_counter()
    batch = next(batches)
    for _ in range(prefetch):
        if time.perf_counter() - start > seconds:
            break
        batch = next(batches)
    return batch


def _per_second(work: Callable[[], object], seconds: float) -> float:
    """How often `work` can be done in a second, timed for about that many seconds."""
    start = time.perf_counter()
    times = 0
    while not times or time.perf_counter() - start < seconds:
        work()
        times += 1
    return times / (time.perf_counter() - start)
