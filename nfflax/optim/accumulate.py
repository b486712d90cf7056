"""Gradient accumulation: a large batch in several passes, for the memory of one."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Gradient = Callable[[Any, Any, jax.Array], tuple[tuple[jax.Array, Any], Any]]
"""`(params, batch, key) -> ((loss, aux), gradients)`, like `jax.value_and_grad(..., has_aux=True)`.

The batch is a pytree of arrays with a leading batch axis; the loss and every number in aux are
means over its rows.
"""


def with_accumulation(value_and_grad: Gradient, steps: int) -> Gradient:
    """The same function, which works through the batch in `steps` microbatches.

    Loss, aux and gradients are the means over the microbatches, added up in float32 or better, so
    clipping and all that follows see one gradient of the whole batch. What was floating keeps its
    dtype; other numbers in aux become float32.

    Microbatch j takes rows j, j + steps, ...: when the batch is sharded over devices, each device
    takes its share from its own rows and nothing is sent. Microbatch j gets `fold_in(key, j)`.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    if steps == 1:
        return value_and_grad

    def accumulated(params: Any, batch: Any, key: jax.Array) -> tuple[tuple[jax.Array, Any], Any]:
        rows = batch_rows(batch)
        if rows % steps:
            raise ValueError(f"a batch of {rows} rows does not divide into {steps} microbatches")
        dealt = jax.tree.map(lambda x: jnp.reshape(x, (rows // steps, steps, *x.shape[1:])), batch)

        def microbatch(j: jax.typing.ArrayLike) -> tuple[tuple[jax.Array, Any], Any]:
            part = jax.tree.map(
                lambda x: lax.dynamic_index_in_dim(x, j, axis=1, keepdims=False), dealt
            )
            return value_and_grad(params, part, jax.random.fold_in(key, j))

        def add(total: Any, j: jax.Array) -> tuple[Any, None]:
            return jax.tree.map(lambda t, x: t + x.astype(t.dtype), total, microbatch(j)), None

        like = jax.eval_shape(microbatch, 0)
        zero = jax.tree.map(
            lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), like
        )
        total, _ = lax.scan(add, zero, jnp.arange(steps))
        return jax.tree.map(lambda t, x: (t / steps).astype(mean_dtype(x)), total, like)

    return accumulated


def with_preparation(value_and_grad: Gradient, prepare: Callable[[Any], Any]) -> Gradient:
    """The same function, of parameters that `prepare` still has to make into those it takes.

    Around `with_accumulation`, what all microbatches need of the parameters is made once, and its
    gradient, the sum over all of them, goes back through `prepare` once.
    """

    def prepared(params: Any, batch: Any, key: jax.Array) -> tuple[tuple[jax.Array, Any], Any]:
        ready, pull_back = jax.vjp(prepare, params)
        found, gradients = value_and_grad(ready, batch, key)
        return found, pull_back(gradients)[0]

    return prepared


def batch_rows(batch: Any) -> int:
    """How many rows a batch has, in every one of its arrays."""
    shapes = [jnp.shape(x) for x in jax.tree.leaves(batch)]
    if not shapes or len({shape[:1] for shape in shapes}) != 1 or not shapes[0]:
        raise ValueError(f"the arrays of a batch share their first axis; here: {shapes}")
    return shapes[0][0]


def mean_dtype(x: Any) -> Any:
    """The dtype of a mean of arrays like `x`: its own where that is floating, else float32."""
    return x.dtype if jnp.issubdtype(x.dtype, jnp.floating) else jnp.float32
