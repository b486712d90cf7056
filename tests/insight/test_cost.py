"""Counted costs: whole in their parts, true to compiled programs, and what remat trades."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from nfflax import build
from nfflax.insight.aot import compile_inference, compile_train_step, training_run
from nfflax.insight.cost import REMATS, cost, inference_bytes
from nfflax.insight.segments import activation_bytes
from nfflax.nn.block import Block
from nfflax.nn.stage import rematerialized
from nfflax.nn.wsconv import measured
from nfflax.spec.load import load_spec
from nfflax.spec.plan import plan

# Temporary bytes of train steps compiled for one CPU device, as docs/cost.md has them.
COMPILED = [
    ("nfnet_f0", 8, 192, "none", 1_952_008_880),
    ("nfnet_f0", 8, 192, "conv", 1_383_878_272),
    ("nfnet_f0", 8, 192, "block", 1_290_195_584),
    ("nfnet_f0", 64, 192, "none", 12_047_703_408),
    ("nfnet_f0", 64, 192, "conv", 8_075_163_904),
    ("nfnet_f0", 64, 192, "block", 7_376_146_944),
    ("nfnet_f1", 32, 224, "none", 16_377_222_992),
    ("nfnet_f1", 32, 224, "conv", 8_126_481_280),
    ("nfnet_f1", 32, 224, "block", 6_609_746_176),
]
FAMILIES = ["nfnet_f0", "nf_regnet_b1", "resnet50_bn", "timm_eca_nfnet_l0", "nf_resnet50"]


def convolved(x, w, *, stride=1, padding="same", dilation=1, groups=1):
    """`nfflax.nn.conv.conv` without a choice of platform."""
    strides = (stride, stride) if isinstance(stride, int) else stride
    pads = "SAME" if padding == "same" else [(k // 2, k // 2) for k in w.shape[:2]]
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, w, strides, pads, dimension_numbers=layout, feature_group_count=groups
    )


@pytest.mark.parametrize(("name", "batch", "side", "remat", "compiled"), COMPILED)
def test_a_train_step_is_counted_within_a_fifth_of_what_was_compiled(
    name, batch, side, remat, compiled
):
    counted = cost(name, batch=batch, resolution=side, remat=remat, on_cpu=True)
    assert counted.peak == pytest.approx(compiled, rel=0.2)


@pytest.mark.parametrize("remat", REMATS)
@pytest.mark.parametrize("name", FAMILIES[:3])
def test_a_stack_keeps_what_differentiation_asks_for(name, remat, monkeypatch):
    """Maps only; one convolution for all platforms, or tracing would find those of each."""
    monkeypatch.setattr("nfflax.nn.wsconv.conv", convolved)
    spec = load_spec(name, {"regularization.stochastic_depth": 0.0})
    network = plan(spec, resolution=64)
    block = network.stages()[2][1]
    module = nnx.eval_shape(lambda: Block(block, spec, rngs=nnx.Rngs(0)))
    graph, params, rest = nnx.split(module, nnx.Param, ...)

    def left(params, rest, x_NHWC):
        def run(params, x_NHWC):
            merged = nnx.merge(graph, params, jax.tree.map(jnp.asarray, rest), copy=True)
            return merged(x_NHWC, 0.5, train=True)[0]

        return jax.vjp(rematerialized(run, remat, in_loop=True), params, x_NHWC)[1]

    images = 3  # no kernel has this many of anything in front
    x_NHWC = jax.ShapeDtypeStruct((images, *block.resolution, block.in_channels), jnp.float32)
    arrays = jax.tree.leaves(jax.eval_shape(left, params, rest, x_NHWC))
    size = block.resolution
    maps = [a for a in arrays if a.shape[:3] == (images, *size)]
    found = sum(a.size * a.dtype.itemsize for a in maps)
    both = [cost(network, batch=batch, remat=remat).segments for batch in (1, 1 + images)]
    stack = [segment.name for segment in both[0]].index(f"stage 2.1-{len(network.stages()[2]) - 1}")
    kept = both[1][stack].kept - both[0][stack].kept
    assert kept == found * (len(network.stages()[2]) - 1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("remat", ["none", "conv"])
def test_the_kernels_that_are_kept_are_those_that_differentiation_asks_for(
    remat, dtype, monkeypatch
):
    monkeypatch.setattr("nfflax.nn.wsconv.conv", convolved)
    changes = {"attention.kind": "none", "stages.depth": [1, 3]}  # gates are no kernels
    spec = load_spec("nfnet_nano", changes)
    model = nnx.eval_shape(lambda: build(spec, rngs=nnx.Rngs(0), dtype=dtype, remat=remat))
    graph, params = nnx.split(nnx.eval_shape(measured, model))
    params = nnx.to_pure_dict(params)
    shapes = {leaf.shape for leaf in jax.tree.leaves(params) if leaf.ndim >= 4}
    x_NHWC = jax.ShapeDtypeStruct((7, 64, 64, 3), jnp.dtype(dtype))

    def left(params, x_NHWC):
        def run(params, x_NHWC):
            network: Any = nnx.merge(graph, params)
            return network(x_NHWC, train=True, rngs=jax.random.key(0))

        return jax.vjp(run, params, x_NHWC)[1]

    arrays = jax.tree.leaves(jax.eval_shape(left, params, x_NHWC))
    found = sum(a.size * a.dtype.itemsize for a in arrays if a.shape in shapes)
    one, two = (cost(spec, batch=n, remat=remat, dtype=dtype).kept for n in (1, 2))
    assert 2 * one - two == pytest.approx(found, rel=0.03)  # gains and biases are in the count


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "block"])
def test_f0_is_counted_within_a_fifth_of_what_is_compiled(remat):
    run = training_run(load_spec("nfnet_f0"), batch=8, resolution=192, dtype="float32", remat=remat)
    counted = cost("nfnet_f0", batch=8, remat=remat, on_cpu=True)
    assert counted.peak == pytest.approx(compile_train_step(run).temporary, rel=0.2)


@pytest.mark.slow
def test_inference_needs_about_what_is_counted():
    network = plan("nfnet_f0")
    compiled = compile_inference(network, batch=32, dtype="float32")
    counted = inference_bytes(network, batch=32)
    assert counted <= compiled.temporary <= 3 * counted  # docs/cost.md says what the rest is


@pytest.mark.parametrize("name", FAMILIES)
def test_segments_are_the_whole_network(name):
    network = plan(name, resolution=224)
    counted = cost(network)
    assert sum(segment.params for segment in counted.segments) == network.params
    assert sum(segment.macs for segment in counted.segments) == pytest.approx(network.macs())
    stages = [segment.stage for segment in counted.segments if segment.stage is not None]
    assert sorted(set(stages)) == list(range(4))
    assert counted.state.total == 12 * network.params


@pytest.mark.parametrize("name", FAMILIES)
def test_remat_keeps_less_and_computes_more(name):
    none, conv, block = (cost(name, remat=remat) for remat in ("none", "conv", "block"))
    for more, less in itertools.pairwise([none, conv, block]):
        assert more.kept > less.kept
        assert more.peak > less.peak
    assert none.macs == conv.macs == pytest.approx(3 * none.plan.macs())
    within_blocks = sum(block.macs for block in none.plan.blocks)
    assert block.macs == pytest.approx(none.macs + within_blocks)


def test_the_peak_is_the_fullest_moment_and_holds_all_that_was_kept():
    counted = cost("nfnet_f0", remat="none")
    moments = counted.timeline()
    assert [name for name, _ in moments] == [s.name for s in reversed(counted.segments)]
    assert counted.peak == max(bytes for _, bytes in moments)
    assert counted.peak > counted.kept
    last_gradients = moments[-1][1] - counted.segments[0].kept - counted.segments[0].working
    assert last_gradients == 4 * counted.plan.params


def test_memory_grows_with_the_batch_but_for_kernels():
    two, four, eight = (cost("nfnet_f0", batch=n).kept for n in (2, 4, 8))
    assert eight - four == pytest.approx(2 * (four - two))
    network = plan("nfnet_f0")
    attention = sum(2 * b.attention_width * b.attention_hidden for b in network.blocks)
    standardised = network.params - attention - getattr(network.classifier, "params", 0)
    assert two - (four - two) == 4 * standardised


def test_halves_of_the_type_are_halves_of_the_maps():
    single, half = (
        cost("nfnet_f0", batch=512, remat="conv", dtype=dtype) for dtype in ("float32", "bfloat16")
    )
    assert half.kept == pytest.approx(single.kept / 2, rel=0.02)
    assert inference_bytes(half.plan, batch=3, dtype="bfloat16") * 2 == (
        inference_bytes(single.plan, batch=3, dtype="float32")
    )


def test_on_a_cpu_remat_saves_less():
    for remat in ("conv", "block"):
        late, early = (cost("nfnet_f0", remat=remat, on_cpu=e) for e in (False, True))
        assert late.peak < early.peak < cost("nfnet_f0").peak


@pytest.mark.parametrize(
    ("name", "activation", "maps"),
    [
        ("nfnet_f0", "identity", {0}),
        ("nfnet_f0", "gelu", {4, 5}),  # jax 0.12 no longer saves the input twice
        ("timm_nfnet_l0", "silu", {3}),
    ],
)
def test_what_activations_leave(name, activation, maps):
    network = plan(load_spec(name, {"numerics.activation": activation}))
    single, half = (activation_bytes(network, dtype) for dtype in ("float32", "bfloat16"))
    assert single / 4 in maps
    assert half * 2 == single


def test_batch_normalisation_leaves_more_than_the_activation_alone():
    norm, free = plan("resnet50_bn"), plan(load_spec("nf_resnet50"))
    assert norm.spec.numerics.activation == free.spec.numerics.activation
    assert activation_bytes(norm, "bfloat16") > activation_bytes(free, "bfloat16")


def test_an_inference_holds_the_widest_moment_of_a_block():
    network = plan("nfnet_f0", resolution=256)
    # The first block of stage 1, with maps of 64x64 before its stride: the new shortcut of 512
    # channels at 32x32, or the input of 256 channels and conv0's output of 256.
    transition = 32 * 32 * 512 + 64 * 64 * (256 + 256)
    stem = 128 * 128 * (32 + 64)
    assert inference_bytes(network, batch=7) == 7 * 4 * max(transition, stem)
