"""Parameters that do not train: another kind of variable, and no gradient.

A type of its own keeps them away from whatever asks for `nnx.Param`: `nnx.grad`, `nnx.Optimizer`,
weight decay, clipping, averages. Stopped gradients do the same for plain `jax.grad`, and let the
backward pass forget what only they would need.
"""

from typing import TypeVar

import jax
from flax import nnx
from jax import lax

Part = TypeVar("Part", bound=nnx.Module)


class Frozen(nnx.Variable[jax.Array]):
    """A parameter that does not train. It keeps its role and its path."""


# The collection that flax.nnx.bridge puts them in.
nnx.register_variable_name("frozen", Frozen, overwrite=True)


def freeze(part: nnx.Module) -> None:
    """Make every parameter of a part a Frozen one, in place."""
    for _, module in list(nnx.iter_graph(part)):
        if isinstance(module, nnx.Module):
            for name, variable in list(vars(module).items()):
                if isinstance(variable, nnx.Param):
                    setattr(module, name, Frozen(variable[...], **variable.get_metadata()))


def stopped(part: Part) -> Part:
    """The part with the same numbers, through which no gradient reaches them."""
    return jax.tree.map(lax.stop_gradient, part)
