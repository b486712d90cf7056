"""A guard against slow programs: ours against what XLA makes of the plain formula, in one process.

CPU seconds, in turns, the least of each: other work on the machine changes both. Measured on an
idle machine were 20, 150 and more, 1.0 and 1.0 to 5; the bounds leave room for noise, and catch
what once was: gradients with zeros between strided pixels at 0.3.
"""

import math
import time

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from nfflax.nn.conv import conv
from nfflax.nn.wsconv import standardize

pytestmark = pytest.mark.slow

TURNS = 3
LAYOUT = ("NHWC", "HWIO", "NHWC")


def plain_conv(x, w, *, stride=1, groups=1):
    return lax.conv_general_dilated(
        x, w, (stride, stride), "SAME", dimension_numbers=LAYOUT, feature_group_count=groups
    )


def plain_standardize(w, gain):
    axes, fan_in = (0, 1, 2), math.prod(w.shape[:-1])
    mean, var = jnp.mean(w, axes), jnp.var(w, axes)
    scale = lax.rsqrt(jnp.maximum(var * fan_in, 1e-4)) * gain
    return w * scale - mean * scale


def gradients(f):
    """The gradients of both arguments, each weighed so that none is trivial."""

    def loss(first, second):
        y = f(first, second)
        return jnp.sum(y * jnp.cos(y))

    return jax.jit(jax.grad(loss, (0, 1)))


def in_a_scan(f):
    return lambda x, ws: lax.scan(lambda y, w: (y + jnp.tanh(f(y, w)), None), x, ws)[0]


def ratio(plain, ours, arguments):
    """How many times the CPU seconds of ours the plain program takes."""
    least = {}
    for _ in range(TURNS):
        for program in (plain, ours):
            jax.block_until_ready(program(*arguments))
            start = time.process_time()
            jax.block_until_ready(program(*arguments))
            seconds = time.process_time() - start
            least[program] = min(seconds, least.get(program, math.inf))
    return least[plain] / least[ours]


def normals(*shapes):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def test_grouped_convolutions_in_a_stack():
    plain = gradients(in_a_scan(lambda x, w: plain_conv(x, w, groups=2)))
    ours = gradients(in_a_scan(lambda x, w: conv(x, w, groups=2)))
    assert ratio(plain, ours, normals((8, 6, 6, 256), (2, 3, 3, 128, 256))) > 8


def test_many_narrow_groups():
    plain = gradients(lambda x, w: plain_conv(x, w, groups=43))
    ours = gradients(lambda x, w: conv(x, w, groups=43))
    assert ratio(plain, ours, normals((4, 12, 12, 344), (3, 3, 8, 344))) > 30


def test_strided_convolutions():
    plain = gradients(lambda x, w: plain_conv(x, w, stride=2))
    ours = gradients(lambda x, w: conv(x, w, stride=2))
    assert ratio(plain, ours, normals((8, 48, 48, 64), (3, 3, 64, 128))) > 0.6


def test_standardising_a_stack():
    plain = gradients(lambda ws, gains: jax.vmap(plain_standardize)(ws, gains))
    ours = gradients(lambda ws, gains: jax.vmap(standardize)(ws, gains))
    assert ratio(plain, ours, normals((4, 1, 1, 1536, 768), (4, 768))) > 0.6
