"""Pods by name, what their chips exchange, and estimates that follow from them."""

import itertools

import pytest

from nfflax.insight.chips import CHIPS, PodError, pod
from nfflax.insight.collectives import Collective, ring_bytes
from nfflax.insight.estimate import EFFICIENCY, estimate
from nfflax.insight.rehearsal import Rehearsal
from nfflax.insight.search import checked, mesh_on, search
from nfflax.spec.load import load_run
from nfflax.spec.plan import plan
from nfflax.train.errors import MeshError

# Milliseconds of a train step with 32 images on a TPU v3 core (arXiv:2102.06171, table 3).
PUBLISHED = {
    "nfnet_f0": 73.3,
    "nfnet_f1": 158.5,
    "nfnet_f2": 295.8,
    "nfnet_f3": 532.2,
    "nfnet_f4": 1033.3,
    "nfnet_f5": 1398.5,
}
V3_CORE = 61.5e12  # operations per second

# GB on each chip of train steps compiled for TPUs, as docs/scaling.md has them.
REMAT = {"model.remat": "conv"}
COMPILED = [
    ("nfnet", "v5e:4x4", {"train.batch_size": 512}, 2.45),
    ("nfnet", "v5e:4x4", {"train.batch_size": 512, **REMAT}, 2.13),
    ("nfnet_f6", "v5e:16x16", {"train.accumulate": 2, **REMAT}, 15.27),
    ("nfnet_f6", "v5e:16x16", {"mesh.fsdp": 16, **REMAT}, 13.05),
]


def mesh(data=1, fsdp=1, tensor=1, spatial=1):
    return {"data": data, "fsdp": fsdp, "tensor": tensor, "spatial": spatial}


@pytest.mark.parametrize(
    ("name", "count"), [("v5e:4x4", 16), ("v5p:4x4x8", 128), ("h100:64", 64), ("v6e:1x1", 1)]
)
def test_a_pod_keeps_its_name_and_counts_its_chips(name, count):
    assert (pod(name).name, pod(name).count) == (name, count)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("v5e", "is no pod"),
        ("v5f:4x4", "is no known chip"),
        ("v5e:4x4x4", "a pod of v5e has 2 dimensions"),
        ("v5p:4x4", "a pod of v5p has 3 dimensions"),
        ("h100:0", "a pod of h100 has 1 dimension"),
        ("v5e:16x32", "512 chips: more than are connected directly"),
        ("h100:12", "12 GPUs do not fill nodes of 8"),
    ],
)
def test_what_is_no_pod_is_said(name, said):
    with pytest.raises(PodError, match=said):
        pod(name)


def test_links_add_up_over_dimensions_and_rings():
    link = CHIPS["v5e"].link_rate
    # 16 chips along a dimension close to a ring, and data goes round both ways; 4 do not.
    assert pod("v5e:16x16").exchange_rate(256) == 4 * link
    assert pod("v5e:4x4").exchange_rate(16) == 2 * link
    assert pod("v5e:4x4").exchange_rate(4) == link
    nodes = pod("h100:64")
    assert nodes.exchange_rate(8) == CHIPS["h100"].link_rate > nodes.exchange_rate(64)


def test_ring_bytes():
    assert ring_bytes("all-reduce", 100, 4) == 150
    assert ring_bytes("all-gather", 100, 4) == ring_bytes("reduce-scatter", 100, 4) == 75
    assert ring_bytes("collective-permute", 100, 2) == 100


def test_the_efficiency_is_what_the_paper_reached():
    shares = []
    for name, milliseconds in PUBLISHED.items():
        spec = load_run("nfnet", {"model.spec": name}).spec
        macs = plan(spec, resolution=spec.resolution.train).macs()
        shares.append(2 * 3 * macs * 32 / (milliseconds / 1e3) / V3_CORE)
    assert 0.29 < min(shares) < max(shares) < 0.41
    assert sum(shares) / len(shares) == pytest.approx(EFFICIENCY, abs=0.005)


def test_an_estimate_by_hand():
    run, place = load_run("nfnet", {"train.batch_size": 512}), pod("v5e:4x4")
    found = estimate(run, place, mesh(data=16))
    network = plan(run.spec, resolution=192)
    flops = 2 * 3 * network.macs() * 512
    assert found.flops == flops
    assert found.compute == pytest.approx(flops / 16 / 197e12)
    gradients = 2 * network.params * 2 * 15 / 16  # bfloat16, around a ring and back
    assert found.exchange == pytest.approx(gradients / 100e9, rel=1e-6)
    assert found.state == 3 * 4 * network.params
    assert found.at_peak == max(found.compute, found.traffic, found.exchange) < found.expected
    assert found.utilization < EFFICIENCY
    assert found.hours(512 * 3600) == pytest.approx(found.expected)


def test_compiled_exchanges_replace_those_on_paper():
    run, place = load_run("nfnet", {"train.batch_size": 512}), pod("v5e:4x4")
    gathered = Collective("all-gather", 16, 1, 160_000_000)
    found = estimate(run, place, mesh(data=16), exchanges=[gathered])
    assert found.exchange == pytest.approx(150e6 / 100e9)


@pytest.mark.parametrize(("recipe", "place", "changes", "compiled"), COMPILED)
def test_memory_is_counted_within_a_tenth_of_what_is_compiled(recipe, place, changes, compiled):
    run, place = load_run(recipe, changes), pod(place)
    found = estimate(run, place, mesh_on(run, place))
    assert found.memory / 1e9 == pytest.approx(compiled, rel=0.1)


def test_microbatches_sum_gradients():
    place, how = pod("v5e:4x4"), mesh(data=16)
    whole, parts = (
        estimate(load_run("nfnet", batch), place, how)
        for batch in (
            {"train.batch_size": 512},
            {"train.batch_size": 1024, "train.accumulate": 2},  # as many images at a time
        )
    )
    assert parts.memory - whole.memory == pytest.approx(4 * plan("nfnet_f0").params)


def test_fsdp_splits_the_state_and_exchanges_more():
    run, place = load_run("nfnet", {"train.batch_size": 256}), pod("v5e:2x4")
    whole, split = (estimate(run, place, mesh(**how)) for how in ({"data": 8}, {"fsdp": 8}))
    assert split.state == pytest.approx(whole.state / 8, rel=0.05)
    assert split.exchange == pytest.approx(1.5 * whole.exchange, rel=1e-3)
    assert split.memory < whole.memory


def test_a_search_finds_what_fits_and_orders_it():
    run, place = load_run("nfnet_f6"), pod("v5e:16x16")
    plain = estimate(run, place, mesh_on(run, place))
    found = search(run, place)
    assert not plain.fits  # so it is worth a search
    assert all(way.estimate.fits for way in found)
    times = [way.estimate.expected for way in found]
    assert times == sorted(times)
    assert len({tuple(way.settings.values()) for way in found}) == len(found)
    best = found[0]
    again = load_run("nfnet_f6", best.settings)
    assert estimate(again, place, mesh_on(again, place)) == best.estimate


@pytest.mark.parametrize(("factor", "finds_one"), [(0.9, True), (1.3, True), (90.0, False)])
def test_what_the_compiler_needs_decides(factor, finds_one):
    place = pod("v5e:16x16")
    ways = search(load_run("nfnet_f6"), place)
    needs = {id(way.run): factor * way.estimate.memory for way in ways}

    def compile(run):
        memory, there = needs[id(run)], place.chip.usable
        state = {"devices": 256, "mesh": {}, "state": {}, "seconds": 0.0, "optimized": False}
        return Rehearsal(**state, fits=memory <= there, memory=memory, capacity=there)

    tried = list(checked(ways, compile))
    assert tried[0][0] is ways[0]
    assert [found.fits for _, found in tried] == [False] * (len(tried) - 1) + [finds_one]
    # Whoever compiles all of them finds no earlier one that fits.
    first = next((way for way in ways if needs[id(way.run)] <= place.chip.usable), None)
    assert first is (tried[-1][0] if finds_one else None)
    assert len(tried) < 10


def test_a_search_where_nothing_fits_orders_by_memory():
    run = load_run("nfnet_f7", {"train.batch_size": 512, "model.set.resolution.train": 4096})
    found = search(run, pod("v5e:1x1"))
    needs = [way.estimate.memory for way in found]
    assert needs == sorted(needs)
    assert not any(way.estimate.fits for way in found)


def test_a_mesh_that_is_not_the_pods():
    place = pod("v5e:4x4")
    with pytest.raises(PodError, match=r"fsdp 3 .* does not make the 16 chips of v5e:4x4"):
        mesh_on(load_run("nfnet", {"mesh.fsdp": 3}), place)
    with pytest.raises(PodError, match=r"mesh\.devices = 8"):
        mesh_on(load_run("nfnet", {"mesh.devices": 8}), place)
    with pytest.raises(MeshError, match=r"train\.batch_size = 24"):
        mesh_on(load_run("nfnet", {"train.batch_size": 24, "mesh.data": 16}), place)


def test_more_chips_are_never_slower_for_the_same_batch_on_a_torus():
    run = load_run("nfnet")
    names = ["v5p:2x2x2", "v5p:4x4x4", "v5p:8x8x8", "v5p:16x16x16"]
    times = [estimate(run, place, mesh_on(run, place)).expected for place in map(pod, names)]
    assert all(later < earlier for earlier, later in itertools.pairwise(times))
