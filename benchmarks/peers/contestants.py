"""Who runs: one entry per row of the tables.

All of a table compute the same: one network, one batch, softmax cross-entropy, SGD with Nesterov
momentum, no dropout and no stochastic depth. Where a row differs from that its label says so.
"""

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from peers.job import What

ALL = 99  # blocks: deeper than any stage


@dataclass(frozen=True)
class Contestant:
    """One way to compute a step."""

    key: str
    """As `--only` calls it."""
    label: str
    peer: str
    """Whose program and environment it runs in: `run_<peer>.py`."""
    options: dict[str, Any] = field(default_factory=dict)
    """As that program describes them."""


FLOOR = Contestant("matmul", "one matrix product", "matmul")
STEPS = (
    Contestant("nfflax", "nfflax", "nfflax"),
    Contestant("nfflax-unrolled", "nfflax, unrolled", "nfflax", {"unroll": ALL}),
    Contestant("nfflax-remat-conv", "nfflax, remat `conv`", "nfflax", {"remat": "conv"}),
    Contestant("nfflax-remat-block", "nfflax, remat `block`", "nfflax", {"remat": "block"}),
    Contestant("nfflax-agc", "nfflax, with AGC", "nfflax", {"clip": True}),
    Contestant("nfflax-recipe", "nfflax, the whole recipe", "nfflax", {"recipe": True}),
    Contestant("official", "DeepMind's code", "official"),
    Contestant("official-agc", "DeepMind's code, its SGD_AGC", "official", {"clip": True}),
    Contestant("timm", "timm `dm_`", "timm", {"prefix": "dm_"}),
    Contestant(
        "timm-channels-last",
        "timm `dm_`, channels last",
        "timm",
        {"prefix": "dm_", "channels_last": True},
    ),
    Contestant(
        "timm-compiled",
        "timm `dm_`, compiled, channels last",
        "timm",
        {"prefix": "dm_", "channels_last": True, "compile": True},
    ),
    Contestant("timm-agc", "timm `dm_`, with AGC", "timm", {"prefix": "dm_", "clip": True}),
    Contestant("timm-own", "timm's own form", "timm"),
    Contestant("jimm", "jimm", "jimm"),
)
FORWARDS = (
    Contestant("nfflax-folded", "nfflax, folded", "nfflax", {"fold": True}),
    *(each for each in STEPS if not {"remat", "clip", "recipe"} & each.options.keys()),
)


def contestants(what: What, only: list[str]) -> list[Contestant]:
    """Those that run, the one that others are compared with first. `only`: patterns of keys.

    The floor and the first one always run: shares and ratios need them.
    """
    first, *others = STEPS if what == "step" else FORWARDS
    chosen = [each for each in others if any(fnmatchcase(each.key, pattern) for pattern in only)]
    return [first, *(chosen if only else others), FLOOR]


def keys() -> list[str]:
    """All that `--only` can choose."""
    return list(dict.fromkeys(each.key for each in (*STEPS, *FORWARDS)))
