"""Plans agree with the published networks: the official release, timm's counts, the papers' tables.

tests/golden/README.md says where the reference numbers come from.
"""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from nfflax.spec.load import load_spec
from nfflax.spec.parts import BlockPlan
from nfflax.spec.plan import Plan, plan
from nfflax.spec.presets import list_specs
from nfflax.spec.schema import Spec

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "plans.json").read_text())
COUNTED = [name for name, golden in GOLDEN.items() if "macs" in golden["test"]]
NF_RESNETS = [name for name in GOLDEN if "resnet" in name]

# Stage widths of NF-RegNet before its width multiplier (official release, nfnets/base.py).
REGNET_WIDTHS = {
    "nf_regnet_b0": (48, 104, 208, 440),
    "nf_regnet_b1": (48, 104, 208, 440),
    "nf_regnet_b2": (56, 112, 232, 488),
    "nf_regnet_b3": (56, 128, 248, 528),
    "nf_regnet_b4": (64, 144, 288, 616),
    "nf_regnet_b5": (80, 168, 336, 704),
    "nf_regnet_b6": (88, 184, 376, 792),
    "nf_regnet_b7": (96, 208, 416, 880),
    "nf_regnet_b8": (104, 232, 456, 968),
}

# arXiv:2102.06171, table 1: FLOPs at test resolution in billions, parameters in millions.
PAPER_TABLE_1 = {
    "nfnet_f0": ("12.38", "71.5"),
    "nfnet_f1": ("35.54", "132.6"),
    "nfnet_f2": ("62.59", "193.8"),
    "nfnet_f3": ("114.76", "254.9"),
    "nfnet_f4": ("215.24", "316.1"),
    "nfnet_f5": ("289.76", "377.2"),
    "nfnet_f6": ("377.28", "438.4"),
}

TIMM_PARAMS = {
    "timm_dm_nfnet_f0": 71_489_284,
    "timm_dm_nfnet_f1": 132_634_256,
    "timm_dm_nfnet_f2": 193_779_228,
    "timm_dm_nfnet_f3": 254_924_200,
    "timm_dm_nfnet_f4": 316_069_172,
    "timm_dm_nfnet_f5": 377_214_144,
    "timm_dm_nfnet_f6": 438_359_116,
    "timm_nfnet_f0": 71_489_272,
    "timm_nfnet_f1": 132_634_232,
    "timm_nfnet_f2": 193_779_192,
    "timm_nfnet_f3": 254_924_152,
    "timm_nfnet_f4": 316_069_112,
    "timm_nfnet_f5": 377_214_072,
    "timm_nfnet_f6": 438_359_032,
    "timm_nfnet_f7": 499_503_992,
    "timm_nfnet_l0": 35_074_488,
    "timm_eca_nfnet_l0": 24_143_924,
    "timm_eca_nfnet_l1": 41_407_728,
    "timm_eca_nfnet_l2": 56_722_348,
    "timm_eca_nfnet_l3": 72_036_968,
    "timm_nf_regnet_b0": 8_764_288,
    "timm_nf_regnet_b1": 10_223_984,
    "timm_nf_regnet_b2": 14_314_608,
    "timm_nf_regnet_b3": 18_593_832,
    "timm_nf_regnet_b4": 30_210_816,
    "timm_nf_regnet_b5": 49_741_728,
    "timm_nf_resnet26": 15_995_176,
    "timm_nf_resnet50": 25_557_032,
    "timm_nf_resnet101": 44_549_160,
    "timm_nf_seresnet26": 17_395_976,
    "timm_nf_seresnet50": 28_088_024,
    "timm_nf_seresnet101": 49_326_872,
    "timm_nf_ecaresnet26": 15_995_220,
    "timm_nf_ecaresnet50": 25_557_118,
    "timm_nf_ecaresnet101": 44_549_331,
    "timm_test_nfnet": 383_080,
}


def golden_spec(name: str) -> Spec:
    """The spec of an entry of plans.json: a preset, or one widened to multiplier 1."""
    preset, _, variant = name.partition("@")
    if not variant:
        return load_spec(preset)
    widths = REGNET_WIDTHS[preset]
    head = int(1280 * widths[-1] // 440)
    return load_spec(
        preset,
        {"stem.width": widths[0], "stages.width": list(widths), "head.width": head},
    )


def per_block(column: list | float, count: int) -> list:
    return column if isinstance(column, list) else [column] * count


def part_macs(compiled: Plan) -> dict[str, list[float]]:
    return {
        "stem_macs": [conv.macs for conv in compiled.stem],
        "block_macs": [block.macs for block in compiled.blocks],
        "head_macs": [c.macs for c in (compiled.final_conv, compiled.classifier) if c],
    }


def test_golden_covers_every_published_preset():
    published = {n.partition("@")[0] for n in GOLDEN}
    wanted = {*list_specs("nfnet_f?"), *list_specs("nfnet_f?_plus"), *list_specs("nf_*")}
    assert published == wanted
    assert set(TIMM_PARAMS) == set(list_specs("timm_*"))


@pytest.mark.parametrize("name", GOLDEN)
def test_every_block_number_is_the_official_one(name):
    golden, compiled = GOLDEN[name], plan(golden_spec(name))
    assert [len(stage) for stage in compiled.stages()] == golden["depth"]
    for key, column in golden["blocks"].items():
        found = [getattr(block, key) for block in compiled.blocks]
        assert found == per_block(column, len(compiled.blocks)), key  # floats to the last bit


@pytest.mark.parametrize("name", GOLDEN)
def test_parameters_are_the_official_ones(name):
    golden, compiled = GOLDEN[name], plan(golden_spec(name))
    assert compiled.params == golden["params"]
    if "stem_params" in golden:
        head = [c.params for c in (compiled.final_conv, compiled.classifier) if c]
        assert [conv.params for conv in compiled.stem] == golden["stem_params"]
        assert head == golden["head_params"]


@pytest.mark.parametrize("name", GOLDEN)
def test_dropout_and_resolution_are_the_official_ones(name):
    golden, spec = GOLDEN[name], golden_spec(name)
    assert spec.head.dropout == golden["dropout"]
    assert (spec.resolution.train, spec.resolution.test) == (
        golden["train"]["px"],
        golden["test"]["px"],
    )


@pytest.mark.parametrize("name", COUNTED)
def test_multiply_adds_are_the_official_ones(name):
    golden, compiled = GOLDEN[name], plan(golden_spec(name))
    train, test = golden["train"], golden["test"]
    assert compiled.macs(train["px"]) == round(train["macs"])
    assert compiled.input_size == (test["px"], test["px"])
    assert compiled.macs() == round(test["macs"])
    for part, found in part_macs(compiled).items():
        assert found == pytest.approx(test[part], rel=1e-12), part


@pytest.mark.parametrize("name", PAPER_TABLE_1)
def test_printed_table_1(name):
    billions, millions = PAPER_TABLE_1[name]
    compiled = plan(name)
    assert f"{compiled.macs() / 1e9:.2f}" == billions
    assert f"{compiled.params / 1e6:.1f}" == millions


@pytest.mark.parametrize("name", TIMM_PARAMS)
def test_timm_parameter_counts(name):
    assert plan(name).params == TIMM_PARAMS[name]


@pytest.mark.parametrize("name", REGNET_WIDTHS)
def test_nf_regnet_presets_have_three_quarters_of_the_widths(name):
    spec, widths = load_spec(name), REGNET_WIDTHS[name]
    assert spec.stages.width == tuple(int(0.75 * w) for w in widths)
    assert spec.stem.width == (int(0.75 * widths[0]),)
    assert spec.head.width == int(1280 * int(0.75 * widths[-1]) // 440)


def nf_resnet_macs(depths: list[int], side: int, squeeze: bool) -> int:
    """Multiply-adds of an NF-ResNet, counted by hand from arXiv:2101.08692 and arXiv:1512.03385."""
    side //= 2
    total = 7 * 7 * 3 * 64 * side**2
    side //= 2  # the max-pool
    width = 64
    for stage, depth in enumerate(depths):
        out = 256 * 2**stage
        middle = out // 4
        for block in range(depth):
            total += width * middle * side**2
            side //= 2 if stage and block == 0 else 1
            total += 9 * middle * middle * side**2 + middle * out * side**2
            total += width * out * side**2 if block == 0 else 0
            total += 2 * out * (out // 4) if squeeze else 0
            width = out
    return total + 2048 * 1000


@pytest.mark.parametrize("side", [224, 288])
@pytest.mark.parametrize("name", NF_RESNETS)
def test_nf_resnet_multiply_adds(name, side):
    expected = nf_resnet_macs(GOLDEN[name]["depth"], side, squeeze="_se" in name)
    assert plan(name, resolution=side).macs() == expected


def test_resnet50_is_the_familiar_four_billion():
    assert 3.8e9 < plan("nf_resnet50").macs() < 4.2e9


@pytest.mark.parametrize("name", ["nfnet_f1", "nf_regnet_b2", "nf_resnet50", "timm_eca_nfnet_l1"])
@pytest.mark.parametrize(
    ("output_stride", "strides", "dilations", "first_dilations"),
    [
        (8, [4, 8, 8, 8], [1, 1, 2, 4], [1, 1, 1, 2]),
        (16, [4, 8, 16, 16], [1, 1, 1, 2], [1, 1, 1, 1]),
        (32, [4, 8, 16, 32], [1, 1, 1, 1], [1, 1, 1, 1]),
    ],
)
def test_output_stride_trades_strides_for_dilation(
    name, output_stride, strides, dilations, first_dilations
):
    usual = plan(name, resolution=256)
    dilated = plan(name, resolution=256, output_stride=output_stride)
    assert dilated.params == usual.params
    assert [f.name for f in dilated.feature_info] == [f.name for f in usual.feature_info]
    assert [f.channels for f in dilated.feature_info] == [f.channels for f in usual.feature_info]
    assert [f.stride for f in dilated.feature_info[1:5]] == strides
    assert all(f.stride == output_stride for f in dilated.feature_info[5:])
    for stage, blocks in enumerate(dilated.stages()):
        first, *rest = blocks
        assert first.first_dilation == first_dilations[stage]
        assert {b.first_dilation for b in rest} == {dilations[stage]}
        assert {b.dilation for b in blocks} == {dilations[stage]}
        assert {b.resolution for b in blocks} == {(256 // strides[stage],) * 2}
    assert (dilated.macs() > usual.macs()) == (output_stride < 32)
    untouched = {"stride", "dilation", "first_dilation", "resolution", "macs"}
    for block, other in zip(dilated.blocks, usual.blocks, strict=True):
        for field in {f.name for f in dataclasses.fields(BlockPlan)} - untouched:
            assert getattr(block, field) == getattr(other, field), field


def test_by_default_every_stride_is_the_specs():
    """Also beyond 32, where a default limit would silently dilate the last stages."""
    spec = {
        "extends": "nf_resnet",
        "name": "deep",
        "stages": {"depth": 1, "width": [64, 64, 64, 64, 64], "stride": [1, 2, 2, 2, 2]},
    }
    deep = plan(spec, resolution=256)
    assert [b.stride for b in deep.blocks] == [1, 2, 2, 2, 2]
    assert {b.dilation for b in deep.blocks} == {1}
    assert deep.feature_info[-1].stride == 64
    limited = plan(spec, resolution=256, output_stride=32)
    assert limited.feature_info[-1].stride == 32
    assert limited.blocks[-1].dilation == 2


@pytest.mark.parametrize("output_stride", [0, 4, 12, 64])
def test_other_output_strides_are_refused(output_stride):
    with pytest.raises(ValueError, match="8, 16 and 32"):
        plan("nfnet_f0", output_stride=output_stride)


@pytest.mark.parametrize("name", ["nfnet_f0", "nf_regnet_b3", "nf_seresnet50", "nfnet_f0_bn"])
def test_multiply_adds_depend_on_the_area_of_the_input(name):
    square, wide = plan(name, resolution=256), plan(name, resolution=(128, 512))
    assert wide.input_size == (128, 512)
    assert wide.macs() == square.macs() == square.macs((512, 128)) == square.macs((128, 512))
    assert wide.params == square.params
    for block, other in zip(wide.blocks, square.blocks, strict=True):
        side = other.resolution[0]
        assert block.resolution == (side // 2, side * 2)


def test_maps_of_odd_sizes_are_rounded_up():
    sides = [blocks[0].resolution for blocks in plan("nfnet_f0", resolution=(225, 97)).stages()]
    assert sides == [(57, 25), (29, 13), (15, 7), (8, 4)]


@pytest.mark.parametrize("resolution", [0, -32, (0, 224), (224, -1)])
def test_a_resolution_without_pixels_is_refused(resolution):
    with pytest.raises(ValueError, match="at least one pixel"):
        plan("nfnet_f0", resolution=resolution)


@pytest.mark.parametrize(
    ("name", "levels"),
    [
        ("nfnet_f0", [(64, 2), (256, 4), (512, 8), (1536, 16), (1536, 32), (3072, 32)]),
        ("timm_nfnet_l0", [(64, 2), (256, 4), (512, 8), (1536, 16), (1536, 32), (2304, 32)]),
        ("nf_resnet50", [(64, 2), (256, 4), (512, 8), (1024, 16), (2048, 32)]),
        ("timm_nf_regnet_b1", [(40, 2), (40, 4), (80, 8), (160, 16), (328, 32), (960, 32)]),
    ],
)
def test_feature_levels(name, levels):
    compiled = plan(name)
    assert [(f.channels, f.stride) for f in compiled.feature_info] == levels
    assert [f.level for f in compiled.feature_info] == list(range(1, len(levels) + 1))
    assert compiled.num_features == levels[-1][0]


def test_no_classes_means_no_classifier():
    compiled = plan(load_spec("nfnet_f0", {"head.num_classes": 0}))
    assert compiled.classifier is None
    assert compiled.num_features == 3072
    assert compiled.params == plan("nfnet_f0").params - (3072 * 1000 + 1000)


def test_timm_depth_schedule_reaches_the_nominal_rate():
    compiled = plan(load_spec("timm_nfnet_f0", {"regularization.stochastic_depth": 0.25}))
    rates = [block.drop_rate for block in compiled.blocks]
    assert rates == pytest.approx([0.25 * i / 11 for i in range(12)], rel=1e-15)


@pytest.mark.parametrize("name", list_specs())
def test_plans_are_hashable_equal_and_plain(name):
    first, second = plan(name), plan(load_spec(name))
    assert first == second
    assert hash(first) == hash(second)
    data = first.to_dict()
    assert json.loads(json.dumps(data, allow_nan=False)) == json.loads(json.dumps(data))
    assert data["params"] == first.params
    assert data["macs"] == first.macs()
    assert len(data["blocks"]) == len(first.blocks)
    assert all(math.isfinite(b["beta"]) and 0 < b["beta"] <= 1 for b in data["blocks"])


def test_compiling_every_preset_imports_no_jax():
    program = (
        "import sys, nfflax\n"
        "for name in nfflax.list_specs():\n"
        "    nfflax.plan(nfflax.load_spec(name)).to_dict()\n"
        "heavy = {'jax', 'flax', 'optax', 'orbax', 'grain', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "print(len(nfflax.list_specs()))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(list_specs())
