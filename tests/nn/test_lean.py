"""Lean functions: the same gradients from less that is kept."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nfflax.nn import WSConv
from nfflax.nn.lean import lean


def left_by(function, *arguments):
    """Shapes of what a function leaves for the backward pass."""
    left = jax.eval_shape(lambda *a: jax.vjp(function, *a)[1], *arguments)
    return sorted(array.shape for array in jax.tree.leaves(left))


def plain(x, w):
    return jnp.tanh(jnp.sin(x) * w) * jnp.exp(x)


def test_arguments_are_all_that_is_left_and_gradients_are_the_same():
    x, w = jnp.linspace(-1, 1, 12).reshape(3, 4), jnp.linspace(1, 2, 4)
    assert len(left_by(plain, x, w)) > 2
    assert left_by(lean(plain), x, w) == [(3, 4), (4,)]

    @jax.jit
    def both(x, w):
        found, wanted = (
            jax.grad(lambda x, w, f=f: jnp.sum(f(x, w) ** 2), (0, 1)) for f in (lean(plain), plain)
        )
        return found(x, w), wanted(x, w)

    for ours, theirs in zip(*both(x, w), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_a_layer_leaves_its_input_and_its_kernel_as_it_is():
    layer = nnx.eval_shape(lambda: WSConv(96, 96, (3, 3), feature_group_count=6, rngs=nnx.Rngs(0)))
    graph, params = nnx.split(layer)
    x_NHWC = jax.ShapeDtypeStruct((2, 9, 9, 96), jnp.bfloat16)

    def applied(params, x_NHWC):
        return nnx.merge(graph, params)(x_NHWC)

    left = left_by(applied, params, x_NHWC)
    assert [shape for shape in left if len(shape) == 4 and shape[0] == 2] == [x_NHWC.shape]
    kernels = [shape for shape in left if shape == (3, 3, 16, 96)]
    assert len(kernels) <= 2  # for the convolution and for the statistics: one and the same
    assert all(np.prod(shape) <= 96 for shape in left if shape not in {x_NHWC.shape, *kernels})
