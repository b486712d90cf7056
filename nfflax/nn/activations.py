"""Nonlinearities by name, each with the gamma that restores unit variance after it.

`register_activation` adds new ones; their gamma comes from quadrature. Modules keep the name, not
the function, so that equal networks compare equal and never retrace.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from nfflax.nn.lean import kept_in_a_loop, lean
from nfflax.spec.activations import (
    PUBLISHED_GAMMAS,
    QUADRATURE_GAMMAS,
    add_activation_name,
)

Function = Callable[[jax.Array], jax.Array]


@dataclass(frozen=True)
class Activation:
    """A function and 1 / std of its output on N(0, 1) input."""

    function: Function
    gamma: float


def _gelu_exact(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=False)


def _identity(x: jax.Array) -> jax.Array:
    return x


_registry: dict[str, Activation] = {}


def register_activation(name: str, function: Function, gamma: float | None = None) -> Activation:
    """Make `function` available to specs as `name`. Without `gamma` it is found by quadrature."""
    if name in _registry:
        raise ValueError(f"activation {name!r} is already registered")
    activation = Activation(function, gamma_of(function) if gamma is None else float(gamma))
    _registry[name] = activation
    add_activation_name(name)
    return activation


def get_activation(name: str) -> Activation:
    """The activation called `name`."""
    return _registry[name]


@functools.cache
def saving(function: Function) -> Function:
    """`function` in the form that leaves less for the backward pass: autodiff's, or its input."""
    x = jax.ShapeDtypeStruct((1,), jnp.float32)
    return lean(function) if kept_in_a_loop(function, x) > x.dtype.itemsize else function


def gamma_of(function: Function, tolerance: float = 1e-12) -> float:
    """1 / std(function(z)), z ~ N(0, 1), by adaptive Gauss-Legendre quadrature in float64.

    Intervals are halved until both halves agree with the whole, so kinks and jumps anywhere are
    found. `function` must act elementwise.
    """
    nodes, weights = np.polynomial.legendre.leggauss(10)

    def moments(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Integrals of f and f^2 against the normal density over each interval."""
        half = (right - left)[:, None] / 2
        z = left[:, None] + half * (nodes + 1)
        with jax.enable_x64(True):
            f = np.asarray(function(jnp.asarray(z)), np.float64)
        density = np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi) * weights * half
        return np.stack([(f * density).sum(-1), (f**2 * density).sum(-1)])

    edges = np.linspace(-12.0, 12.0, 49)  # beyond 12 the density is below 1e-31
    left, right, total = edges[:-1], edges[1:], np.zeros(2)
    for _ in range(48):  # halvings: 48 of them take an interval of 0.5 below 1e-14
        middle = (left + right) / 2
        whole = moments(left, right)
        halves = moments(left, middle) + moments(middle, right)
        settled = np.abs(whole - halves).max(0) < tolerance / len(edges)
        total += halves[:, settled].sum(-1)
        left, middle, right = left[~settled], middle[~settled], right[~settled]
        left, right = np.concatenate([left, middle]), np.concatenate([middle, right])
        if not left.size:
            break
    else:
        total += moments(left, right).sum(-1)
    variance = float(total[1] - total[0] ** 2)
    if not np.isfinite(variance) or variance <= 1e-12:
        raise ValueError(f"the output of {function} on N(0, 1) has variance {variance}: no gamma")
    return variance**-0.5


for _name, _function in {
    "identity": _identity,
    "celu": jax.nn.celu,
    "elu": jax.nn.elu,
    "gelu": jax.nn.gelu,
    "gelu_exact": _gelu_exact,
    "hard_swish": jax.nn.hard_swish,
    "leaky_relu": jax.nn.leaky_relu,
    "log_sigmoid": jax.nn.log_sigmoid,
    "log_softmax": jax.nn.log_softmax,
    "mish": jax.nn.mish,
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "selu": jax.nn.selu,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "soft_sign": jax.nn.soft_sign,
    "softplus": jax.nn.softplus,
    "tanh": jnp.tanh,
}.items():
    register_activation(_name, _function, (PUBLISHED_GAMMAS | QUADRATURE_GAMMAS)[_name])
