"""A network in timm's own words: the `config.json` of a spec.

timm (1.0.31, timm/models/nfnet.py) knows its networks by name, and varies them by keyword: the
fields of `NfCfg`, with a few arguments beside them. A spec becomes the nearest named architecture
and the keywords in which it differs; keys for which timm has no word are one WeightsError.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from nfflax.spec.plan import Plan, plan
from nfflax.spec.presets import list_specs
from nfflax.spec.schema import Spec
from nfflax.weights.errors import WeightsError
from nfflax.weights.published import imagenet_classes, preset_of

# Functions that both have, with a gamma in timm: our name, timm's. Its gelu is the exact one.
ACTIVATIONS = {"gelu_exact": "gelu"} | {
    name: name for name in "celu elu leaky_relu relu relu6 selu sigmoid silu tanh".split()
}
# timm's kinds of stem: widths as shares of the last one's, kernel, strides, max-pool.
STEMS = {
    "3x3": ((1,), 3, (2,), False),
    "7x7": ((1,), 7, (2,), False),
    "3x3_pool": ((1,), 3, (2,), True),
    "7x7_pool": ((1,), 7, (2,), True),
    "deep": ((1 / 2, 1 / 2, 1), 3, (2, 1, 1), False),
    "deep_pool": ((1 / 2, 1 / 2, 1), 3, (2, 1, 1), True),
    "deep_tiered": ((3 / 8, 1 / 2, 1), 3, (2, 1, 1), False),
    "deep_quad": ((1 / 8, 1 / 4, 1 / 2, 1), 3, (2, 1, 1, 2), False),
}
MAX_STRIDE = 32  # of the whole network: beyond it timm dilates
CH_DIV = 8  # timm's default for `ch_div`, and for the hidden width of squeeze-and-excitation

# The NF-RegNets' widths as timm writes them, before its `width_factor`.
REGNET_FACTOR = 0.75
REGNET_CHANNELS = {
    "nf_regnet_b0": (48, 104, 208, 440),
    "nf_regnet_b1": (48, 104, 208, 440),
    "nf_regnet_b2": (56, 112, 232, 488),
    "nf_regnet_b3": (56, 128, 248, 528),
    "nf_regnet_b4": (64, 144, 288, 616),
    "nf_regnet_b5": (80, 168, 336, 704),
}
_WIDTHS = ("channels", "stem_chs", "num_features")


def architectures() -> tuple[str, ...]:
    """timm's names of the networks that both have."""
    return tuple(name.removeprefix(preset_of("")) for name in list_specs(preset_of("*")))


def to_timm_config(spec: Spec, class_names: Sequence[str] = ()) -> dict[str, Any]:
    """`config.json` of a spec; WeightsError with every key that timm has no word for."""
    compiled = plan(spec)
    if problems := _inexpressible(compiled):
        raise WeightsError(f"{spec.name} as a network of timm's", problems)
    wanted = _fields(compiled)
    # Of the architectures that are varied least, the one of the spec's own name, or else the first.
    ways = {name: _variation(wanted, name) for name in architectures()}
    name = min(ways, key=lambda name: (len(ways[name]), preset_of(name) != spec.name))
    arguments = ways[name]
    if spec.head.pool != "avg":
        arguments["global_pool"] = spec.head.pool
    config: dict[str, Any] = {
        "architecture": name,
        "num_classes": spec.head.num_classes,
        "num_features": compiled.num_features,
        "global_pool": spec.head.pool,
    }
    if class_names:
        config |= _labels(tuple(class_names))
    if arguments:
        config["model_args"] = arguments
    return config | {"pretrained_cfg": _pretrained(spec)}


def _inexpressible(compiled: Plan) -> list[str]:
    """Every key of a spec whose value timm cannot have, and what it can."""
    spec = compiled.spec
    stages, numerics, attention = spec.stages, spec.numerics, spec.attention
    is_reg = stages.expansion_of[0] == "in"
    first = stages.first_expansion
    pooled = spec.stem.pool == "max"
    rules = [
        ("norm.kind", spec.norm.kind, spec.norm.kind == "none", '"none"'),
        (
            "stem",
            spec.stem.model_dump(include={"width", "kernel", "stride", "pool"}),
            bool(_stem_type(compiled)),
            f"{', '.join(STEMS)}: one convolution, or widths that are shares of the last one's",
        ),
        *(
            (f"stages.{key}", values, len(set(values)) == 1, "one value for all stages")
            for key in ("group_width", "expansion", "expansion_of", "spatial_convs")
            for values in [getattr(stages, key)]
        ),
        ("stages.kernel", stages.kernel, set(stages.kernel) == {3}, "3"),
        (
            "stages.stride",
            stages.stride,
            stages.stride == strides_of(_stem_stride(compiled), len(stages.depth)),
            f"2, and 1 first after a stem of stride 4; {MAX_STRIDE} in all",
        ),
        ("stages.shortcut", stages.shortcut, stages.shortcut == "avgpool+1x1", '"avgpool+1x1"'),
        (
            "stages.first_expansion",
            first,
            first == 1.0 if is_reg else first in (None, stages.expansion[0]),
            '1 with expansion_of "in", else as the others',
        ),
        (
            "attention.position",
            attention.position,
            attention.kind == "none" or (attention.position == "inside") == is_reg,
            '"inside" with expansion_of "in", else "after"',
        ),
        (
            "numerics.activation",
            numerics.activation,
            numerics.activation in ACTIVATIONS,
            ", ".join(sorted(ACTIVATIONS)),
        ),
        ("numerics.gamma", numerics.gamma, numerics.gamma != "none", '"activation" or "conv"'),
        ("numerics.ws_eps_mode", numerics.ws_eps_mode, numerics.ws_eps_mode == "add", '"add"'),
        (
            "numerics.padding",
            numerics.padding,
            not (pooled and numerics.padding == "same"),
            '"symmetric", because its max-pool has no other',
        ),
    ]
    problems = [
        f"{key} = {_quoted(value)}: timm has {allowed}"
        for key, value, is_right, allowed in rules
        if not is_right
    ]
    if not problems and not _widths_agree(compiled):
        problems.append(
            f"numerics.round_width = {numerics.round_width}: timm rounds the width of a bottleneck "
            "or of its attention to another number"
        )
    return problems


@functools.cache
def fields_of(architecture: str) -> Mapping[str, Any]:
    """NfCfg of one of timm's architectures, with widths as they come out."""
    return MappingProxyType(_fields(plan(preset_of(architecture))))


def _fields(compiled: Plan) -> dict[str, Any]:
    """NfCfg of a plan that timm can express, with widths as they come out."""
    spec = compiled.spec
    stages, numerics, attention = spec.stages, spec.numerics, spec.attention
    reduction: dict[str, Any] = {}
    if attention.kind == "se":
        reduction["rd_ratio"] = attention.ratio
        if numerics.round_width != CH_DIV:
            reduction["rd_divisor"] = numerics.round_width
    return {
        "depths": list(stages.depth),
        "channels": [blocks[0].out_channels for blocks in compiled.stages()],
        "alpha": spec.block.alpha,
        "stem_type": _stem_type(compiled),
        "stem_chs": compiled.stem[-1].out_channels,
        "group_size": stages.group_width[0],
        "attn_layer": "" if attention.kind == "none" else attention.kind,
        "attn_kwargs": reduction,
        "attn_gain": attention.gain,
        "width_factor": 1.0,
        "bottle_ratio": stages.expansion[0],
        "num_features": compiled.final_conv.out_channels if compiled.final_conv else 0,
        "ch_div": numerics.round_width,
        "reg": stages.expansion_of[0] == "in",
        "extra_conv": stages.spatial_convs[0] == 2,
        "gamma_in_act": numerics.gamma == "activation",
        "same_padding": numerics.padding == "same",
        "std_conv_eps": numerics.ws_eps,
        "skipinit": spec.block.skip_gain != "none",
        "act_layer": ACTIVATIONS[numerics.activation],
    }


def _variation(wanted: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    """The keywords that make an architecture of timm's the wanted network."""
    named = fields_of(architecture)
    changed = {key: value for key, value in wanted.items() if value != named[key]}
    if architecture in REGNET_CHANNELS and any(key in changed for key in _WIDTHS):
        # There a factor scales all widths: without it, each has to be said.
        changed |= {key: wanted[key] for key in (*_WIDTHS, "width_factor")}
    return changed


def _pretrained(spec: Spec) -> dict[str, Any]:
    """timm's `pretrained_cfg`: the images that the network wants."""
    channels, size = spec.stem.in_channels, spec.resolution
    image = spec.preprocess
    crop = image.crop_fraction
    if image.crop_margin:
        # timm resizes to floor(size / crop_pct): cut off here, so as to lose no pixel to it.
        target = int(size.test / image.crop_fraction) + image.crop_margin
        crop = math.floor(size.test / target * 1e6) / 1e6
    test = {} if size.test == size.train else {"test_input_size": [channels, size.test, size.test]}
    return {
        "input_size": [channels, size.train, size.train],
        **test,
        "pool_size": [-(-size.train // MAX_STRIDE)] * 2,
        "crop_pct": crop,
        "crop_mode": image.crop,
        "interpolation": image.interpolation,
        "mean": list(_per_channel(image.mean, channels)),
        "std": list(_per_channel(image.std, channels)),
        "num_classes": spec.head.num_classes,
        "first_conv": "stem.conv1" if len(spec.stem.width) > 1 else "stem.conv",
        "classifier": "head.fc",
    }


def _labels(class_names: tuple[str, ...]) -> dict[str, Any]:
    """Names of the classes; ImageNet's as timm has them, synset and description apart."""
    if class_names != imagenet_classes():
        return {"label_names": list(class_names)}
    pairs = [name.split(" ", 1) for name in class_names]
    return {"label_names": [synset for synset, _ in pairs], "label_descriptions": dict(pairs)}


def _stem_type(compiled: Plan) -> str:
    """timm's word for a stem; empty where it has none."""
    stem = compiled.spec.stem
    widths = [conv.out_channels for conv in compiled.stem]
    for name, (shares, kernel, strides, pooled) in STEMS.items():
        if (
            (len(widths), set(stem.kernel), stem.stride) == (len(shares), {kernel}, strides)
            and widths == [int(share * widths[-1]) for share in shares]
            and pooled == (stem.pool == "max")
        ):
            return name
    return ""


def _stem_stride(compiled: Plan) -> int:
    return math.prod(compiled.spec.stem.stride) * (2 if compiled.spec.stem.pool == "max" else 1)


def strides_of(stem_stride: int, count: int) -> tuple[int, ...]:
    """Strides that timm gives to stages; fewer than there are stages where it would dilate."""
    strides = [1 if stem_stride > 2 else 2] + [2] * (count - 1)
    while stem_stride * math.prod(strides) > MAX_STRIDE:
        strides.pop()
    return tuple(strides)


def _widths_agree(compiled: Plan) -> bool:
    """Whether timm's rounding gives the same derived widths."""
    spec, stages = compiled.spec, compiled.spec.stages
    divisor, group = spec.numerics.round_width, stages.group_width[0]
    for block in compiled.blocks:
        reference = block.in_channels if stages.expansion_of[0] == "in" else block.out_channels
        is_first = block.index == 0 and stages.first_expansion is not None
        expansion = stages.first_expansion if is_first else stages.expansion[0]
        mid = _divisible(reference * (expansion or 1.0), divisor)
        if group and group % divisor == 0:
            mid = mid // group * group
        hidden = block.attention_hidden
        if spec.attention.kind == "se":
            hidden = _divisible(block.attention_width * spec.attention.ratio, divisor, limit=0.0)
        if (mid, hidden) != (block.mid_channels, block.attention_hidden):
            return False
    return True


def _divisible(width: float, divisor: int, limit: float = 0.9) -> int:
    """timm's `make_divisible`. With divisor 1 it rounds, where the official code truncates."""
    rounded = max(divisor, int(width + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < limit * width else rounded


def _per_channel(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    return values * channels if len(values) == 1 else values


def _quoted(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)
