"""Gammas: quadrature against closed forms, and the registry that specs read."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nfflax
from nfflax.nn.activations import get_activation, saving
from nfflax.spec.activations import PUBLISHED_GAMMAS, QUADRATURE_GAMMAS, activation_names

ERF = math.erf


@pytest.mark.parametrize(
    ("function", "variance"),
    [
        (jax.nn.relu, (1 - 1 / math.pi) / 2),
        (lambda x: x, 1.0),
        (lambda x: 3 * x + 7, 9.0),
        (lambda x: x**2, 2.0),
        (jnp.exp, math.e * (math.e - 1)),
        (jnp.abs, 1 - 2 / math.pi),
        (lambda x: jnp.where(x > 0.3712, 1.0, 0.0), 0.25 - (ERF(0.3712 / math.sqrt(2)) / 2) ** 2),
        (jnp.sin, (1 - math.exp(-2)) / 2),
    ],
    ids=["relu", "identity", "affine", "square", "exp", "abs", "step", "sin"],
)
def test_quadrature_equals_the_closed_form(function, variance):
    assert nfflax.gamma_of(function) == pytest.approx(variance**-0.5, rel=1e-9)


@pytest.mark.parametrize("name", [n for n in PUBLISHED_GAMMAS if n != "log_softmax"])
def test_published_gammas_are_verbatim_and_near_the_exact_ones(name):
    """The official constants came from sampling: they are up to 0.1% off, and kept as they are."""
    activation = get_activation(name)
    assert activation.gamma == PUBLISHED_GAMMAS[name]
    assert activation.gamma == pytest.approx(nfflax.gamma_of(activation.function), rel=1.5e-3)


@pytest.mark.parametrize("name", QUADRATURE_GAMMAS)
def test_other_gammas_are_exact(name):
    activation = get_activation(name)
    assert activation.gamma == QUADRATURE_GAMMAS[name]
    assert activation.gamma == pytest.approx(nfflax.gamma_of(activation.function), rel=1e-9)


@pytest.mark.parametrize("name", PUBLISHED_GAMMAS)
def test_an_activation_leaves_one_map_at_most_and_has_its_own_gradient(name):
    function = get_activation(name).function
    x = jnp.linspace(-4.0, 4.0, 24).reshape(2, 12)

    @jax.jit
    def both(x):
        (y, pull), (wanted, wanted_pull) = (jax.vjp(f, x) for f in (saving(function), function))
        dy = jnp.cos(x)
        return (y, *pull(dy)), (wanted, *wanted_pull(dy))

    found, wanted = both(x)
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-7)

    def repeated(x):
        return jax.lax.scan(lambda x, _: (saving(function)(x), None), x, length=3)[0]

    left = jax.tree.leaves(jax.eval_shape(lambda x: jax.vjp(repeated, x)[1], x))
    stacked = sum(a.size * a.dtype.itemsize for a in left if a.shape == (3, *x.shape))
    assert stacked <= 3 * x.size * (1 if name == "relu" else 4)


def test_a_registered_activation_works_in_a_spec():
    name = "leaky_relu_third"
    if name not in activation_names():
        nfflax.register_activation(name, lambda x: jnp.maximum(x, x / 3))
    plan = nfflax.plan(nfflax.load_spec("nfnet_tiny", {"numerics.activation": name}))
    assert plan.spec.numerics.activation == name
    # E f^2 = (1 + 1/9) / 2, E f = (1 - 1/3) / sqrt(2 pi)
    variance = (1 + 1 / 9) / 2 - (2 / 3) ** 2 / (2 * math.pi)
    assert get_activation(name).gamma == pytest.approx(variance**-0.5, rel=1e-9)
    with pytest.raises(ValueError, match="already registered"):
        nfflax.register_activation(name, jnp.tanh)


def test_a_function_without_variance_has_no_gamma():
    with pytest.raises(ValueError, match="variance"):
        nfflax.gamma_of(jnp.zeros_like)


@pytest.mark.parametrize("name", sorted(set(activation_names()) - {"log_softmax"}))
def test_output_variance_is_one(name):
    activation = get_activation(name)
    z = jax.random.normal(jax.random.key(0), (400_000,))
    assert float(jnp.var(activation.function(z) * activation.gamma)) == pytest.approx(1, rel=0.02)


def test_gelu_is_the_tanh_form_and_gelu_exact_the_erf_form():
    z = np.linspace(-4, 4, 101)
    exact = np.array([x * (1 + ERF(x / math.sqrt(2))) / 2 for x in z])
    np.testing.assert_allclose(
        get_activation("gelu_exact").function(jnp.asarray(z)), exact, atol=1e-6
    )
    difference = np.abs(np.asarray(get_activation("gelu").function(jnp.asarray(z))) - exact).max()
    assert 1e-4 < difference < 1e-3
