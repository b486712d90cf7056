"""Rules that join several keys: lengths agree, groups fit, the strides leave something over."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from nfflax.spec.activations import SYNONYMS, activation_names
from nfflax.spec.errors import NOT_GIVEN, nearest
from nfflax.spec.geometry import bottleneck, rounded_width, stage_width
from nfflax.spec.schema import Head, Numerics, Resolution, Stages, Stem


class Finding(NamedTuple):
    """A broken rule, before it is known which file the key came from."""

    key: str
    message: str
    value: Any = NOT_GIVEN
    allowed: str = ""
    nearest: str = ""
    against: str = ""
    """The other key of a rule that joins two."""


def problems_between(tables: Mapping[str, Any]) -> list[Finding]:
    """Every broken rule among the tables that are themselves valid; the others are skipped."""
    stem, stages = tables.get("stem"), tables.get("stages")
    numerics, resolution = tables.get("numerics"), tables.get("resolution")
    found: list[Finding] = []
    whole = []
    for name, table in (("stem", stem), ("stages", stages)):
        if isinstance(table, Stem | Stages):
            uneven = list(uneven_columns(name, vars(table), table.columns))
            found += uneven
            whole += [] if uneven else [name]
    if isinstance(numerics, Numerics):
        found += _unknown_activation(numerics)
    if len(whole) == 2 and isinstance(stem, Stem) and isinstance(stages, Stages):
        if isinstance(numerics, Numerics):
            found += _misfit_groups(stem, stages, numerics)
        if isinstance(resolution, Resolution):
            found += _vanishing_maps(stem, stages, resolution)
    if isinstance(head := tables.get("head"), Head) and head.width and head.width_mult:
        found.append(
            Finding(
                "head.width",
                f"head.width_mult = {head.width_mult} gives the final convolution's width too",
                head.width,
                "one of the two; set the other to 0",
            )
        )
    return found


def uneven_columns(
    table: str, data: Mapping[str, Any], columns: Sequence[str]
) -> Iterator[Finding]:
    """Columns whose length differs from the first column's."""
    lists = {k: data[k] for k in columns if isinstance(data.get(k), list | tuple)}
    first = next((key for key, column in lists.items() if column), "")
    for key in lists:
        if first and len(lists[key]) != len(lists[first]):
            yield Finding(
                f"{table}.{key}",
                f"has {len(lists[key])} entries, but {table}.{first} has {len(lists[first])}",
                list(lists[key]),
                f"{len(lists[first])} entries, or one value for all",
                against=f"{table}.{first}",
            )


def _unknown_activation(numerics: Numerics) -> Iterator[Finding]:
    name, known = numerics.activation, activation_names()
    if name not in known:
        yield Finding(
            "numerics.activation",
            "no activation has this name; nfflax.register_activation adds new ones",
            name,
            ", ".join(known),
            SYNONYMS.get(name.lower()) or nearest(name, known),
        )


def _misfit_groups(stem: Stem, stages: Stages, numerics: Numerics) -> Iterator[Finding]:
    in_width = rounded_width(stem.width[-1], numerics.round_width)
    for stage, depth in enumerate(stages.depth):
        for block in range(min(depth, 2)):  # the blocks after the second equal it
            wanted, fitted, groups = bottleneck(
                stages, numerics, stage, in_width, is_first_block=stage == block == 0
            )
            in_width = stage_width(stages, numerics, stage)
            group_width = stages.group_width[stage]
            place = f"the bottleneck of stage {stage}, {wanted} channels wide"
            if groups == 0:
                message = f"is wider than {place}"
            elif fitted != wanted and stages.fit_groups == "exact":
                message = f"does not divide {place}"
            else:
                continue
            yield Finding(
                f"stages.group_width[{stage}]",
                message,
                group_width,
                f"a divisor of {wanted}, 0 for one group"
                + (', or stages.fit_groups = "down"' if groups else ""),
                against="stages.width",
            )
            break


def _vanishing_maps(stem: Stem, stages: Stages, resolution: Resolution) -> Iterator[Finding]:
    total = math.prod(stem.stride) * (2 if stem.pool == "max" else 1) * math.prod(stages.stride)
    for key in ("train", "test"):
        pixels = getattr(resolution, key)
        if pixels < total:
            yield Finding(
                f"resolution.{key}",
                f"the network divides the resolution by {total}: "
                f"nothing is left of {pixels} pixels",
                pixels,
                f"{total} or more, or smaller strides",
            )
