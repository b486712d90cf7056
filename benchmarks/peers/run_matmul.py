"""The floor: how fast the machine multiplies large matrices in the type that is computed in.

A step is one product; its multiply-adds over its seconds are the rate that networks are held
against.
"""

import jax
import jax.numpy as jnp

from peers.harness import Program, Run, serve
from peers.job import Job
from peers.with_jax import described, installed, repeated

SIDE = {"cpu": 2048, "cuda": 8192}


def prepare(job: Job) -> Program:
    """One product of square matrices; its multiply-adds are given per "image" of a batch of 1."""
    side = SIDE[job.device]
    keys = jax.random.split(jax.random.key(0))
    a, b = (jax.random.normal(key, (side, side), jnp.dtype(job.dtype)) for key in keys)

    def compile() -> Run:
        product = jax.jit(jnp.matmul).lower(a, b).compile()
        return repeated(lambda a: (a, product(a, b)), a)

    return described(compile, (), macs=side**3, versions=installed())


if __name__ == "__main__":
    serve(prepare)
