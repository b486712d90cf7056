"""At initialisation the signal grows as the plan says, for every activation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import nfflax
from nfflax.spec.activations import PUBLISHED_GAMMAS

# NF-ResNet: strided shortcuts and no attention, so nothing departs from the plan.
PLAIN = {
    "extends": "nf_resnet",
    "name": "plain",
    "stem": {"width": 32, "kernel": 3, "stride": 1, "pool": "none"},
    "stages": {"depth": 3, "width": [256, 512], "stride": [1, 2]},
    "block": {"skip_gain": "ones"},
    "head": {"num_classes": 0},
    "resolution": {"train": 32, "test": 32},
}
# log_softmax couples all channels, so its gamma holds for no particular width.
ACTIVATIONS = [*(n for n in PUBLISHED_GAMMAS if n != "log_softmax"), "mish", "hard_swish"]
USUAL = ("relu", "gelu", "silu")  # test_activations.py holds every gamma against quadrature


@pytest.mark.parametrize(
    "activation",
    [name if name in USUAL else pytest.param(name, marks=pytest.mark.slow) for name in ACTIVATIONS],
)
def test_each_block_adds_the_planned_variance(activation):
    spec = nfflax.load_spec(PLAIN, {"numerics.activation": activation})
    model = nfflax.build(spec, rngs=nnx.Rngs(0))
    # Large maps: at their borders a convolution sees zeros (docs/signal-propagation.md).
    x = jax.random.normal(jax.random.key(1), (1, 64, 64, 3))
    found = nfflax.signals(model, x)
    variance = np.asarray(found["avg_var"])
    for i, block in enumerate(model.plan.blocks):
        if not block.projection:  # within a stage: the output's variance minus the input's
            added = variance[i + 1] - variance[i]
            assert added == pytest.approx(block.alpha**2, rel=0.2), block.name
            assert float(found["res_avg_var"][i]) == pytest.approx(1, rel=0.2), block.name


@pytest.mark.slow
def test_signals_are_those_of_the_maps():
    """The stacked statistics of the scan equal statistics of the feature maps."""
    model = nfflax.build("nfnet_tiny", rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (4, 32, 32, 3))
    found = nfflax.signals(model, x)
    maps = nnx.jit(lambda model, x: model.features(x))(model, x)
    depth = len(model.plan.blocks)
    assert {k: v.shape for k, v in found.items()} == {
        "avg_sq_mean": (depth + 1,),
        "avg_var": (depth + 1,),
        "res_avg_var": (depth,),
    }
    ends = np.cumsum(model.spec.stages.depth)
    for level, end in enumerate(ends, start=2):
        map_NHWC = np.asarray(maps[level], np.float64)
        np.testing.assert_allclose(found["avg_var"][end], map_NHWC.var((0, 1, 2)).mean(), rtol=1e-5)
        np.testing.assert_allclose(
            found["avg_sq_mean"][end], (map_NHWC.mean((0, 1, 2)) ** 2).mean(), rtol=1e-4
        )
    np.testing.assert_allclose(found["avg_var"][0], jnp.var(maps[1], (0, 1, 2)).mean(), rtol=1e-5)
