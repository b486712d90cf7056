"""The table says what the plan says, adds up, and fits any width."""
# ruff: noqa: RUF001 - the Greek letters and the multiplication sign are meant

import io
import os
import re
from collections.abc import Callable

import pytest
from rich.console import Console

from nfflax.spec.load import load_spec
from nfflax.spec.plan import plan
from nfflax.spec.presets import list_specs
from nfflax.spec.table import human, plan_renderable, plan_text, text_width

WIDTHS = (60, 80, 100, 120, 140)
# One of every kind: attention, norm, numerics, groups, stem, and the longest numbers.
VARIED = (
    "nf_regnet_b8 nf_resnet600 nf_seresnet288 nfnet_f0 nfnet_f7_plus nfnet_f3_bn nfnet_tiny "
    "resnet50_bn se_resnext_d_f1 timm_eca_nfnet_l3 timm_nf_regnet_b5 timm_test_nfnet"
).split()


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """The lines of a spec's table at a width, without colour."""

    def lines(name: str, width: int, every_block: bool = False, **options) -> list[str]:
        monkeypatch.setenv("COLUMNS", str(width))
        compiled = plan(load_spec(name, options.pop("overrides", None)), **options)
        out = Console(file=io.StringIO(), width=width, color_system=None)
        with out.capture() as capture:
            out.print(plan_renderable(compiled, every_block))
        shown = [line.rstrip() for line in capture.get().splitlines()]
        assert every_block or "\n".join(shown) + "\n" == plan_text(compiled) == compiled.table()
        return shown

    return lines


def row(lines: list[str], start: str, nth: int = 0) -> list[str]:
    """The cells of the nth row that starts so, beyond that start."""
    found = [line for line in lines if re.sub(r"\s+", " ", line).strip().startswith(start)][nth]
    return re.split(r"\s{2,}", found.strip())[1:]


def layers(lines: list[str]) -> list[str]:
    """The first column, between the two rules."""
    rules = [i for i, line in enumerate(lines) if line.startswith("──")]
    return [re.split(r"\s{2,}", s.strip())[0] for s in lines[rules[0] + 1 : rules[1]] if s]


def test_the_wide_table_of_nfnet_f0(page):
    lines = page("nfnet_f0", 140)
    assert lines[0] == "nfnet_f0  NFNet-F0, arXiv:2102.06171 table 1"
    facts = " ".join(lines[1:3])
    for fact in ("256×256 input", "gelu, γ on its output", "ε at least 0.0001", "same padding"):
        assert fact in facts
    assert row(lines, "layer") == (
        "kernel, groups|channels|stride|map|α|β|drop %|params|share|MACs".split("|")
    )
    assert row(lines, "stem 3") == "3×3|64 → 128|2|64×64|74.0k|0%|▏|302M".split("|")
    assert row(lines, "stage 2") == (
        "3×3 ×2|6×128|SE|768|512 → 768 → 1536|2|16×16|0.2|0.962|6.2|6.50M|9%|█▋|1.36G".split("|")
    )
    assert row(lines, "× 5") == (
        "3×3 ×2|6×128|SE|768|1536 → 768 → 1536|1|16×16|0.2|0.981 → 0.913|8.3 → 16.7"
        "|32.5M|45%|████████|5.30G"
    ).split("|")
    assert row(lines, "final conv") == "1×1|1536 → 3072|1|8×8|4.72M|7%|█▏|302M".split("|")
    assert row(lines, "classifier") == "linear|3072 → 1000|3.07M|4%|▊|3.07M".split("|")
    assert row(lines, "total") == ["256×256", "71.5M", "12.38G"]
    assert lines[-1] == (
        "features  1: 64 /2 · 2: 256 /4 · 3: 512 /8 · 4: 1536 /16 · 5: 1536 /32 · 6: 3072 /32"
    )


def test_a_row_per_layer_and_per_run_of_equal_blocks(page):
    stem = ["stem 0", "stem 1", "stem 2", "stem 3"]
    stages = ["stage 0", "stage 1", "× 1", "stage 2", "× 5", "stage 3", "× 2"]
    assert layers(page("nfnet_f0", 120)) == [*stem, *stages, "final conv", "classifier"]
    assert layers(page("resnet50_bn", 120)) == (
        "stem 0|stem pool|stage 0|× 2|stage 1|× 3|stage 2|× 5|stage 3|× 2|final norm|classifier"
    ).split("|")


def test_every_block_has_a_row_when_asked(page):
    lines = page("nfnet_f0", 140, every_block=True)
    blocks = layers(lines)[4:-2]
    assert blocks == ("stage 0|stage 1|1.1|stage 2|2.1|2.2|2.3|2.4|2.5|stage 3|3.1|3.2".split("|"))
    compiled = plan("nfnet_f0")
    for label, block in zip(blocks, compiled.blocks, strict=True):
        cells = row(lines, label)
        assert f"{block.beta:.3f}" in cells
        assert f"{100 * block.drop_rate:.1f}" in cells
        assert human(block.params, 2) in cells or human(block.params, 0) in cells


def test_what_differs_between_implementations_is_in_the_header(page):
    facts = " ".join(page("timm_nf_regnet_b0", 140)[1:3])
    for fact in (
        "silu, γ in every kernel",
        "ε 1e-05 added",
        "symmetric padding",
        "SE before the last conv",
        "no stochastic depth",
    ):
        assert fact in facts
    assert "skip gain" not in facts
    assert "skip gain from zero · dropout 0.2" in " ".join(page("nf_regnet_b0", 140)[1:3])


def test_columns_that_say_nothing_are_left_out(page):
    header = row(page("resnet50_bn", 140), "layer")
    assert not {"α", "β", "drop %"} & set(header)
    assert "batch norm · same padding" in page("resnet50_bn", 140)[1]
    assert "drop %" not in row(page("timm_nfnet_l0", 140), "layer")
    scaled = page("resnet50_bn", 140, overrides={"block.alpha": 0.5})
    assert "α" in row(scaled, "layer")


def test_alpha_moves_to_the_header_when_its_column_goes(page):
    wide, narrow = page("nfnet_f0", 140), page("nfnet_f0", 80)
    assert "α" in row(wide, "layer")
    assert "α 0.2" not in " ".join(wide[1:4])
    assert "α" not in row(narrow, "layer")
    assert "α 0.2" in " ".join(narrow[1:4])


def test_dilation_stands_where_the_stride_was(page):
    lines = page("nfnet_f0", 140, output_stride=8)
    assert "output stride 8" in lines[1]
    assert row(lines, "stage 1")[5:7] == ["2", "32×32"]
    assert row(lines, "stage 2")[5:7] == ["dil 2", "32×32"]
    assert row(lines, "× 2")[5:7] == ["dil 4", "32×32"]


def test_dense_convolutions_and_small_heads(page):
    lines = page("nf_resnet50", 140, overrides={"head.num_classes": 0})
    assert row(lines, "stem pool") == ["max 3×3", "64", "2", "56×56"]
    assert row(lines, "stage 3")[:3] == ["3×3", "dense", "1024 → 512 → 2048"]
    assert layers(lines)[-1] == "× 2"


def test_eca_shows_its_kernel(page):
    assert row(page("timm_nf_ecaresnet50", 140), "stage 3")[2:4] == ["ECA", "7"]


@pytest.mark.parametrize(
    ("name", "resolution", "noted"),
    [
        ("nf_regnet_b2", None, True),
        ("nf_regnet_b2", 288, False),
        ("nfnet_f0", (256, 250), True),
        ("nfnet_f0", (256, 320), False),
    ],
)
def test_the_official_counter_is_explained_where_it_matters(page, name, resolution, noted):
    lines = page(name, 160, resolution=resolution)
    note = "MACs follow the official counter, which uses fractional map sizes"
    assert (note in lines[-1]) == noted


def test_maps_are_rounded_up(page):
    lines = page("nf_regnet_b2", 140)
    stages = [re.findall(r" (\d+×\d+)  0.2 ", line) for line in lines if line[:5] == "stage"]
    assert stages == [["68×68"], ["34×34"], ["17×17"], ["9×9"]]


@pytest.mark.parametrize("name", VARIED)
def test_it_fits_every_width(page, name):
    for width in WIDTHS:
        lines = page(name, width)
        assert max(map(len, lines)) <= width
        assert "…" not in "".join(lines)
        total = row(lines, "total")
        compiled = plan(name)
        assert total[-2:] == [human(compiled.params), human(compiled.macs(), 2)]
    header = row(page(name, 60), "layer")
    assert header[-2:] == ["params", "MACs"]
    assert "bar" not in header


def test_every_preset_fits_an_ordinary_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for name in list_specs():
        text = plan_text(plan(name))
        assert max(map(len, text.splitlines())) <= 80, name
        assert "…" not in text, name


@pytest.mark.parametrize("width", [1, 20, 40])
def test_no_width_is_too_small(page, width):
    assert max(map(len, page("nfnet_f0", width))) <= max(width, 1)


def test_shares_of_the_parameters_add_up(page):
    for name in ("nfnet_tiny", "resnet50_bn"):
        lines = page(name, 140)
        shares = [int(share) for share in re.findall(r"(\d+)%", "\n".join(lines))]
        assert 95 <= sum(shares) <= 105


def test_colour_changes_nothing_but_colour(monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")
    compiled = plan("nfnet_tiny")
    out = Console(file=io.StringIO(), width=110, force_terminal=True, color_system="truecolor")
    with out.capture() as capture:
        out.print(plan_renderable(compiled))
    assert "\x1b[1;36mnfnet_tiny\x1b[0m" in capture.get()
    bare = re.sub(r"\x1b\[[0-9;]*m", "", capture.get())
    assert [line.rstrip() for line in bare.splitlines()] == plan_text(compiled).splitlines()


def test_text_has_no_escapes_even_where_colour_is_forced(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    overrides = {"summary": "red \x1b[31m [bold]text\n:smile:"}
    text = plan_text(plan(load_spec("nfnet_tiny", overrides)))
    assert "\x1b" not in text
    assert text.splitlines()[0] == "nfnet_tiny  red  [31m [bold]text :smile:"


def test_the_width_is_that_of_columns_or_of_the_terminal_or_120(monkeypatch):
    monkeypatch.setenv("COLUMNS", "93")
    assert text_width() == 93
    monkeypatch.delenv("COLUMNS")
    monkeypatch.setattr(os, "get_terminal_size", lambda fd: os.terminal_size((77, 30)))
    assert text_width() == 77

    def no_terminal(fd: int) -> os.terminal_size:
        raise OSError

    monkeypatch.setattr(os, "get_terminal_size", no_terminal)
    assert text_width() == 120


@pytest.mark.parametrize(
    ("number", "decimals", "text"),
    [
        (0, 1, "0"),
        (464, 1, "464"),
        (999, 1, "999"),
        (1000, 1, "1.0k"),
        (71_489_284, 1, "71.5M"),
        (12_384_198_656, 2, "12.38G"),
        (872_677_376, 0, "873M"),
        (999_949, 1, "999.9k"),
        (999_960, 1, "1.0M"),
        (1.5e12, 2, "1.50T"),
        (2.5e15, 0, "2500T"),
    ],
)
def test_human_numbers(number, decimals, text):
    assert human(number, decimals) == text
