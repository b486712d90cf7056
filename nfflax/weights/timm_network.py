"""The network that timm's `config.json` describes, as a spec: what timm_config.py writes, read."""

from collections.abc import Mapping
from typing import Any, NamedTuple, get_args

from nfflax.spec.errors import SpecError, nearest
from nfflax.spec.geometry import rounded_width
from nfflax.spec.load import load_spec
from nfflax.spec.schema import Preprocess, Spec
from nfflax.weights.errors import WeightsError
from nfflax.weights.published import imagenet_classes, preset_of
from nfflax.weights.timm_config import (
    ACTIVATIONS,
    CH_DIV,
    REGNET_CHANNELS,
    REGNET_FACTOR,
    STEMS,
    architectures,
    fields_of,
    strides_of,
)

# Arguments of timm's constructor beside NfCfg's fields, and keys that they are.
_ARGUMENTS = {
    "num_classes": "head.num_classes",
    "in_chans": "stem.in_channels",
    "global_pool": "head.pool",
    "drop_rate": "head.dropout",
    "drop_path_rate": "regularization.stochastic_depth",
}
_INTERPOLATIONS = get_args(Preprocess.model_fields["interpolation"].annotation)


class TimmNetwork(NamedTuple):
    """What a `config.json` of timm's describes."""

    spec: Spec
    preset: str
    """The preset that it is, up to classes, channels and images; empty where keywords vary it."""
    class_names: tuple[str, ...]


def read_timm_config(config: Mapping[str, Any], source: str) -> TimmNetwork:
    """The network of a `config.json`; WeightsError, naming `source`, where it is none of ours."""
    given = config.get("architecture")
    architecture = given.partition(".")[0] if isinstance(given, str) else ""
    if architecture not in architectures():
        near = nearest(architecture, architectures())
        meant = f" Did you mean {near}?" if near else ""
        problem = f"The architecture {given!r:.100} is no normalizer-free network of timm's.{meant}"
        raise WeightsError(source, [problem])
    about = config.get("pretrained_cfg", config)  # before timm 0.9 everything stood at the top
    arguments = config.get("model_args", {})
    if not isinstance(about, Mapping) or not isinstance(arguments, Mapping):
        raise WeightsError(source, ["pretrained_cfg and model_args must be objects."])
    direct = {key: value for key, value in arguments.items() if key in _ARGUMENTS}
    if "num_classes" in config:
        direct = {"num_classes": config["num_classes"], **direct}
    preset = preset_of(architecture)
    named, wanted = _named(architecture), _named(architecture)
    wanted |= _checked(source, named, {k: v for k, v in arguments.items() if k not in direct})
    try:
        base = load_spec(preset)
        keys = _images(about, base) | {_ARGUMENTS[key]: value for key, value in direct.items()}
        if wanted != named:
            keys |= {"name": f"{preset}_varied", "summary": f"{preset} with keywords of timm's"}
            keys |= _structure(source, base, wanted)
        spec = _loaded(base, keys)
    except SpecError as error:
        raise WeightsError(source, [str(problem) for problem in error.problems]) from None
    names = _class_names(config, about, spec.head.num_classes)
    return TimmNetwork(spec, preset if wanted == named else "", names)


def _loaded(base: Spec, keys: Mapping[str, Any]) -> Spec:
    """The spec with these keys. timm drops what is left of a bottleneck beside whole groups."""
    try:
        return load_spec(base, keys)
    except SpecError:
        return load_spec(base, {**keys, "stages.fit_groups": "down"})


def _named(architecture: str) -> dict[str, Any]:
    """NfCfg of an architecture as timm writes it."""
    values = dict(fields_of(architecture))
    if architecture in REGNET_CHANNELS:
        channels = REGNET_CHANNELS[architecture]
        values |= {"channels": list(channels), "stem_chs": 0, "width_factor": REGNET_FACTOR}
        values["num_features"] = 1280 * channels[-1] // 440  # EfficientNet-B0's, by the last width
    return values


def _checked(
    source: str, named: Mapping[str, Any], arguments: Mapping[str, Any]
) -> Mapping[str, Any]:
    """The keywords, if timm has them and each has the type of its default."""
    problems = []
    values = {}
    for key, value in arguments.items():
        default = named.get(key)
        values[key] = value = type(default)() if value is None and default is not None else value
        if default is None:
            near = nearest(key, [*named, *_ARGUMENTS])
            meant = f" Did you mean {near}?" if near else ""
            problems.append(f"model_args.{key:.100} is nothing that nfflax knows of timm.{meant}")
        elif not _is_like(value, default):
            kind = "whole numbers" if isinstance(default, list) else type(default).__name__
            problems.append(f"model_args.{key} = {value!r:.100} must be {kind}.")
    if problems:
        raise WeightsError(source, problems)
    return values


def _is_like(value: Any, default: Any) -> bool:
    if isinstance(default, list):
        return isinstance(value, list) and bool(value) and {type(item) for item in value} == {int}
    if isinstance(default, float):
        return type(value) in (int, float) and abs(value) < 1e9
    return type(value) is type(default)


def _structure(source: str, preset: Spec, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of the spec for NfCfg's fields; those that agree with the preset keep its words."""
    divisor, factor, is_reg = wanted["ch_div"], wanted["width_factor"], wanted["reg"]
    problems = _outside(wanted)
    if problems:
        raise WeightsError(source, problems)
    shares, kernel, stem_strides, pooled = STEMS[wanted["stem_type"]]
    stem = rounded_width((wanted["stem_chs"] or wanted["channels"][0]) * factor, divisor)
    widths = [rounded_width(width * factor, divisor) for width in wanted["channels"]]
    stem_stride = 4 if pooled or len(shares) == 4 else 2
    activations = {theirs: ours for ours, theirs in ACTIVATIONS.items()}
    keys = {
        "stem.width": [int(share * stem) for share in shares],
        "stem.kernel": [kernel] * len(shares),
        "stem.stride": list(stem_strides),
        "stem.pool": "max" if pooled else "none",
        "stages.depth": wanted["depths"],
        "stages.width": widths,
        "stages.stride": list(strides_of(stem_stride, len(widths))),
        "stages.kernel": 3,
        "stages.group_width": wanted["group_size"],
        "stages.expansion": _number(wanted["bottle_ratio"]),
        "stages.expansion_of": "in" if is_reg else "out",
        "stages.first_expansion": 1.0 if is_reg else None,
        "stages.spatial_convs": 2 if wanted["extra_conv"] else 1,
        "attention.kind": wanted["attn_layer"] or "none",
        "attention.gain": _number(wanted["attn_gain"]),
        "attention.position": "inside" if is_reg else "after",
        "block.alpha": _number(wanted["alpha"]),
        "block.skip_gain": "zeros" if wanted["skipinit"] else "none",
        "block.last_gain": "ones" if wanted["skipinit"] else "zeros",
        "numerics.activation": activations[wanted["act_layer"]],
        "numerics.gamma": "activation" if wanted["gamma_in_act"] else "conv",
        "numerics.padding": "same" if wanted["same_padding"] else "symmetric",
        "numerics.ws_eps": _number(wanted["std_conv_eps"]),
        "numerics.round_width": divisor,
    }
    if wanted["attn_layer"] == "se":
        keys["attention.ratio"] = _number(wanted["attn_kwargs"].get("rd_ratio", 1 / 16))
    final = rounded_width(wanted["num_features"] * factor, divisor) if wanted["num_features"] else 0
    head = preset.head
    if rounded_width(head.width or head.width_mult * widths[-1], divisor) != (final or divisor):
        keys |= {"head.width": final, "head.width_mult": 0.0}
    return keys


def _outside(wanted: Mapping[str, Any]) -> list[str]:
    """Values of NfCfg that timm takes and a spec cannot say."""
    reduction, attention = wanted["attn_kwargs"], wanted["attn_layer"]
    known = {"rd_ratio", "rd_divisor"} if attention == "se" else set()
    pooled = wanted["stem_type"] in STEMS and STEMS[wanted["stem_type"]][3]
    stem_stride = 4 if pooled or wanted["stem_type"] == "deep_quad" else 2
    rules = [
        ("stem_type", wanted["stem_type"] in STEMS),
        ("act_layer", wanted["act_layer"] in ACTIVATIONS.values()),
        ("attn_layer", attention in ("", "se", "eca")),
        ("attn_kwargs", set(reduction) <= known),
        # The hidden width of squeeze-and-excitation is rounded as all others are.
        (
            "attn_kwargs",
            attention != "se" or reduction.get("rd_divisor", CH_DIV) == wanted["ch_div"],
        ),
        ("attn_kwargs", type(reduction.get("rd_ratio", 0.5)) in (int, float)),
        ("same_padding", not (pooled and wanted["same_padding"])),
        ("channels", len(wanted["channels"]) == len(wanted["depths"])),
        ("depths", len(strides_of(stem_stride, len(wanted["depths"]))) == len(wanted["depths"])),
        ("ch_div", wanted["ch_div"] >= 1),
        ("width_factor", wanted["width_factor"] > 0),
    ]
    wrong = dict.fromkeys(key for key, is_right in rules if not is_right)
    return [f"model_args.{key} = {wanted[key]!r:.100} has no counterpart here." for key in wrong]


def _images(about: Mapping[str, Any], base: Spec) -> dict[str, Any]:
    """Keys of the spec for what a `pretrained_cfg` says of images."""
    keys: dict[str, Any] = {"preprocess.crop_margin": 0}
    train, test = (about.get(key) for key in ("input_size", "test_input_size"))
    for key, size in (("train", train), ("test", test or train)):
        if isinstance(size, list | tuple) and len(size) == 3:
            keys |= {f"resolution.{key}": size[-1], "stem.in_channels": size[0]}
    for key in ("mean", "std"):
        value, ours = about.get(key), getattr(base.preprocess, key)
        if isinstance(value, list | tuple) and list(value) != list(
            ours * (len(value) // len(ours))
        ):
            keys[f"preprocess.{key}"] = [_number(entry) for entry in value]
    if crop := about.get("test_crop_pct") or about.get("crop_pct"):
        keys["preprocess.crop_fraction"] = _number(crop)
    if about.get("interpolation") in _INTERPOLATIONS:
        keys["preprocess.interpolation"] = about["interpolation"]
    if about.get("crop_mode"):
        keys["preprocess.crop"] = "squash" if about["crop_mode"] == "squash" else "center"
    if "num_classes" in about:
        keys["head.num_classes"] = about["num_classes"]
    return keys


def _number(value: Any) -> Any:
    """A whole number as the fraction that it is; anything else for the spec to judge."""
    return float(value) if type(value) is int else value


def _class_names(
    config: Mapping[str, Any], about: Mapping[str, Any], classes: int
) -> tuple[str, ...]:
    """What the outputs stand for, where the file says it or ImageNet is meant."""
    names = config.get("label_names", about.get("label_names"))
    described = config.get("label_descriptions", about.get("label_descriptions"))
    described = described if isinstance(described, Mapping) else {}
    if isinstance(names, list) and len(names) == classes:
        return tuple(f"{name} {described.get(name, '')}".strip() for name in names)
    tag = str(about.get("tag") or str(config["architecture"]).partition(".")[2])
    is_imagenet = classes == len(imagenet_classes()) and tag.endswith("in1k")
    return imagenet_classes() if is_imagenet else ()
