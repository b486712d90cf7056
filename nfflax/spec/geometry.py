"""Widths that follow from a spec's ratios, rounded as in the implementation that it copies."""

from nfflax.spec.schema import Numerics, Stages


def rounded_width(width: float, multiple: int, *, may_shrink: bool = False) -> int:
    """The integer width for a fractional one.

    `multiple` 1 truncates, as the official code. Otherwise the nearest multiple, never more than
    10% below `width` unless `may_shrink` (timm's `make_divisible`, whose squeeze-and-excitation
    calls it with round_limit 0).
    """
    if multiple == 1:
        return max(1, int(width))
    nearest = max(multiple, int(width + multiple / 2) // multiple * multiple)
    too_small = nearest < 0.9 * width and not may_shrink
    return nearest + multiple if too_small else nearest


def bottleneck(
    stages: Stages, numerics: Numerics, stage: int, in_width: int, *, is_first_block: bool
) -> tuple[int, int, int]:
    """(width before fitting groups, width, groups) of one block's kxk convolutions.

    groups is 0 when not even one group of `group_width` fits.
    """
    out_width = stage_width(stages, numerics, stage)
    reference = in_width if stages.expansion_of[stage] == "in" else out_width
    expansion = stages.expansion[stage]
    if is_first_block and stages.first_expansion is not None:
        expansion = stages.first_expansion
    width = rounded_width(reference * expansion, numerics.round_width)
    group_width = stages.group_width[stage]
    if group_width == 0:
        return width, width, 1
    groups = width // group_width
    return width, groups * group_width, groups


def stage_width(stages: Stages, numerics: Numerics, stage: int) -> int:
    """Output channels of a stage."""
    return rounded_width(stages.width[stage], numerics.round_width)
