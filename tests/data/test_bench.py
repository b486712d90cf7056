"""Timing a run's images: what is timed is the run's own stream, and the slowest part is named."""

import dataclasses

import jax
import pytest

from nfflax.data.bench import Rates, bench
from nfflax.spec.load import load_run

RATES = Rates(
    host=10.0,
    transfer=30.0,
    device=20.0,
    bytes_per_image=100,
    batch=8,
    devices=1,
    platform="cpu",
)


@pytest.mark.parametrize(
    ("changes", "limit", "pace"),
    [({}, "host", 10), ({"transfer": 5.0}, "transfer", 5), ({"host": 21.0}, "device", 20)],
)
def test_the_slowest_part_limits(changes, limit, pace):
    rates = dataclasses.replace(RATES, **changes)
    assert (rates.limit, rates.images_per_second) == (limit, pace)


@pytest.mark.parametrize(
    ("changes", "images", "devices"),
    [
        ({"train.batch_size": 16}, 2, 8),
        ({"train.batch_size": 6, "augment.partners": "batch"}, 1, 2),
        ({"train.batch_size": 12_288, "augment.cutmix": False, "augment.mixup": 0}, 1, 8),
    ],
)
def test_all_parts_are_timed_on_the_devices_that_divide_the_batch(changes, images, devices):
    said = []
    run = load_run("digits", {"model.set.resolution.train": 8, "data.workers": 0} | changes)
    rates = bench(run, seconds=0.01, say=said.append)
    assert min(rates.host, rates.transfer, rates.device) > 0
    assert rates.bytes_per_image == images * (8 * 8 * 3 + 4)  # pixels and a label
    assert (rates.devices, rates.platform) == (devices, "cpu")
    assert rates.batch == min(run.train.batch_size, 1024)  # 128 for each device
    assert rates.batch % devices == 0
    assert said[0] == "opening digits"
    assert said[-1] == "augmenting on the device"
    assert jax.sharding.get_abstract_mesh().empty
