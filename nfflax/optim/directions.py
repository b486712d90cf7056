"""The ways to turn a clipped gradient into a direction, and the official optimiser as a whole.

A direction lacks only the learning rate. It takes a `Roles` table, from which it knows what decays
and which leading axes only stack layers.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from nfflax.optim.agc import agc, unit_norm
from nfflax.optim.momentum import momentum as decayed_momentum
from nfflax.optim.roles import Path, Roles, leaves_by_path, map_by_path, with_roles


def sgd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: float = 0.9,
    nesterov: bool = True,
    dampening: float = 0.0,
    weight_decay: float = 2e-5,
    clipping: optax.ScalarOrSchedule | None = 0.01,
    eps: float = 1e-3,
    roles: Any = None,
    statistics: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """The optimiser that trained the published NFNets: SGD with adaptive gradient clipping.

        tx = nfflax.optim.sgd(nfflax.optim.warmup_cosine(1.6, 112_602, 1564))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        optimizer.update(model, grads)

    In the official order: clip the raw gradient, add `weight_decay` times the weight, momentum,
    Nesterov, learning rate (`nfnets/optim.py`, `SGD_AGC`). Gains, biases and skip gains do not
    decay; the classifier's weight is not clipped. `clipping=None` leaves clipping out. `roles` is
    as in `nfflax.agc`, and so are the rules for parameters without a role; of those, matrices and
    kernels decay.
    """

    def make(found: Roles) -> optax.GradientTransformation:
        clip = agc(clipping, eps, roles=found, statistics=statistics) if clipping else None
        return optax.chain(
            clip or optax.identity(),
            decayed_momentum(
                momentum,
                found,
                nesterov=nesterov,
                dampening=dampening,
                weight_decay=weight_decay,
            ),
            optax.scale_by_learning_rate(learning_rate),
        )

    return with_roles(make, roles)


def decayed(weight_decay: float, roles: Roles) -> optax.GradientTransformation:
    """Add `weight_decay` times each weight that decays by its role."""

    def decays(params: optax.Params) -> Any:
        return map_by_path(lambda path, leaf: roles.treatment(path, jnp.shape(leaf)).decay, params)

    return (
        optax.add_decayed_weights(weight_decay, mask=decays) if weight_decay else optax.identity()
    )


def lars_scaled(coefficient: float, roles: Roles) -> optax.GradientTransformation:
    """Scale each layer's gradient to its weight's norm (LARS, arXiv:1708.03888).

    `optax.scale_by_trust_ratio` takes a stack of layers for one layer; here each has its own ratio.
    Vectors and scalars, which do not decay, are left as they are.
    """

    def scaled(path: Path, gradient: jax.Array, weight: jax.Array) -> jax.Array:
        treatment = roles.treatment(path, jnp.shape(weight))
        if not treatment.decay:
            return gradient
        axes = tuple(range(treatment.stacked, jnp.ndim(weight)))
        weight_norm, gradient_norm = unit_norm(weight, axes), unit_norm(gradient, axes)
        known = (weight_norm > 0) & (gradient_norm > 0)
        ratio = coefficient * weight_norm / jnp.where(known, gradient_norm, 1.0)
        return gradient * jnp.where(known, ratio, 1.0)

    def update(updates: optax.Updates, state: Any, params: optax.Params | None = None) -> Any:
        if params is None:
            raise ValueError("LARS needs the weights as well: call update(grads, state, params)")
        weights = leaves_by_path(params)
        return map_by_path(lambda path, g: scaled(path, g, weights[path]), updates), state

    return optax.GradientTransformation(optax.init_empty_state, update)
