"""Who lies where: the bytes of a training state on every device, as data and as a table."""

# ruff: noqa: RUF001 - the multiplication sign is meant

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
from rich.box import SIMPLE
from rich.table import Table

from nfflax.optim.roles import dotted, leaves_by_path, part_of
from nfflax.spec.table import human

_MEANING = {
    "params": "all of the above",
    "ema": "their running average",
    "stats": "BatchNorm's statistics",
    "opt": "the optimiser's state",
}


@dataclasses.dataclass(frozen=True)
class Share:
    """Bytes of some arrays in all, and what one device holds of them."""

    bytes: int = 0
    per_device: int = 0

    def __add__(self, other: "Share") -> "Share":
        return Share(self.bytes + other.bytes, self.per_device + other.per_device)


@dataclasses.dataclass(frozen=True)
class Row:
    """Parameters of one part of the network that are split alike."""

    part: str
    parameters: tuple[str, ...]
    """Dotted paths, those with the most weights first."""
    shape: tuple[int, ...]
    """Of the first of them."""
    split: tuple[str, ...]
    """Mesh axes that split it, per axis of the shape: "fsdp", "tensor fsdp", "" for none."""
    share: Share


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the arrays of a training state lie."""

    mesh: Mapping[str, int]
    rows: tuple[Row, ...]
    """The parameters."""
    totals: Mapping[str, Share]
    """By part of the state: "params", "ema", "stats", "opt"."""

    @property
    def total(self) -> Share:
        """The whole state."""
        return sum(self.totals.values(), Share())

    def as_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        return dataclasses.asdict(self) | {"total": dataclasses.asdict(self.total)}

    def __rich__(self) -> Table:
        """Parameters by part and split, then the parts of the state."""
        table = Table(box=SIMPLE, show_edge=False, pad_edge=False, header_style="dim")
        for header, style in (("part", "bold"), ("parameters", ""), ("split by", "cyan")):
            table.add_column(header, style=style)
        for header in ("bytes", "per device"):
            table.add_column(header, justify="right", style="green")
        before = ""
        for row in self.rows:
            part, before = "" if row.part == before else row.part, row.part
            largest = row.parameters[0].removeprefix(f"{row.part}.")
            more = f" and {len(row.parameters) - 1} more" if len(row.parameters) > 1 else ""
            shape = "×".join(map(str, row.shape)) or "1"
            split = ", ".join(filter(None, row.split)) or "-"
            table.add_row(part, f"{largest} {shape}{more}", split, *_shown(row.share))
        table.add_section()
        for name, share in self.totals.items():
            table.add_row(name, _MEANING[name], "", *_shown(share))
        size = " × ".join(f"{axis} {size}" for axis, size in self.mesh.items() if size > 1)
        table.add_row("total", size or "one device", "", *_shown(self.total), style="bold")
        return table


def layout(state: Mapping[str, Any]) -> Layout:
    """The layout of a training state (`nfflax.train.state`), abstract or real."""
    mesh = next(iter(jax.tree.leaves(state))).sharding.mesh
    groups: dict[tuple[str, tuple[str, ...]], list[tuple[str, Any]]] = {}
    for path, leaf in leaves_by_path(state["params"]).items():
        splits = _split(leaf)
        used = tuple(axes for axes in splits if axes)
        groups.setdefault((part_of(path), used), []).append((dotted(path), leaf))
    rows = [_row(part, members) for (part, _), members in groups.items()]
    order = {part: i for i, (part, _) in enumerate(groups)}
    rows.sort(key=lambda row: (order[row.part], -row.share.bytes))
    parts = [name for name in _MEANING if jax.tree.leaves(state.get(name))]
    totals = {n: sum(map(_share, jax.tree.leaves(state[n])), Share()) for n in parts}
    return Layout(dict(mesh.shape), tuple(rows), totals)


def _row(part: str, members: list[tuple[str, Any]]) -> Row:
    members = sorted(members, key=lambda member: -_share(member[1]).bytes)
    names, leaves = zip(*members, strict=True)
    shares = map(_share, leaves)
    return Row(part, names, leaves[0].shape, _split(leaves[0]), sum(shares, Share()))


def _share(leaf: Any) -> Share:
    own = math.prod(leaf.sharding.shard_shape(leaf.shape))
    return Share(leaf.size * leaf.dtype.itemsize, own * leaf.dtype.itemsize)


def _split(leaf: Any) -> tuple[str, ...]:
    """The mesh axes that split each axis of an array."""
    spec = tuple(leaf.sharding.spec)
    axes = (*spec, *(None,) * (leaf.ndim - len(spec)))
    return tuple(" ".join(axis) if isinstance(axis, tuple) else axis or "" for axis in axes)


def _shown(share: Share) -> tuple[str, str]:
    return f"{human(share.bytes)}B", f"{human(share.per_device)}B"
