"""How a transform learns the roles of parameters: from the parameters themselves, by path.

An NNX parameter carries its role as metadata (see `nfflax.Role`), but optax hands a transform bare
arrays when it updates. So roles are read where they are visible, from a module or from the state
that `init` is given, and looked up by path afterwards. Paths also survive `optax.masked` and
`optax.multi_transform`, which replace leaves by placeholders.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Treatment:
    """What optimisers do with one parameter."""

    unit_axes: tuple[int, ...]
    """Axes that the norm of one unit reduces, counted from the end."""
    decay: bool
    """Whether weight decay applies."""
    clip: bool
    """Whether adaptive gradient clipping applies."""
    stacked: int = 0
    """How many leading axes only stack layers."""


class Roles(Mapping[Path, Treatment]):
    """The treatment of every parameter that carries a role, by path. Hashable."""

    def __init__(self, treatments: Mapping[Path, Treatment]):
        self._treatments = dict(treatments)
        self._hash = hash(frozenset(self._treatments.items()))

    def __getitem__(self, path: Path) -> Treatment:
        return self._treatments[path]

    def __iter__(self) -> Iterator[Path]:
        return iter(self._treatments)

    def __len__(self) -> int:
        return len(self._treatments)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Roles) and self._treatments == other._treatments

    def treatment(self, path: Path, shape: tuple[int, ...]) -> Treatment:
        """The treatment of the parameter at `path`: by its role, or else by its rank."""
        return nearest_entry(self, path) or by_rank(shape)


def read_roles(tree: Any) -> Roles:
    """The roles carried by the variables of a module, a state or any other pytree."""
    if isinstance(tree, Roles):
        return tree
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_has_metadata)
    treatments = {}
    for keys, leaf in leaves:
        role = leaf.get_metadata().get("role") if _has_metadata(leaf) else None
        if role is not None:
            stacked = len(leaf.shape) - len(role.axes)
            treatments[path_of(keys)] = Treatment(role.unit_axes, role.decay, role.clip, stacked)
    return Roles(treatments)


def by_rank(shape: tuple[int, ...]) -> Treatment:
    """The treatment of a parameter that carries no role.

    Up to rank 4 the unit axes are the official ones (`nfnets/optim.py`, `unitwise_norm`): what
    squeezes to a vector or scalar is one unit; ranks 2 and 3 reduce their first axis; rank 4, HWIO,
    all but the last, and so do higher ranks, which the official code refuses. A layer axis cannot
    be told from another one by its rank: stacked parameters need a role or explicit axes. Weights
    decay and vectors do not; everything is clipped.
    """
    rank = len(shape)
    if sum(size != 1 for size in shape) <= 1:
        axes = tuple(range(-rank, 0))
    elif rank <= 3:
        axes = (-rank,)
    else:
        axes = tuple(range(-rank, -1))
    return Treatment(axes, decay=rank >= 2, clip=True)


def from_the_end(axes: Iterable[int], rank: int) -> tuple[int, ...]:
    """Axes of an array of this rank, counted from the end; ValueError where it lacks one."""
    counted = list(axes)
    if any(not -rank <= axis < rank for axis in counted):
        raise ValueError(f"an array of rank {rank} lacks some of the axes {counted}")
    return tuple(sorted({axis % rank - rank for axis in counted}))


def part_of(path: Path) -> str:
    """The part of a network that a parameter belongs to: "stem", "stages.2", "classifier", ..."""
    if "stages" in path[:-1]:
        return dotted(path[: path.index("stages") + 2])
    return str(path[0]) if path else ""


def dotted(path: Path) -> str:
    """A path as people write it: `stages.2.rest.conv1.kernel`."""
    return ".".join(map(str, path))


def path_of(keys: tuple[Any, ...]) -> Path:
    """JAX's key path as plain names and numbers."""
    return tuple(_plain(key) for key in keys)


def leaves_by_path(tree: Any) -> dict[Path, Any]:
    """The leaves of a pytree by path."""
    return {path_of(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def map_by_path(function: Callable[..., Any], tree: Any) -> Any:
    """The tree with every leaf replaced by `function(path, leaf)`."""
    return jax.tree_util.tree_map_with_path(lambda keys, x: function(path_of(keys), x), tree)


def nearest_entry(entries: Mapping[Path, Any], path: Path) -> Any:
    """The entry for a path or, failing that, for its longest beginning; None if there is none.

    A variable may add a key of its own to the path of its array, and an entry may stand for all
    that lies below it.
    """
    for length in range(len(path), -1, -1):
        if path[:length] in entries:
            return entries[path[:length]]
    return None


class Static:
    """A value inside a pytree that is no array: it takes part in comparing trees, not in mapping.

    optax probes transforms with a parameter tree without leaves (`optax.tree.map_params`) and maps
    the state it gets beside the real one. The `unknown` value of that state fits any other.
    """

    def __init__(self, value: Any, *, unknown: bool = False):
        self.value, self.unknown = value, unknown

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Static):
            return NotImplemented
        return self.unknown or other.unknown or self.value == other.value

    def __hash__(self) -> int:
        return hash(Static)  # equal to `unknown` means equal in hash

    def __repr__(self) -> str:
        return "Static()"


jax.tree_util.register_static(Static)


class WithRolesState(NamedTuple):
    """The state of a transform that reads roles, and the roles that `init` saw."""

    roles: Static
    inner: optax.OptState


def with_roles(
    make: Callable[[Roles], optax.GradientTransformation], roles: Any = None
) -> optax.GradientTransformationExtraArgs:
    """The transform that `make` builds from the roles given or, without, from those `init` sees."""
    if roles is not None:
        return optax.with_extra_args_support(make(read_roles(roles)))

    def init(params: optax.Params) -> WithRolesState:
        found = read_roles(params)
        return WithRolesState(Static(found, unknown=is_probe(params)), make(found).init(params))

    def update(
        updates: optax.Updates,
        state: WithRolesState,
        params: optax.Params | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, WithRolesState]:
        tx = optax.with_extra_args_support(make(state.roles.value))
        updates, inner = tx.update(updates, state.inner, params, **extra)
        return updates, WithRolesState(state.roles, inner)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def is_probe(params: optax.Params) -> bool:
    """Whether these are no parameters but what optax probes a transform with."""
    return not jax.tree.leaves(params)


def _has_metadata(leaf: Any) -> bool:
    return hasattr(leaf, "get_metadata")


def _plain(key: Any) -> str | int:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            value = getattr(key, attribute)
            return int(value) if isinstance(value, int | np.integer) else str(value)
    return str(key)
