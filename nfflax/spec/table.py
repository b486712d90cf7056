"""A plan as a table for people: a header, a row per layer or run of equal blocks, totals, features.

The table fits the width it is given. It first loses bars, air and digits, then the columns that say
least. A column that would say nothing gives way to a word in the header.
"""
# ruff: noqa: RUF001 - the Greek letters and the multiplication sign are meant

import io
import itertools
import math
import shutil
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.box import SIMPLE
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Column, Table
from rich.text import Text

from nfflax.spec.parts import BlockPlan, ConvPlan
from nfflax.spec.plan import Plan

# What a narrow table gives up, in this order: columns, and three things that are no columns.
_CONCESSIONS = "bar air hidden digits alpha share drop stride beta map what channels".split()


def plan_renderable(plan: Plan, every_block: bool = False) -> RenderableType:
    """The plan for rich to print. A stage's equal blocks share a row unless `every_block`."""
    sections = _stem_rows(plan), _stage_rows(plan, every_block), _head_rows(plan)
    return _PlanView(plan, tuple(map(tuple, sections)))


def plan_text(plan: Plan) -> str:
    """The same without colour."""
    return plain_text(plan_renderable(plan))


def plain_text(renderable: RenderableType) -> str:
    """What rich would print, without colour, `text_width()` wide."""
    page = io.StringIO()
    console = Console(file=page, width=text_width(), color_system=None, markup=False, emoji=False)
    console.print(renderable)
    return "".join(f"{line.rstrip()}\n" for line in page.getvalue().splitlines())


def text_width() -> int:
    """Characters per line: COLUMNS, or else the terminal's, or else 120."""
    return shutil.get_terminal_size((120, 24)).columns


def human(number: float, decimals: int = 1) -> str:
    """A count in a few characters: 71_489_284 is 71.5M."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if round(number / size * 1000, decimals) >= 1000:  # the next unit would print 1000
            return f"{number / size:.{decimals}f}{unit}"
    return f"{number:.0f}"


@dataclass(frozen=True)
class _Row:
    """One line of the table, whatever room there is for it."""

    layer: str
    what: tuple[str, ...]
    channels: tuple[int, ...]
    stride: str = ""
    map: str = ""
    params: int = 0
    macs: float = 0.0
    blocks: Sequence[BlockPlan] = ()


@dataclass(frozen=True)
class _Column:
    """One column, filled."""

    header: str
    cells: list[str]
    style: str = ""
    footer: str = ""
    justify: Literal["left", "right"] = "right"

    @property
    def width(self) -> int:
        return max(map(len, (self.header, self.footer, *self.cells)))


def _stem_rows(plan: Plan) -> Iterator[_Row]:
    size = plan.input_size
    for i, conv in enumerate(plan.stem):
        size = _strided(size, conv.stride)
        yield _conv_row(f"stem {i}", conv, size)
    if plan.spec.stem.pool == "max":
        channels, size = plan.stem[-1].out_channels, _strided(size, 2)
        yield _Row("stem pool", ("max 3×3",), (channels,), "2", _by(*size))


def _stage_rows(plan: Plan, every_block: bool) -> Iterator[_Row]:
    for stage, blocks in enumerate(plan.stages()):
        label = f"stage {stage}"
        yield _block_row(plan, label, blocks[:1])
        rest = [(block,) for block in blocks[1:]] if every_block else [blocks[1:]]
        for i, run in enumerate(filter(None, rest), 1):
            below = f"{stage}.{i}" if every_block else f"× {len(run)}"
            yield _block_row(plan, below.rjust(len(label)), run)


def _head_rows(plan: Plan) -> Iterator[_Row]:
    if plan.final_conv:
        yield _conv_row("final conv", plan.final_conv, plan.blocks[-1].resolution)
    if params := plan.head_norm_params:
        yield _Row("final norm", ("batch norm",), (plan.num_features,), params=params)
    if linear := plan.classifier:
        channels = linear.in_channels, linear.out_channels
        yield _Row("classifier", ("linear",), channels, params=linear.params, macs=linear.macs)


def _conv_row(layer: str, conv: ConvPlan, size: tuple[int, int]) -> _Row:
    what, channels = (_by(conv.kernel, conv.kernel),), (conv.in_channels, conv.out_channels)
    return _Row(layer, what, channels, str(conv.stride), _by(*size), conv.params, conv.macs)


def _block_row(plan: Plan, layer: str, run: Sequence[BlockPlan]) -> _Row:
    block, spec = run[0], plan.spec
    kernel = _by(block.kernel, block.kernel)
    is_dense = spec.stages.group_width[block.stage] == 0
    what = [
        f"{kernel} ×{block.spatial_convs}" if block.spatial_convs > 1 else kernel,
        "dense" if is_dense else _by(block.groups, block.mid_channels // block.groups),
    ]
    if spec.attention.kind != "none":
        what += [spec.attention.kind.upper(), str(block.attention_hidden)]
    strides = [str(block.stride)] if block.stride > 1 or block.dilation == 1 else []
    strides += [f"dil {block.dilation}"] if block.dilation > 1 else []
    channels = block.in_channels, block.mid_channels, block.out_channels
    size = _by(*block.resolution)
    params, macs = sum(b.params for b in run), sum(b.macs for b in run)
    return _Row(layer, tuple(what), channels, " ".join(strides), size, params, macs, run)


@dataclass(frozen=True)
class _PlanView:
    """The whole page, laid out when the width is known."""

    plan: Plan
    sections: tuple[tuple[_Row, ...], ...]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        given_up, concessions = self._mute_columns(), iter(_CONCESSIONS)
        columns = self._columns(given_up)
        while _width(columns) > options.max_width and (concession := next(concessions, "")):
            given_up |= {concession}
            columns = self._columns(given_up)
        summary = "".join(c if c.isprintable() else " " for c in self.plan.spec.summary)
        yield Text.assemble((self.plan.spec.name, "bold cyan"), f"  {summary}")
        yield _flow(self._facts(given_up), options.max_width)
        yield from ("", self._table(columns), "")
        yield from self._footer(options.max_width)

    def _mute_columns(self) -> frozenset[str]:
        """Columns that would say nothing of this network."""
        spec = self.plan.spec
        is_mute = {
            "alpha": spec.block.alpha == 1,
            "beta": spec.norm.kind == "batch",
            "drop": spec.regularization.stochastic_depth == 0,
        }
        return frozenset(name for name, mute in is_mute.items() if mute)

    def _table(self, columns: Sequence[_Column]) -> Table:
        table = Table(
            *(Column(c.header, c.footer, style=c.style, justify=c.justify) for c in columns),
            box=SIMPLE,
            show_edge=False,
            pad_edge=False,
            padding=(0, 1, 0, 0),
            show_footer=True,
            header_style="dim",
            footer_style="bold",
            border_style="dim",
        )
        lines = zip(*(column.cells for column in columns), strict=True)
        for section in self.sections:
            for line in itertools.islice(lines, len(section)):
                cells = [Text(cell, no_wrap=True, overflow="ellipsis") for cell in line]
                for cell in cells:
                    cell.highlight_regex(r"→|^ .*", "not bold dim")  # "^ .*": more blocks
                table.add_row(*cells)
            table.add_section()
        return table

    def _columns(self, given_up: frozenset[str]) -> list[_Column]:
        """The columns that are left, filled."""
        plan, rows = self.plan, list(itertools.chain(*self.sections))
        most, fewer = max(row.params for row in rows), int("digits" in given_up)
        gap = "" if "air" in given_up else " "
        arrow = f"{gap}→{gap}"
        several = [row.what[: 3 if "hidden" in given_up else 4] for row in rows if row.blocks]
        widths = [max(map(len, pieces)) for pieces in zip(*several, strict=True)]

        def what(row: _Row) -> str:
            aligned = map(str.ljust, row.what, widths) if row.blocks else row.what
            return f" {gap}".join(aligned).rstrip()

        def ends(values: list[float], decimals: int) -> str:
            shown = [f"{value:.{decimals - fewer}f}" for value in values]
            return arrow.join(dict.fromkeys([*shown[:1], *shown[-1:]]))

        channels = [arrow.join(map(str, r.channels)) for r in rows]
        drops = [ends([100 * b.drop_rate for b in r.blocks], 1) for r in rows]
        shares = [f"{r.params / plan.params:.0%}" if r.params else "" for r in rows]
        params, macs = human(plan.params), human(plan.macs(), 2)
        columns = {
            "layer": _Column("layer", [r.layer for r in rows], "bold", "total", "left"),
            "what": _Column("kernel, groups", [what(r) for r in rows], justify="left"),
            "channels": _Column("channels", channels, "cyan"),
            "stride": _Column("stride", [r.stride for r in rows]),
            "map": _Column("map", [r.map for r in rows], footer=_by(*plan.input_size)),
            "alpha": _Column("α", [f"{r.blocks[0].alpha:g}" if r.blocks else "" for r in rows]),
            "beta": _Column("β", [ends([b.beta for b in r.blocks], 3) for r in rows]),
            "drop": _Column("drop %", drops),
            "params": _Column("params", [_short(r.params) for r in rows], "green", params),
            "share": _Column("" if "bar" in given_up else "share", shares),
            "bar": _Column("", [_bar(r.params / most) for r in rows], "green", justify="left"),
            "macs": _Column("MACs", [_short(r.macs) for r in rows], "magenta", macs),
        }
        return [column for name, column in columns.items() if name not in given_up]

    def _facts(self, given_up: frozenset[str]) -> Iterator[str]:
        """What holds for the whole network, a few words each."""
        plan, spec = self.plan, self.plan.spec
        numerics, attention = spec.numerics, spec.attention
        yield f"{_by(*plan.input_size)} input"
        if plan.output_stride:
            yield f"output stride {plan.output_stride}"
        gamma = {"activation": ", γ on its output", "conv": ", γ in every kernel", "none": ""}
        yield numerics.activation + gamma[numerics.gamma]
        if spec.norm.kind == "batch":
            yield "batch norm"
        else:
            epsilon = {"floor": "ε at least {:g}", "add": "ε {:g} added"}[numerics.ws_eps_mode]
            yield f"scaled weight standardisation, {epsilon.format(numerics.ws_eps)}"
        if "alpha" in given_up and spec.block.alpha != 1:
            yield f"α {spec.block.alpha:g}"
        yield f"{numerics.padding} padding"
        if attention.kind != "none":
            place = {"after": "after", "inside": "before"}[attention.position]
            yield f"{attention.kind.upper()} {place} the last conv"
        if spec.block.skip_gain != "none":
            yield f"skip gain from {spec.block.skip_gain.removesuffix('s')}"
        if not spec.regularization.stochastic_depth:
            yield "no stochastic depth"
        if spec.head.dropout:
            yield f"dropout {spec.head.dropout:g}"

    def _footer(self, width: int) -> Iterator[Text]:
        infos, size = self.plan.feature_info, self.plan.input_size
        features = (f"{info.level}: {info.channels} /{info.stride}" for info in infos)
        yield _flow(features, width, label="features")
        if any(side % infos[-1].stride for side in size):
            yield Text(
                f"{_by(*size)} is not divisible by {infos[-1].stride}: MACs follow the official "
                "counter, which uses fractional map sizes. The maps themselves are rounded up.",
                "italic dim",
            )


def _flow(items: Iterable[str], width: int, *, label: str = "") -> Text:
    """Items with dots between them; lines break only at the dots."""
    label = f"{label}  " if label else ""
    solid = "\xa0· ".join(item.replace(" ", "\xa0") for item in items)
    room = max(1, width - len(label))
    lines = textwrap.wrap(solid, room, break_long_words=False, break_on_hyphens=False)
    flowing = f"\n{' ' * len(label)}".join(lines).replace("\xa0", " ")
    return Text.assemble((label, "bold"), (flowing, "dim"))


def _width(columns: Sequence[_Column]) -> int:
    return sum(column.width + 2 for column in columns) - 2


def _short(count: float) -> str:
    """Three significant digits of a count, nothing for 0."""
    return human(count, 2 - int(math.log10(count)) % 3) if count else ""


def _by(a: int, b: int) -> str:
    return f"{a}×{b}"


def _strided(size: tuple[int, int], stride: int) -> tuple[int, int]:
    return -(-size[0] // stride), -(-size[1] // stride)


def _bar(share: float) -> str:
    """A bar of at most 8 characters; whatever is above 0 shows."""
    full, rest = divmod(max(share > 0, round(64 * share)), 8)
    return "█" * full + " ▏▎▍▌▋▊▉"[rest].strip()
