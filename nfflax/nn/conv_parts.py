"""What the forms of a convolution share: XLA's own operation, padding, windows, narrow groups."""

import itertools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
from jax import lax

Pads = tuple[tuple[int, int], ...]
Ints = tuple[int, ...]
Dense = Callable[[jax.Array, jax.Array], jax.Array]

# Narrow groups are computed several at a time, as one dense convolution with a block-diagonal
# kernel about this wide: the extra products cost less than many tiny convolutions.
_BUNDLE_WIDTH = 32


def native(
    x: jax.Array, w: jax.Array, *, strides: Ints, pads: Pads, dilations: Ints, groups: int = 1
) -> jax.Array:
    """XLA's own convolution, channels last, over one to three spatial axes."""
    space = "DHW"[2 - x.ndim :]
    return lax.conv_general_dilated(
        x,
        w,
        strides,
        pads,
        rhs_dilation=dilations,
        dimension_numbers=(f"N{space}C", f"{space}IO", f"N{space}C"),
        feature_group_count=groups,
    )


def edged(x: jax.Array, pads: Sequence[tuple[int, int]]) -> jax.Array:
    """A map with zeros around it, or cut where padding is negative."""
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *((*p, 0) for p in pads), (0, 0, 0)])


def tap_starts(w: jax.Array, dilations: Ints) -> Iterator[tuple[Ints, Ints]]:
    """Every position in a kernel's window, and how far it lies from the first."""
    for tap in itertools.product(*map(range, w.shape[:-2])):
        yield tap, tuple(t * d for t, d in zip(tap, dilations, strict=True))


def shifted(x: jax.Array, starts: Ints, spans: Sequence[int], strides: Ints) -> jax.Array:
    """What one position of the window sees of a padded map."""
    places = zip(starts, spans, strides, strict=True)
    return x[(slice(None), *(slice(start, start + span, s) for start, span, s in places))]


def bundled(x: jax.Array, w: jax.Array, groups: int, dense: Dense) -> jax.Array:
    """A grouped convolution as dense ones, over several groups each where those are narrow."""
    if groups == 1:
        return dense(x, w)
    inputs, outputs = x.shape[-1] // groups, w.shape[-1] // groups
    width = bundle(inputs)
    parts = []
    for first in range(0, groups, width):
        count = min(width, groups - first)
        x_part = lax.slice_in_dim(x, first * inputs, (first + count) * inputs, axis=-1)
        w_part = lax.slice_in_dim(w, first * outputs, (first + count) * outputs, axis=-1)
        parts.append(dense(x_part, block_diagonal(w_part, count)))
    return jnp.concatenate(parts, axis=-1)


def bundle(inputs: int) -> int:
    """How many groups of some input channels go into one dense convolution."""
    return max(1, _BUNDLE_WIDTH // inputs)


def block_diagonal(w: jax.Array, groups: int) -> jax.Array:
    """The dense kernel that does what `w` does in `groups` groups."""
    if groups == 1:
        return w
    *window, inputs, outputs = w.shape
    per_group = w.reshape(*window, inputs, groups, outputs // groups)
    diagonal = jnp.einsum("...igo,gh->...higo", per_group, jnp.eye(groups, dtype=w.dtype))
    return diagonal.reshape(*window, groups * inputs, outputs)
