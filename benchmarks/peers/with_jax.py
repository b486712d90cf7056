"""What the contestants on JAX have in common: the same loss, the same update, the same counting."""

import math
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.extend.core import jaxprs_in_params

from peers.harness import Program, Run
from peers.job import CLASSES, Job

Forward = Callable[[Any, jax.Array], jax.Array]
"""Logits of parameters and images."""
# So small that thousands of updates on random labels leave every number finite.
LEARNING_RATE = 1e-3


def sgd() -> optax.GradientTransformation:
    """The plain update that all contestants can make."""
    return optax.sgd(LEARNING_RATE, momentum=0.9, nesterov=True)


def installed(*packages: str) -> dict[str, str]:
    """The versions of packages, and of JAX."""
    return {name: version(name) for name in ("jax", *packages)}


def images(job: Job) -> jax.Array:
    """A batch of noise, on the device."""
    shape = job.batch, job.pixels, job.pixels, 3
    return jax.random.normal(jax.random.key(0), shape, jnp.dtype(job.dtype))


def labels(job: Job) -> jax.Array:
    """As many different classes as there are images."""
    return jnp.arange(job.batch) % CLASSES


def program(
    job: Job,
    forward: Forward,
    params: Any,
    *,
    versions: dict[str, str],
    macs: float | None = None,
    update: optax.GradientTransformation | None = None,
) -> Program:
    """A train step or a forward pass, ready to be compiled. Counts `macs` where there are none."""
    x_NHWC = images(job)
    if macs is None:
        one = jax.ShapeDtypeStruct((1, *x_NHWC.shape[1:]), x_NHWC.dtype)
        macs = count_macs(jax.make_jaxpr(forward)(params, one).jaxpr)
    compile = (
        (lambda: _compiled_step(forward, params, x_NHWC, labels(job), update or sgd()))
        if job.what == "step"
        else (lambda: _compiled_forward(forward, params, x_NHWC))
    )
    return described(compile, params, macs=macs, versions=versions)


def described(
    compile: Callable[[], Run], params: Any, *, macs: float, versions: dict[str, str]
) -> Program:
    """The program with what there is to say about it."""
    device = jax.devices()[0]
    memory = (
        None if device.platform == "cpu" else lambda: device.memory_stats()["peak_bytes_in_use"]
    )
    return Program(
        compile=compile,
        params=sum(leaf.size for leaf in jax.tree.leaves(params)),
        macs=macs,
        device=device.device_kind,
        versions=versions,
        device_memory=memory,
    )


def repeated(step: Callable[[Any], tuple[Any, Any]], state: Any) -> Run:
    """Runs a step on what the one before left. Steps are dispatched ahead, the last is awaited."""
    holder = [state]
    del state  # donated to the first step

    def run(count: int) -> None:
        last = None
        for _ in range(count):
            holder[0], last = step(holder[0])
        jax.block_until_ready(last)

    return run


def _compiled_step(
    forward: Forward,
    params: Any,
    x_NHWC: jax.Array,
    labels: jax.Array,
    update: optax.GradientTransformation,
) -> Run:
    def step(state, x_NHWC, labels):
        params, memory = state

        def loss(params):
            logits = forward(params, x_NHWC).astype(jnp.float32)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        value, gradients = jax.value_and_grad(loss)(params)
        updates, memory = update.update(gradients, memory, params)
        return (optax.apply_updates(params, updates), memory), value

    state = params, jax.jit(update.init)(params)  # both are taken over by the first step
    compiled = jax.jit(step, donate_argnums=0).lower(state, x_NHWC, labels).compile()
    return repeated(lambda state: compiled(state, x_NHWC, labels), state)


def _compiled_forward(forward: Forward, params: Any, x_NHWC: jax.Array) -> Run:
    compiled = jax.jit(forward).lower(params, x_NHWC).compile()
    return repeated(lambda params: (params, compiled(params, x_NHWC)), params)


def count_macs(jaxpr: Any) -> float:
    """Multiply-adds of the convolutions and matrix products in a program without loops."""
    total = 0.0
    for equation in jaxpr.eqns:
        outputs = math.prod(equation.outvars[0].aval.shape)
        if equation.primitive.name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            made = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
            total += outputs * math.prod(kernel) / made
        elif equation.primitive.name == "dot_general":
            (axes, _), _ = equation.params["dimension_numbers"]
            total += outputs * math.prod(equation.invars[0].aval.shape[i] for i in axes)
        total += sum(map(count_macs, jaxprs_in_params(equation.params)))
    return total
