"""Counted costs: whole in their parts, true to compiled programs, and what remat trades."""

import collections
import itertools
import math
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
    ("nfnet_f0", 8, 192, "none", 1_264_569_792),
    ("nfnet_f0", 8, 192, "conv", 1_170_105_920),
    ("nfnet_f0", 8, 192, "block", 1_076_976_128),
    ("nfnet_f0", 64, 192, "none", 7_806_251_456),
    ("nfnet_f0", 64, 192, "conv", 7_068_896_960),
    ("nfnet_f0", 64, 192, "block", 6_333_086_784),
    ("nfnet_f1", 32, 224, "none", 8_588_967_936),
    ("nfnet_f1", 32, 224, "conv", 7_036_172_544),
    ("nfnet_f1", 32, 224, "block", 5_523_056_064),
]
FAMILIES = ["nfnet_f0", "nf_regnet_b1", "resnet50_bn", "timm_eca_nfnet_l0", "nf_resnet50"]


@pytest.mark.parametrize(("name", "batch", "side", "remat", "compiled"), COMPILED)
def test_a_train_step_is_counted_within_a_fifth_of_what_was_compiled(
    name, batch, side, remat, compiled
):
    counted = cost(name, batch=batch, resolution=side, remat=remat, on_cpu=True)
    assert counted.peak == pytest.approx(compiled, rel=0.2)


@pytest.mark.parametrize("remat", REMATS)
@pytest.mark.parametrize("name", FAMILIES[:3])
def test_a_stack_keeps_what_differentiation_asks_for(name, remat):
    spec = load_spec(name, {"regularization.stochastic_depth": 0.0})
    network = plan(spec, resolution=64)
    block = network.stages()[2][1]
    module = nnx.eval_shape(lambda: Block(block, spec, rngs=nnx.Rngs(0)))
    graph, params, rest = nnx.split(module, nnx.Param, ...)

    def left(params, rest, x_NHWC):
        def run(params, x_NHWC):
            merged = nnx.merge(graph, params, jax.tree.map(jnp.asarray, rest), copy=True)
            return merged(x_NHWC, 0.5, train=True)[0]

        again = rematerialized(run, remat, in_loop=True)

        def repeated(params, x_NHWC):
            return jax.lax.scan(lambda x, _: (again(params, x), None), x_NHWC, length=2)[0]

        return jax.vjp(repeated, params, x_NHWC)[1]

    images = 3
    x_NHWC = jax.ShapeDtypeStruct((images, *block.resolution, block.in_channels), jnp.float32)
    arrays = jax.tree.leaves(jax.eval_shape(left, params, rest, x_NHWC))
    size = block.resolution
    maps = [a for a in arrays if a.shape[:4] == (2, images, *size)]
    found = sum(a.size * a.dtype.itemsize for a in maps) / 2
    both = [cost(network, batch=batch, remat=remat).segments for batch in (1, 1 + images)]
    stack = [segment.name for segment in both[0]].index(f"stage 2.1-{len(network.stages()[2]) - 1}")
    kept = both[1][stack].kept - both[0][stack].kept
    assert kept == found * (len(network.stages()[2]) - 1)


def wide_kernels(network):
    """Bytes of the kernels of blocks that see more than one pixel."""
    block_kernels = (
        b.spatial_convs * b.kernel**2 * b.mid_channels * (b.mid_channels // b.groups)
        for b in network.blocks
    )
    return 4 * sum(block_kernels)


@pytest.mark.parametrize(
    ("remat", "dtype"), [("none", "float32"), ("none", "bfloat16"), ("conv", "bfloat16")]
)
def test_the_weights_that_are_kept_are_those_that_differentiation_asks_for(remat, dtype):
    """No kernels, and gates where they are cast and not computed again. Copies come on top."""
    spec = load_spec("nfnet_nano", {"stages.depth": [1, 3]})
    model = nnx.eval_shape(lambda: build(spec, rngs=nnx.Rngs(0), dtype=dtype, remat=remat))
    graph, params = nnx.split(nnx.eval_shape(measured, model))
    params = nnx.to_pure_dict(params)
    known = collections.Counter((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(params))
    stages = {leaf.shape for leaf in jax.tree.leaves(params["stages"])}
    shapes = {shape for shape in stages if math.prod(shape) > 2 * max(shape, default=1)}  # matrices
    x_NHWC = jax.ShapeDtypeStruct((7, 64, 64, 3), jnp.dtype(dtype))

    def left(params, x_NHWC):
        def run(params, x_NHWC):
            network: Any = nnx.merge(graph, params)
            return network(x_NHWC, train=True, rngs=jax.random.key(0))

        return jax.vjp(run, params, x_NHWC)[1]

    arrays = jax.tree.leaves(jax.eval_shape(left, params, x_NHWC))
    found = collections.Counter((a.shape, a.dtype) for a in arrays if a.shape in shapes)
    kept = sum((found - known)[key] * math.prod(key[0]) * key[1].itemsize for key in found)
    assert (kept > 0) == (remat == "none" and dtype == "bfloat16")
    one, two = (cost(spec, batch=n, remat=remat, dtype=dtype).kept for n in (1, 2))
    assert 2 * one - two == kept + wide_kernels(plan(spec))


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


def test_memory_grows_with_the_batch_but_for_copied_kernels():
    network = plan("nfnet_f0")
    two, four = (cost("nfnet_f0", batch=n).kept for n in (2, 4))
    assert 2 * two - four == pytest.approx(wide_kernels(network))


def test_a_cpu_keeps_the_kernels_outside_loops():
    network = plan("nfnet_f0")
    two, four = (cost("nfnet_f0", batch=n, on_cpu=True).kept for n in (2, 4))
    alone = [stage[0] for stage in network.stages()] + [network.stages()[1][1]]  # a stack of one
    gates = sum(2 * block.attention_width * block.attention_hidden for block in alone)
    convs = *network.stem, *filter(None, [network.final_conv])
    formed = sum(part.params for part in (*convs, *alone)) - gates
    assert 2 * two - four == pytest.approx(4 * formed + wide_kernels(network))


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
        assert late.peak < early.peak < cost("nfnet_f0", on_cpu=True).peak


@pytest.mark.parametrize(
    ("activation", "single", "half"),
    [("identity", 0, 0), ("gelu", 4, 2), ("silu", 4, 2)],
)
def test_activations_leave_their_input_or_less(activation, single, half):
    network = plan(load_spec("nfnet_f0", {"numerics.activation": activation}))
    found = [activation_bytes(network, dtype) for dtype in ("float32", "bfloat16")]
    assert found == [single, half]


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
