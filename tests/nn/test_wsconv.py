"""Scaled weight standardisation: what it promises of kernels and signals, and its layers."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nfflax.nn import WSConv, WSConvTranspose, role_of
from nfflax.nn.wsconv import measured, standardize

# Kernel and stride of transposed layers; every rank meets a few of them, rank 2 meets all.
GAPS = [(4, 2), (3, 2), (2, 2), (3, 1), (2, 3), (5, 2)]


def normals(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


@settings(max_examples=25)
@given(
    shape=st.tuples(*[st.integers(1, 3)] * 2, st.integers(2, 6), st.integers(1, 5)),
    scale=st.floats(0.01, 100),
    shift=st.floats(-3, 3),
    seed=st.integers(0, 2**16),
)
def test_every_unit_has_mean_zero_and_variance_gain_squared_over_fan_in(shape, scale, shift, seed):
    rng = np.random.default_rng(seed)
    w = jnp.asarray(rng.normal(size=shape) * scale + shift * scale, jnp.float32)
    gain = jnp.asarray(rng.normal(size=shape[-1]), jnp.float32)
    fan_in = math.prod(shape[:-1])
    # Below the floor a unit is not standardised.
    assume(np.var(np.asarray(w), axis=(0, 1, 2)).min() * fan_in > 1e-3)
    found = np.asarray(jax.jit(standardize)(w, gain), np.float64)
    np.testing.assert_allclose(found.mean((0, 1, 2)), 0, atol=1e-5 * (1 + abs(shift)))
    np.testing.assert_allclose(found.var((0, 1, 2)) * fan_in, gain**2, rtol=1e-3, atol=1e-6)


def test_the_two_epsilons():
    """The official one is a floor under var * fan_in; timm's is added to the variance itself."""
    w = normals(3, 3, 4, 5) * 1e-3
    var, mean, fan_in = np.var(w, (0, 1, 2)), np.mean(w, (0, 1, 2)), 36
    floor = (w - mean) / np.sqrt(np.maximum(var * fan_in, 1e-2))
    added = (w - mean) / np.sqrt((var + 1e-2) * fan_in)
    gain = jnp.ones(5)
    np.testing.assert_allclose(standardize(w, gain, eps=1e-2), floor, rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(
        standardize(w, gain, eps=1e-2, eps_mode="add"), added, rtol=1e-5, atol=1e-9
    )


def test_a_dead_unit_stays_finite():
    w = jnp.zeros((3, 3, 4, 5))
    value, gradient = jax.value_and_grad(lambda w: jnp.sum(standardize(w, jnp.ones(5))))(w)
    assert value == 0
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_layers_of_every_rank_keep_unit_variance(rank):
    layer = WSConv(64, 128, (3,) * rank, rngs=nnx.Rngs(0))
    x = normals(8, *(6 if rank == 3 else 24,) * rank, 64)
    y = nnx.jit(lambda layer, x: layer(x))(layer, x)
    assert y.shape == (*x.shape[:-1], 128)
    inner = np.asarray(y)[(slice(None), *(slice(1, -1),) * rank)]  # away from the zero padding
    assert np.var(inner) == pytest.approx(1, rel=0.05)
    role = role_of(layer.kernel)
    assert role is not None
    assert role.unit_axes == tuple(range(-rank - 2, -1))


@pytest.mark.parametrize(
    ("rank", "kernel", "stride"),
    [
        *((2, kernel, stride) for kernel, stride in GAPS),
        *((rank, *GAPS[rank]) for rank in (1, 3)),
        *(
            pytest.param(rank, *gap, marks=pytest.mark.slow)
            for rank in (1, 3)
            for gap in GAPS
            if gap != GAPS[rank]
        ),
    ],
)
def test_transposed_layers_upsample_and_keep_unit_variance(rank, kernel, stride):
    layer = WSConvTranspose(48, 64, (kernel,) * rank, stride, rngs=nnx.Rngs(0))
    size = 4 if rank == 3 else 12
    dims = {1: ("NWC", "WIO", "NWC"), 2: ("NHWC", "HWIO", "NHWC"), 3: ("NDHWC", "DHWIO", "NDHWC")}

    @nnx.jit
    def both(layer, x):
        kernel_O = standardize(layer.kernel[...], layer.gain[...] * stride ** (rank / 2))
        strides = (stride,) * rank
        wanted = jax.lax.conv_transpose(x, kernel_O, strides, "SAME", dimension_numbers=dims[rank])
        return layer(x), wanted

    y, wanted = both(layer, normals(4, *(size,) * rank, 48))
    assert y.shape == (4, *(size * stride,) * rank, 64)
    np.testing.assert_allclose(y, wanted, atol=1e-4)
    inner = np.asarray(y)[(slice(None), *(slice(stride, -stride),) * rank)]
    assert np.var(inner) == pytest.approx(1, rel=0.12)


def test_statistics_are_float32_in_a_bfloat16_network():
    layer = WSConv(256, 8, (3, 3), rngs=nnx.Rngs(0))
    x = normals(2, 5, 5, 256)
    y16, y32 = layer(x.astype(jnp.bfloat16)), layer(x)
    assert y16.dtype == jnp.bfloat16
    assert layer.kernel[...].dtype == jnp.float32
    assert float(jnp.abs(y16 - y32).max()) < 0.06  # two roundings of inputs, no drift of statistics


# --- gradients, and kernels standardised beforehand --------------------------------------------


def plain_standardize(w, gain, eps, eps_mode):
    """The formula, for autodiff."""
    axes, fan_in = tuple(range(w.ndim - 1)), math.prod(w.shape[:-1])
    mean, var = jnp.mean(w, axes), jnp.var(w, axes)
    if eps_mode == "floor":
        return (w - mean) * jax.lax.rsqrt(jnp.maximum(var * fan_in, eps)) * gain
    return (w - mean) * jax.lax.rsqrt((var + eps) * fan_in) * gain


@pytest.mark.parametrize("eps_mode", ["floor", "add"])
@pytest.mark.parametrize("eps", [1e-4, 30.0])  # 30 is above the norm of some units, not of all
@pytest.mark.parametrize("shape", [(3, 3, 4, 8), (1, 1, 24, 8), (5, 8)])
def test_gradients_are_those_of_the_formula(shape, eps, eps_mode):
    w, weights = normals(2, *shape)
    gain = normals(shape[-1])
    w = w * jnp.linspace(0.2, 2.0, shape[-1]) + 0.5

    @functools.partial(jax.jit, static_argnums=0)
    def both(form, w, gain):
        loss = lambda w, gain: jnp.sum(weights * form(w, gain, eps=eps, eps_mode=eps_mode))  # noqa: E731
        return jax.grad(loss, (0, 1))(w, gain)

    for ours, wanted in zip(
        both(standardize, w, gain), both(plain_standardize, w, gain), strict=True
    ):
        scale = float(jnp.abs(wanted).max())
        np.testing.assert_allclose(ours, wanted, rtol=1e-5, atol=3e-6 * scale)


@pytest.mark.parametrize("depth", [1, 3])
def test_stacked_kernels_are_standardised_each_for_itself(depth):
    keys = nnx.Rngs(0).split(depth)
    stack = nnx.vmap(lambda rngs: WSConv(8, 16, (3, 3), feature_group_count=2, rngs=rngs))(keys)
    gains = normals(depth, 16)
    stack.gain.set_value(gains)
    ready = measured({"stack": stack})["stack"]
    kernels = ready.standardized()
    assert kernels.shape == (depth, 3, 3, 4, 16)
    for i in range(depth):
        wanted = standardize(stack.kernel[i], stack.gain[i])
        np.testing.assert_allclose(kernels[i], wanted, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(stack.gain[...], gains)
    np.testing.assert_array_equal(measured(ready).standardized(), kernels)


def test_a_layer_measured_before_has_the_gradients_of_one_that_is_not():
    layer, x = WSConv(8, 16, (3, 3), rngs=nnx.Rngs(0)), normals(2, 6, 6, 8)
    graph, params = nnx.split(layer)

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(prepare, params):
        def loss(params):
            y = prepare(nnx.merge(graph, params))(x)
            return jnp.sum(y * jnp.cos(y))

        return jax.grad(loss)(params)

    wanted, found = gradients(lambda layer: layer, params), gradients(measured, params)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
