"""What others must know of a parameter, riding on the parameter itself as metadata.

Optimisers and meshes read roles; they never guess from a name or a rank. So a backbone inside a
larger module keeps its behaviour. Axes count from the end: a role stays right when a leading axis
is added by stacking layers or by vmap.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
from flax import nnx

from nfflax.nn.init import Init


@dataclass(frozen=True)
class Role:
    """How a parameter is optimised and laid out."""

    unit_axes: tuple[int, ...]
    """Axes that the norm of one unit reduces in adaptive gradient clipping (negative)."""
    decay: bool
    """Whether weight decay applies."""
    clip: bool
    """Whether adaptive gradient clipping applies."""
    axes: tuple[str | None, ...]
    """A logical name per axis, which the mesh rules map to mesh axes; None: never sharded."""


def param(rngs: nnx.Rngs, shape: Sequence[int], init: Init, role: Role) -> nnx.Param[jax.Array]:
    """A parameter, drawn from `init`, that carries its distribution and its role."""
    key = rngs.params() if init.kind != "constant" else None
    return nnx.Param(init.draw(key, shape), init=init, role=role)


def role_of(variable: nnx.Variable) -> Role | None:
    """The role a variable carries, or None for a foreign one."""
    return variable.get_metadata().get("role")


def kernel_role(
    shape: Sequence[int], in_axis: str = "in", out_axis: str = "out", *, clip: bool = True
) -> Role:
    """A kernel whose last axis counts units: convolutions of any rank and linear layers.

    The official code squeezes first, so a kernel with one weight per unit counts as one vector
    (`nfnets/optim.py`, `unitwise_norm`).
    """
    per_unit = math.prod(shape[:-1])
    reduced = tuple(range(-len(shape), 0 if per_unit == 1 else -1))
    axes = (None,) * (len(shape) - 2) + (in_axis, out_axis)
    return Role(unit_axes=reduced, decay=True, clip=clip, axes=axes)


def vector_role(axis: str = "out") -> Role:
    """A gain or bias: clipped as one vector, never decayed (arXiv:2102.06171, section 4.1)."""
    return Role(unit_axes=(-1,), decay=False, clip=True, axes=(axis,))


SCALAR_ROLE = Role(unit_axes=(), decay=False, clip=True, axes=())
