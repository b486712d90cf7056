"""The compiler: a Spec becomes a Plan, plain data that says everything a constructor needs.

Modules only read it, `nfflax spec show` prints it, and tests hold it against the published tables.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from nfflax.spec.geometry import bottleneck, rounded_width, stage_width
from nfflax.spec.load import Source, load_spec
from nfflax.spec.parts import BlockPlan, ConvPlan, FeatureInfo
from nfflax.spec.schema import Attention, Spec

Size = tuple[float, float]  # height and width; fractional only while counting multiply-adds


@dataclass(frozen=True)
class Plan:
    """A compiled spec. Costs are for `input_size`; `output_stride` limits every map's stride.

    `upto` cuts one: then it ends with the map of the last level in `feature_info`.
    """

    spec: Spec
    input_size: tuple[int, int]
    output_stride: int | None
    stem: tuple[ConvPlan, ...]
    blocks: tuple[BlockPlan, ...]
    final_conv: ConvPlan | None
    classifier: ConvPlan | None
    head_norm_params: int
    num_features: int
    feature_info: tuple[FeatureInfo, ...]
    is_cut: bool = False

    @property
    def params(self) -> int:
        """Trainable parameters."""
        return sum(part.params for part in self._parts()) + self.head_norm_params

    def macs(self, resolution: int | tuple[int, int] | None = None) -> int:
        """Multiply-adds of one image, by default at the plan's own input size.

        Counted as the official code does: a map's size is the input's divided by the strides,
        fractions included. Where the strides do not divide the input, maps are really rounded up
        and the network does a little more.
        """
        if resolution is not None and _size(resolution) != self.input_size:
            other = plan(self.spec, resolution=resolution, output_stride=self.output_stride)
            return (other.upto(len(self.feature_info)) if self.is_cut else other).macs()
        return round(sum(part.macs for part in self._parts()))

    def stages(self) -> list[tuple[BlockPlan, ...]]:
        """The blocks, stage by stage."""
        stages = itertools.groupby(self.blocks, key=lambda block: block.stage)
        return [tuple(blocks) for _, blocks in stages]

    def upto(self, level: int) -> "Plan":
        """The plan of what the map of a feature level takes: nothing above it, and no head.

        Blocks keep what they have in the whole network: betas, drop rates, names.
        """
        levels = {info.level: info for info in self.feature_info}
        if level not in levels:
            raise ValueError(f"no feature level {level}: {self.spec.name} has {list(levels)}")
        last = levels[level]
        stem = self.stem
        if level == 1:
            stem = stem[: 1 + [conv.name for conv in stem].index(last.name)]
            if len(stem) < len(self.stem) and self.spec.norm.kind == "batch":
                # The norm that its activation would begin with goes, too.
                tapped = replace(stem[-1], params=stem[-1].params - 2 * last.channels)
                stem = (*stem[:-1], tapped)
        return replace(
            self,
            stem=stem,
            blocks=tuple(block for block in self.blocks if block.stage < level - 1),
            final_conv=self.final_conv if last.name == "final_conv" else None,
            classifier=None,
            head_norm_params=0,
            num_features=last.channels,
            feature_info=self.feature_info[:level],
            is_cut=True,
        )

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data, ready for JSON."""
        blocks = [{k: getattr(b, k) for k in BlockPlan.__dataclass_fields__} for b in self.blocks]
        return {
            "name": self.spec.name,
            "summary": self.spec.summary,
            "input_size": list(self.input_size),
            "output_stride": self.output_stride,
            "params": self.params,
            "macs": self.macs(),
            "num_features": self.num_features,
            "num_classes": self.spec.head.num_classes,
            "feature_info": [vars(f) for f in self.feature_info],
            "stem": [vars(c) for c in self.stem],
            "blocks": blocks,
            "final_conv": self.final_conv and vars(self.final_conv),
            "classifier": self.classifier and vars(self.classifier),
        }

    def table(self) -> str:
        """The plan as a table for people."""
        from nfflax.spec.table import plan_text  # loads rich, which a program may never need

        return plan_text(self)

    def _parts(self) -> Iterator[ConvPlan | BlockPlan]:
        yield from self.stem
        yield from self.blocks
        yield from (part for part in (self.final_conv, self.classifier) if part)


def plan(
    spec: Source,
    *,
    resolution: int | tuple[int, int] | None = None,
    output_stride: int | None = None,
) -> Plan:
    """Compile a spec. Costs are at `resolution`, by default the spec's test resolution.

    `output_stride` 8 or 16 keeps later maps large: from there on strides become dilations, with
    the same parameters (timm's convention). By default every stride is as the spec has it.
    """
    spec = load_spec(spec)
    if output_stride not in (None, 8, 16, 32):
        raise ValueError(f"output_stride = {output_stride}: allowed are 8, 16 and 32")
    size = _size(spec.resolution.test if resolution is None else resolution)
    return _Compiler(spec, size, output_stride).compile()


def _size(resolution: int | tuple[int, int]) -> tuple[int, int]:
    height, width = (resolution, resolution) if isinstance(resolution, int) else resolution
    if height < 1 or width < 1:
        raise ValueError(f"resolution = {resolution}: must be at least one pixel each way")
    return int(height), int(width)


class _Compiler:
    """Walks the network from the image to the classifier, carrying width, size and variance."""

    def __init__(self, spec: Spec, input_size: tuple[int, int], output_stride: int | None):
        self.spec, self.input_size, self.output_stride = spec, input_size, output_stride
        self.normed = spec.norm.kind == "batch"
        self.size: Size = (float(input_size[0]), float(input_size[1]))
        self.map_size = input_size
        self.channels = spec.stem.in_channels
        self.stride = self.dilation = 1
        self.features: list[FeatureInfo] = []
        # The official recursion, in its own terms and order so that every beta agrees to the bit.
        self.expected_std = 1.0

    def compile(self) -> Plan:
        """The whole plan."""
        spec = self.spec
        stem = tuple(self._stem())
        blocks = tuple(self._blocks())
        final = None
        if width := self._final_width():
            final = self._conv("final_conv", width)
            self.channels = width
            self._feature("final_conv")
        classifier = None
        if classes := spec.head.num_classes:
            weights = self.channels * classes
            classifier = ConvPlan(
                "classifier", self.channels, classes, params=weights + classes, macs=float(weights)
            )
        return Plan(
            spec=spec,
            input_size=self.input_size,
            output_stride=self.output_stride,
            stem=stem,
            blocks=blocks,
            final_conv=final,
            classifier=classifier,
            head_norm_params=2 * self.channels if self.normed else 0,
            num_features=self.channels,
            feature_info=tuple(self.features),
        )

    def _stem(self) -> Iterator[ConvPlan]:
        stem = self.spec.stem
        last = len(stem.width) - 1
        for i, (width, kernel, stride) in enumerate(
            zip(stem.width, stem.kernel, stem.stride, strict=True)
        ):
            if i == last:  # full widths follow the rounding rule, as timm's stem does
                width = rounded_width(width, self.spec.numerics.round_width)
            if i == last and i > 0 and stride > 1:  # level 1 is the map before the last reduction
                self._feature(f"stem.convs.{i - 1}")
            conv = self._conv(f"stem.convs.{i}", width, kernel=kernel, stride=stride)
            norm = 2 * width if self.normed and i < last else 0
            yield replace(conv, params=conv.params + norm)
            self.channels = width
            self._shrink(stride)
        if not self.features:
            self._feature(f"stem.convs.{last}")
        if stem.pool == "max":
            self._shrink(2)

    def _blocks(self) -> Iterator[BlockPlan]:
        spec, index, total = self.spec, 0, sum(self.spec.stages.depth)
        for stage, depth in enumerate(spec.stages.depth):
            for position in range(depth):
                stride = spec.stages.stride[stage] if position == 0 else 1
                yield self._block(stage, position, index, total, stride)
                if position == 0:  # a transition block's shortcut starts from unit variance again
                    self.expected_std = 1.0
                if not self.normed:
                    self.expected_std = (self.expected_std**2 + spec.block.alpha**2) ** 0.5
                index += 1
            self._feature(f"stages.{stage}")

    def _block(self, stage: int, position: int, index: int, total: int, stride: int) -> BlockPlan:
        spec, stages = self.spec, self.spec.stages
        in_channels, out_channels = self.channels, stage_width(stages, spec.numerics, stage)
        _, mid, groups = bottleneck(
            stages, spec.numerics, stage, in_channels, is_first_block=index == 0
        )
        projection = stride > 1 or in_channels != out_channels
        kernel, name = stages.kernel[stage], f"stages.{stage}.blocks.{position}"
        first_dilation = self.dilation
        if stride > 1 and self.stride * stride > (self.output_stride or math.inf):
            self.dilation *= stride
            stride = 1
        # Only the first half of a dilated stage's first block still sees the old spacing.
        first_dilation = first_dilation if position == 0 else self.dilation

        before = self.size
        parts = [self._conv("conv0", mid)]
        for i in range(stages.spatial_convs[stage]):
            self.channels = mid
            parts.append(
                self._conv("conv1", mid, kernel=kernel, stride=1 if i else stride, groups=groups)
            )
            if i == 0:
                self._shrink(stride)
        parts.append(self._conv("conv2", out_channels))
        attention, hidden = self._attention(
            spec.attention, mid if spec.attention.position == "inside" else out_channels
        )
        parts += attention
        self.channels = in_channels
        if projection:
            pooled = stages.shortcut == "avgpool+1x1"
            if not pooled:
                self.size = before
            parts.append(self._conv("conv_shortcut", out_channels, stride=1 if pooled else stride))
            self.size = (before[0] / stride, before[1] / stride)
        self.channels = out_channels
        norms = 2 * (in_channels + mid * (1 + stages.spatial_convs[stage])) if self.normed else 0
        rate = spec.regularization.stochastic_depth * index
        is_official = spec.regularization.stochastic_depth_schedule == "i/n"
        return BlockPlan(
            name=name,
            index=index,
            stage=stage,
            in_channels=in_channels,
            mid_channels=mid,
            out_channels=out_channels,
            kernel=kernel,
            groups=groups,
            spatial_convs=stages.spatial_convs[stage],
            stride=stride,
            dilation=self.dilation,
            first_dilation=first_dilation,
            projection=projection,
            attention_width=attention[0].in_channels if attention else 0,
            attention_hidden=hidden,
            expected_variance=self.expected_std**2,
            alpha=spec.block.alpha,
            beta=1.0 / self.expected_std,
            drop_rate=rate / (total if is_official else max(1, total - 1)),
            resolution=self.map_size,
            params=sum(p.params for p in parts) + norms + (spec.block.skip_gain != "none"),
            macs=sum(p.macs for p in parts),
        )

    def _attention(self, attention: Attention, channels: int) -> tuple[list[ConvPlan], int]:
        """Attention acts on pooled maps: its cost does not depend on the resolution."""
        if attention.kind == "none":
            return [], 0
        if attention.kind == "eca":
            # arXiv:1910.03151 eq. 12: the odd number nearest above (log2(C) + 1) / 2, at least 3.
            size = int(abs(math.log2(channels) + 1) / 2)
            size = max(size if size % 2 else size + 1, 3)
            return [ConvPlan("eca", channels, channels, params=size, macs=size * channels)], size
        multiple = self.spec.numerics.round_width
        hidden = rounded_width(channels * attention.ratio, multiple, may_shrink=True)
        weights = 2 * channels * hidden
        params = weights + hidden + channels
        return [ConvPlan("se", channels, channels, params=params, macs=weights)], hidden

    def _conv(
        self, name: str, out_channels: int, *, kernel: int = 1, stride: int = 1, groups: int = 1
    ) -> ConvPlan:
        """A convolution on the current map; it does not advance to its output."""
        fan_in = self.channels // groups * kernel**2
        positions = self.size[0] * self.size[1] / stride**2
        per_channel = fan_in if self.normed else fan_in + 2  # weight standardisation: gain and bias
        return ConvPlan(
            name=name,
            in_channels=self.channels,
            out_channels=out_channels,
            kernel=kernel,
            stride=stride,
            groups=groups,
            params=out_channels * per_channel,
            macs=out_channels * positions * fan_in,
        )

    def _shrink(self, stride: int) -> None:
        self.size = (self.size[0] / stride, self.size[1] / stride)
        self.map_size = (-(-self.map_size[0] // stride), -(-self.map_size[1] // stride))
        self.stride *= stride

    def _feature(self, name: str) -> None:
        level = len(self.features) + 1
        variance = self.expected_std**2
        self.features.append(FeatureInfo(level, name, self.channels, self.stride, variance))

    def _final_width(self) -> int:
        """Width of the final 1x1 convolution, 0 for none."""
        head, multiple = self.spec.head, self.spec.numerics.round_width
        width = head.width or head.width_mult * self.spec.stages.width[-1]
        return rounded_width(width, multiple) if width else 0
