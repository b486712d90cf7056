"""DeepMind's own code: the folder `nfnets` of a checkout of google-deepmind/deepmind-research.

Its networks and its optimiser run as they are on today's JAX and Haiku. Its trainer does not: the
step around them is written anew. Option: `clip`, its SGD_AGC in place of optax's SGD.
"""

import sys
from typing import Any

import haiku as hk  # pyright: ignore[reportMissingImports]
import jax
import jax.numpy as jnp
import optax

from peers.harness import Program, serve
from peers.job import CLASSES, Job
from peers.with_jax import LEARNING_RATE, installed, program


def prepare(job: Job) -> Program:
    """The variant of NFNet that the network's name ends with."""
    sys.path.insert(0, job.source)
    from nfnets import nfnet, optim  # pyright: ignore[reportMissingImports]

    family, _, variant = job.network.partition("_")
    if family != "nfnet" or variant.upper() not in nfnet.NFNet.variant_dict:
        raise ValueError(f"the official code has no {job.network}")

    def network(x_NHWC: jax.Array) -> jax.Array:
        made = nfnet.NFNet(CLASSES, variant.upper(), stochdepth_rate=0.0, drop_rate=0.0)
        return made(x_NHWC, is_training=job.what == "step")["logits"]

    transformed = hk.without_apply_rng(hk.transform(network))
    shape = 1, job.pixels, job.pixels, 3
    params = jax.jit(transformed.init)(jax.random.key(0), jnp.zeros(shape))

    def forward(params: Any, x_NHWC: jax.Array) -> jax.Array:
        return transformed.apply(jax.tree.map(lambda p: p.astype(job.dtype), params), x_NHWC)

    update = _their_update(optim, params) if job.options.get("clip") else None
    return program(job, forward, params, update=update, versions=installed("dm-haiku", "optax"))


def _their_update(optim: Any, params: Any) -> optax.GradientTransformation:
    theirs = optim.SGD_AGC(params, LEARNING_RATE, momentum=0.9, nesterov=True)

    def init(params: Any) -> Any:
        return theirs.states()

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        after, state = theirs.step(params, updates, state)
        return jax.tree.map(jnp.subtract, after, params), state

    return optax.GradientTransformation(init, update)


if __name__ == "__main__":
    serve(prepare)
