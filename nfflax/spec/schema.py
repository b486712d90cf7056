"""What a spec file may say: every table and key, with type, range, default and description.

Tables are columnar, as papers print them: one entry per stage, or a scalar that holds for all.
Defaults are the official NFNet numerics (arXiv:2102.06171). Rules that join several keys are in
check.py; reading files is in load.py; run.py does for runs what this file does for networks.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticKnownError

from nfflax.spec.base import MAX_STAGES, Document, Table, as_tuple

if TYPE_CHECKING:
    from nfflax.spec.check import Finding

T = TypeVar("T")

# Limits far beyond any network, so that a mistyped digit is an error and not an exhausted machine.
MAX_DEPTH, MAX_WIDTH, MAX_PIXELS = 1000, 65_536, 16_384


def _one_or_many(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _whole(value: Any) -> Any:
    if type(value) is not int:  # a Literal alone takes True and 1.0 for 1
        raise PydanticKnownError("int_type")
    return value


# One value per stage (or per stem convolution): its table spreads a scalar over all of them.
Column = Annotated[tuple[T, ...], BeforeValidator(as_tuple)]
# One value for all channels, or one for each.
PerChannel = Annotated[tuple[T, ...], BeforeValidator(_one_or_many), Field(min_length=1)]

Count = Annotated[int, Field(ge=1, le=MAX_DEPTH)]
Width = Annotated[int, Field(ge=1, le=MAX_WIDTH)]
WidthOrNone = Annotated[int, Field(ge=0, le=MAX_WIDTH)]
Stride = Annotated[int, Field(ge=1, le=8)]
Kernel = Annotated[Literal[1, 3, 5, 7, 9, 11], BeforeValidator(_whole)]
OneOrTwo = Annotated[Literal[1, 2], BeforeValidator(_whole)]
Positive = Annotated[float, Field(gt=0)]
Ratio = Annotated[float, Field(gt=0, le=64)]
Pixels = Annotated[int, Field(ge=1, le=MAX_PIXELS)]
Rate = Annotated[float, Field(ge=0, lt=1)]


def spread(default: Any) -> Any:
    """A column's default: one value for every entry."""
    return Field(default=default, validate_default=False)


class Stem(Table):
    """The convolutions before the first stage, with activations between, none after the last."""

    columns: ClassVar = ("width", "kernel", "stride")

    kind: Literal["conv"] = "conv"
    """A chain of scaled weight-standardised convolutions."""
    in_channels: Width = 3
    """Channels of the input image."""
    width: Column[Width] = Field(min_length=1, max_length=MAX_STAGES)
    """Output channels of each stem convolution."""
    kernel: Column[Kernel] = spread(3)
    """Kernel size of each stem convolution."""
    stride: Column[Stride] = spread(2)
    """Stride of each stem convolution."""
    pool: Literal["none", "max"] = "none"
    """"max": a 3x3 max-pool with stride 2 after the last stem convolution (NF-ResNet)."""


class Stages(Table):
    """The body. Each stage is one transition block, then identical blocks."""

    columns: ClassVar = (
        "depth",
        "width",
        "stride",
        "group_width",
        "expansion",
        "expansion_of",
        "spatial_convs",
        "kernel",
    )

    depth: Column[Count] = Field(min_length=1, max_length=MAX_STAGES)
    """Blocks in each stage."""
    width: Column[Width] = Field(min_length=1, max_length=MAX_STAGES)
    """Output channels of each stage."""
    stride: Column[Stride] = spread(2)
    """Stride of each stage's first block."""
    group_width: Column[WidthOrNone] = spread(128)
    """Channels per group of the kxk convolutions; 0: one group, a dense convolution."""
    fit_groups: Literal["exact", "down"] = "exact"
    """When group_width does not divide the bottleneck: "exact" is an error, "down" (NF-RegNet)
    drops the remainder."""
    expansion: Column[Ratio] = spread(0.5)
    """Bottleneck width as a multiple of the width that expansion_of names."""
    expansion_of: Column[Literal["out", "in"]] = spread("out")
    """"out": of the block's output width. "in": of its input width (NF-RegNet)."""
    first_expansion: Ratio | None = None
    """Expansion of the network's very first block, where it differs (NF-RegNet: 1)."""
    spatial_convs: Column[OneOrTwo] = spread(2)
    """Number of kxk convolutions in the bottleneck."""
    kernel: Column[Kernel] = spread(3)
    """Kernel size of the bottleneck's kxk convolutions."""
    shortcut: Literal["avgpool+1x1", "strided 1x1"] = "avgpool+1x1"
    """How a transition block's shortcut changes resolution and width."""


class Attention(Table):
    """Channel attention on the residual branch."""

    kind: Literal["none", "se", "eca"] = "none"
    """Squeeze-and-excitation (arXiv:1709.01507), efficient channel attention (arXiv:1910.03151),
    or neither."""
    ratio: Ratio = 0.5
    """Hidden width of squeeze-and-excitation as a multiple of the channels it scales."""
    gain: Annotated[float, Field(gt=0, le=100)] = 2.0
    """Multiplies the sigmoid, so that attention starts near the identity."""
    position: Literal["after", "inside"] = "after"
    """"after" the last convolution (NFNet), or "inside", before it (NF-RegNet)."""


class Block(Table):
    """The residual recursion x + alpha * f(x * beta)."""

    alpha: Annotated[float, Field(gt=0, le=10)] = 0.2
    """Scale of every residual branch: a block adds alpha^2 to the signal's variance."""
    skip_gain: Literal["zeros", "ones", "none"] = "zeros"
    """Initial value of the learned scalar on the residual branch; "none": there is none."""
    last_gain: Literal["ones", "zeros"] = "ones"
    """Initial gain of the branch's last convolution ("zeros": timm, in place of a skip gain)."""


class Head(Table):
    """Final convolution, pooling, dropout and classifier."""

    width_mult: Annotated[float, Field(ge=0, le=64)] = 0.0
    """Width of the final 1x1 convolution as a multiple of the last stage's; 0: not given so."""
    width: WidthOrNone = 0
    """Width of the final 1x1 convolution; 0: not given so. With neither there is none."""
    num_classes: Annotated[int, Field(ge=0, le=1_000_000)] = 1000
    """Outputs of the classifier; 0: the network returns pooled features."""
    dropout: Rate = 0.0
    """Dropout rate on the pooled features."""
    pool: Literal["avg", "max"] = "avg"
    """Global pooling of the final map."""
    init: Literal["normal", "zeros"] = "normal"
    """Initial classifier weights: N(0, 0.01), or zeros (NF-RegNet)."""


class Regularization(Table):
    """Stochastic depth (arXiv:1603.09382), one draw per image and block."""

    stochastic_depth: Rate = 0.0
    """Nominal drop rate of the last block; block i of n gets a share of it."""
    stochastic_depth_schedule: Literal["i/n", "i/(n-1)"] = "i/n"
    """Block i's share: "i/n" never reaches the nominal rate (official), "i/(n-1)" does (timm)."""
    scale_by_keep: bool = False
    """Divide kept branches by their keep rate (timm); the official code does not."""


class Numerics(Table):
    """Where implementations differ. Defaults are the official ones."""

    activation: str = "gelu"
    """Name of the nonlinearity."""
    gamma: Literal["activation", "conv", "none"] = "activation"
    """Where the variance-restoring constant multiplies: the activation's output, every kernel
    (timm), or nowhere."""
    padding: Literal["same", "symmetric"] = "same"
    """"same": TensorFlow's, which depends on the input size. "symmetric": PyTorch's."""
    ws_eps: Annotated[float, Field(ge=0, le=1)] = 1e-4
    """Epsilon of scaled weight standardisation."""
    ws_eps_mode: Literal["floor", "add"] = "floor"
    """"floor": rsqrt(max(var * fan_in, eps)). "add": rsqrt(var + eps) / sqrt(fan_in) (timm)."""
    round_width: Annotated[int, Field(ge=1, le=1024)] = 1
    """Derived widths become multiples of this (timm: 8); 1: their integer part."""


class Norm(Table):
    """Batch normalisation, for the papers' baselines."""

    kind: Literal["none", "batch"] = "none"
    """"batch": plain convolutions and a BatchNorm before every activation, in place of scaled
    weight standardisation."""
    momentum: Rate = 0.9
    """Decay of the running statistics."""
    eps: Annotated[float, Field(gt=0, le=1)] = 1e-5
    """Added to the batch variance."""


class Resolution(Table):
    """Side of the square input, in pixels."""

    train: Pixels = 224
    """While training."""
    test: Pixels = 224
    """At test time, often larger (arXiv:1906.06423)."""


class Preprocess(Table):
    """What inference does to an image before the network sees it."""

    per_channel: ClassVar = ("mean", "std")

    mean: PerChannel[float] = (0.485, 0.456, 0.406)
    """Subtracted from pixels in [0, 1], per channel."""
    std: PerChannel[Positive] = (0.229, 0.224, 0.225)
    """Divides the result, per channel."""
    interpolation: Literal["bicubic", "bilinear", "nearest"] = "bicubic"
    """Resampling filter."""
    crop: Literal["squash", "center"] = "squash"
    """"squash": resize both sides to the target. "center": resize the short side. Then the centre
    is cut."""
    crop_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Resize target: resolution / crop_fraction + crop_margin."""
    crop_margin: Annotated[int, Field(ge=0, le=4096)] = 32
    """Pixels added to the resize target (official nets: 32)."""


class Spec(Document):
    """One network, fully resolved: nothing inherited, every scalar spread. Hashable."""

    noun: ClassVar = "model"
    presets: ClassVar = "models"
    bases: ClassVar = "families"

    stem: Stem
    stages: Stages
    attention: Attention = Attention()
    block: Block = Block()
    head: Head = Head()
    regularization: Regularization = Regularization()
    numerics: Numerics = Numerics()
    norm: Norm = Norm()
    resolution: Resolution = Resolution()
    preprocess: Preprocess = Preprocess()

    @classmethod
    def problems_between(cls, tables: Mapping[str, Any]) -> "list[Finding]":
        from nfflax.spec.check import problems_between  # check.py reads the tables defined here

        return problems_between(tables)


def file_schema(root: type[Document] = Spec) -> dict[str, Any]:
    """The JSON Schema of a spec file, for editors: a document whose keys may be inherited."""
    schema = root.model_json_schema()
    tables = [schema, *schema["$defs"].values()]
    for table in tables:
        table.pop("required", None)  # `extends` may supply any key
        for field in table["properties"].values():
            if "description" in field:  # a docstring that was wrapped
                field["description"] = " ".join(field["description"].split())
        for key in (k for k in table["properties"] if k in _columns_of(table.get("title", ""))):
            column = table["properties"][key]
            scalar = dict(column.get("items", {}))
            described = {k: column.pop(k) for k in ("description", "title") if k in column}
            default = {"default": column.pop("default")} if "default" in column else {}
            table["properties"][key] = described | default | {"anyOf": [scalar, column]}
    schema["title"] = f"nfflax {root.noun} spec"
    parent = "A preset, a family, or a path" if root.bases else "A preset, or a path"
    parent += " relative to this file: tables merge, lists replace."
    schema["properties"] = {
        "$schema": {"type": "string", "description": "Address of this schema, for editors."},
        "extends": {"type": "string", "description": parent},
    } | schema["properties"]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | schema


def _columns_of(table: str) -> tuple[str, ...]:
    return {t.__name__: t.columns for t in (Stem, Stages)}.get(table, ())
