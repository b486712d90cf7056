"""Functions that keep only their arguments for the backward pass, and what others keep."""

from collections.abc import Callable

import jax


def lean(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`function`, computed anew in the backward pass for what else its gradient needs.

    Autodiff keeps every factor of every product, however cheap, and what any platform's form of a
    convolution needs; a scanned stage then stacks them all, five times the memory. Where there is
    no loop XLA still merges what is equal in both passes.
    """

    @jax.custom_vjp
    def kept(*arguments: jax.Array) -> jax.Array:
        return function(*arguments)

    def forward(*arguments: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        return function(*arguments), arguments

    def backward(arguments: tuple[jax.Array, ...], dy: jax.Array) -> tuple[jax.Array, ...]:
        return jax.vjp(function, *arguments)[1](dy)

    kept.defvjp(forward, backward)
    return kept


def kept_in_a_loop(function: Callable[[jax.Array], jax.Array], x: jax.ShapeDtypeStruct) -> int:
    """Bytes per number of `x` that each turn of a loop over `function` keeps for the backward pass.

    Asked of JAX, by tracing. Outside a loop constants would be among it.
    """

    def repeated(x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, _: (function(x), None), x, length=2)[0]

    kept = jax.tree.leaves(jax.eval_shape(lambda x: jax.vjp(repeated, x)[1], x))
    return sum(array.dtype.itemsize for array in kept if array.shape == (2, *x.shape))
