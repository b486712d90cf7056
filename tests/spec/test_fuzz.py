"""Whatever stands in a spec, a plan or a SpecError comes out, soon; and every plan adds up."""

import itertools
import json
import math
import string
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nfflax.spec.errors import SpecError
from nfflax.spec.explain import keys_of
from nfflax.spec.load import load_run, load_spec, parse_override
from nfflax.spec.plan import Plan, plan
from nfflax.spec.presets import family_paths, preset_paths, shipped
from nfflax.spec.run import Run
from nfflax.spec.schema import Spec

SECONDS = 2
KEYS = keys_of(Spec)
SHIPPED = [path.read_bytes() for path in [*preset_paths().values(), *family_paths().values()]]
SHORT = [tomllib.loads(text.decode()) for text in SHIPPED]
RESOLVED = [
    json.loads(load_spec(name).model_dump_json())
    for name in ("nfnet_micro", "nf_regnet_b1", "nf_seresnet50", "timm_eca_nfnet_l0", "nfnet_f0_bn")
]
RUNS = [tomllib.loads(path.read_text()) for path in shipped("runs").values()]
RUNS += [json.loads(load_run(name).model_dump_json()) for name in ("nf_regnet", "finetune")]
AS_JSON = [json.dumps(spec).encode() for spec in (*RESOLVED, *SHORT[::8])]


def many(examples: int) -> Callable[[Any], Any]:
    return settings(
        max_examples=examples,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


def planned(source: Any, overrides: Any = None) -> Plan:
    compiled = plan(load_spec(source, overrides))
    json.dumps(compiled.to_dict(), allow_nan=False)
    return compiled


def reloaded(source: Any, overrides: Any = None) -> Run:
    run = load_run(source, overrides)
    assert load_run(json.loads(run.model_dump_json())) == run
    assert hash(load_run(run)) == hash(run)
    return run


def judge(
    source: Any, overrides: Any = None, *, load: Callable[..., Any] = planned
) -> Plan | Run | SpecError:
    """What comes of a spec: always in time, and if it is an error, one that can be read."""
    start = time.process_time()
    try:
        found = load(source, overrides)
    except SpecError as error:
        found = error
    assert time.process_time() - start < SECONDS
    if isinstance(found, SpecError):
        text = str(found)
        text.encode()
        assert found.problems
        for problem in found.problems[:50]:
            assert problem.message
            assert problem.file
            assert str(problem) in text
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


# Broken dicts

names = st.one_of(
    st.sampled_from([*KEYS, *KEYS.values(), *Spec.model_fields, "extends", "$schema", ""]),
    st.text(max_size=8),
)
RUN_KEYS = [*keys_of(Run), *Run.model_fields, "model.set.head.dropout", "model.spec.head"]
numbers = st.one_of(
    st.integers(-3, 70_000),
    st.sampled_from([2**31, 2**63, -(2**64), 10**400, 10**4000, -0.0, 1e308, 5e-324]),
    st.floats(),
)
leaves = st.one_of(
    st.none(),
    st.booleans(),
    numbers,
    numbers,
    st.text(max_size=12),
    st.sampled_from(["conv", "none", "se", "silu", "nfnet_f0", "same", "strided 1x1", "x.toml"]),
    st.just("y" * 5000),
)
junk = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(names, inner, max_size=3),
    max_leaves=6,
)


def deeply(value: Any, depth: int) -> Any:
    for level in range(depth):
        value = [value] if level % 2 else {"stages": value}
    return value


def delete(draw: Any, table: dict, key: Any) -> None:
    del table[key]


def rename(draw: Any, table: dict, key: Any) -> None:
    table[draw(names)] = table.pop(key)


def replace(draw: Any, table: dict, key: Any) -> None:
    table[key] = draw(junk)


def add(draw: Any, table: dict, key: Any) -> None:
    table[draw(names | st.integers() | st.none())] = draw(junk)


def nest(draw: Any, table: dict, key: Any) -> None:
    table[key] = deeply(table[key], draw(st.sampled_from([1, 2, 100])))


def resize(draw: Any, table: dict, key: Any) -> None:
    value = table[key] if isinstance(table[key], list) else [table[key]]
    length = draw(st.sampled_from([0, 1, 2, 3, 5, 16, 17, 20_000]))
    table[key] = list(itertools.islice(itertools.cycle(value), length))


def alter(draw: Any, table: dict, key: Any) -> None:
    value = table[key]
    if isinstance(value, list) and value:
        value[draw(st.integers(0, len(value) - 1))] = draw(leaves)
    elif isinstance(value, int | float):
        table[key] = value * draw(st.sampled_from([-1, 0, 2, 3, 1000, 10**200]))
    else:
        table[key] = draw(leaves)


MUTATIONS = [delete, rename, replace, add, nest, resize, alter, alter]


@st.composite
def broken_dicts(draw: st.DrawFn, *seeds: list[Any]) -> dict[Any, Any]:
    """A shipped spec with one to four mistakes (a few of them happen to be harmless)."""
    spec = json.loads(json.dumps(draw(st.one_of(*map(st.sampled_from, seeds)))))
    for _ in range(draw(st.integers(1, 4))):
        tables = [spec, *(value for value in spec.values() if isinstance(value, dict) and value)]
        table = draw(st.sampled_from(tables))
        if table:
            key = draw(st.sampled_from(list(table)))
            draw(st.sampled_from(MUTATIONS))(draw, table, key)
    return spec


@many(2400)
@given(broken_dicts(RESOLVED, SHORT))
def test_broken_dicts(spec):
    judge(spec)


@many(600)
@given(broken_dicts(RUNS))
def test_broken_runs(run):
    judge(run, load=reloaded)


@many(300)
@given(
    st.sampled_from(list(shipped("runs"))),
    st.dictionaries(st.sampled_from(RUN_KEYS) | names, junk, min_size=1, max_size=4),
)
def test_overrides_of_runs(name, overrides):
    judge(name, overrides, load=reloaded)


@many(300)
@given(st.dictionaries(names | st.integers(), junk, max_size=6))
def test_dicts_of_anything(spec):
    judge(spec)


@many(300)
@given(
    st.sampled_from(["nfnet_f0", "nf_regnet_b0", "timm_nf_ecaresnet26"]),
    st.dictionaries(names | st.integers(), junk, min_size=1, max_size=4),
)
def test_overrides_of_anything(name, overrides):
    judge(name, overrides)


# Broken files

TOKENS = b"""
    ' " ''' [[ ] { } = # , .. - 0x inf nan null true 1e999 1979-05-27 \\u00 \\ud800 \x00 \xff
    \xef\xbb\xbf extends stages nfnet_f0.toml
""".split()
tokens = st.sampled_from([*TOKENS, b"\n", b"\r", b"9" * 5000, b"a." * 200, b"[" * 3000])


@st.composite
def broken_bytes(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """A file with one to four places cut, doubled, overwritten or joined to another file."""
    content = draw(st.sampled_from(seeds))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(content)))
        end = min(len(content), start + draw(st.sampled_from([0, 1, 2, 10, 100])))
        piece = content[start:end]
        kind = draw(st.sampled_from(["cut", "double", "token", "bytes", "truncate", "join"]))
        if kind == "truncate":
            content = content[:start]
        elif kind == "join":
            content = content[:start] + draw(st.sampled_from(seeds))[start:]
        else:
            new = {"cut": b"", "double": piece * 2}.get(kind)
            if new is None:
                new = draw(tokens if kind == "token" else st.binary(max_size=6))
            content = content[:start] + new + content[end:]
    return content


def judge_file(folder: Path, name: str, content: bytes) -> None:
    path = folder / name
    path.write_bytes(content)
    judge(path)


@many(1000)
@given(content=broken_bytes(SHIPPED))
def test_broken_toml(folder, content):
    judge_file(folder, "fuzz.toml", content)


@many(500)
@given(content=broken_bytes(AS_JSON))
def test_broken_json(folder, content):
    judge_file(folder, "fuzz.json", content)


@many(200)
@given(content=st.binary(max_size=300), name=st.sampled_from(["fuzz.toml", "fuzz.json"]))
def test_random_bytes(folder, content, name):
    judge_file(folder, name, content)


# Broken assignments

assignments = st.one_of(
    st.text(max_size=30),
    st.builds("{}={}".format, names, st.text(string.printable, max_size=20)),
    st.builds(
        "{}={}".format,
        st.sampled_from(list(KEYS)),
        st.text("0123456789[]{},.\"'=-+einfatrus# \n", max_size=12),
    ),
    st.builds("{}={}".format, st.sampled_from(list(KEYS)), numbers.map(str)),
)


@many(500)
@given(st.lists(assignments, min_size=1, max_size=3))
def test_broken_assignments(texts):
    overrides = {}
    for text in texts:
        try:
            key, value = parse_override(text)
        except SpecError:
            assert not text.partition("=")[0].strip() or "=" not in text
        else:
            overrides[key] = value
    judge("nfnet_micro", overrides)


# Valid specs

# Any bottleneck these make is a multiple of 16 channels wide, whatever it expands.
widths = st.integers(1, 12).map(lambda n: 64 * n)


@st.composite
def valid_specs(draw: st.DrawFn) -> dict[str, Any]:
    """A spec that keeps every rule."""
    convs, stages = draw(st.integers(1, 4)), draw(st.integers(1, 5))

    def column(values: st.SearchStrategy, length: int) -> Any:
        return draw(values | st.lists(values, min_size=length, max_size=length))

    def maybe(**tables: Any) -> dict[str, Any]:
        return {key: draw(value) for key, value in tables.items() if draw(st.booleans())}

    def strides(length: int) -> list[int]:
        nonlocal left
        found = []
        for _ in range(length):
            found.append(draw(st.integers(1, min(3, left))))
            left //= found[-1]
        return found

    pool = draw(st.sampled_from(["none", "max"]))
    left = 16 if pool == "max" else 32  # the resolution may be as small as 32
    fits = draw(st.sampled_from(["exact", "down"]))
    round_width = draw(st.sampled_from([1, 8, 16]))
    group_width = st.sampled_from([0, 1, 4, 16] if fits == "exact" else [0, 3, 5, 12])
    body = {
        "depth": draw(st.lists(st.integers(1, 4), min_size=stages, max_size=stages)),
        "width": column(widths, stages),
        "stride": strides(stages),
        "group_width": column(group_width, stages),
        "fit_groups": fits,
        "expansion": column(st.sampled_from([0.25, 0.5, 1.0, 2.25]), stages),
        "expansion_of": column(st.sampled_from(["in", "out"]), stages),
        "spatial_convs": column(st.integers(1, 2), stages),
        "kernel": column(st.sampled_from([1, 3, 5]), stages),
    }
    stem = {
        "width": draw(st.lists(widths, min_size=convs, max_size=convs)),
        "stride": strides(convs),
        "kernel": column(st.sampled_from([1, 3, 7]), convs),
        "pool": pool,
    }
    return {
        "name": draw(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,9}", fullmatch=True)),
        "stem": stem | maybe(in_channels=st.integers(1, 16)),
        "stages": body | maybe(first_expansion=st.sampled_from([0.5, 1.0])),
        "attention": maybe(
            kind=st.sampled_from(["none", "se", "eca"]),
            ratio=st.floats(0.01, 2),
            position=st.sampled_from(["after", "inside"]),
        ),
        "block": maybe(
            alpha=st.floats(0.01, 10),
            skip_gain=st.sampled_from(["zeros", "ones", "none"]),
        ),
        "head": maybe(num_classes=st.integers(0, 2000), dropout=st.floats(0, 0.9))
        | draw(st.sampled_from([{}, {"width": 960}, {"width_mult": 1.5}, {"width_mult": 2.0}])),
        "regularization": maybe(
            stochastic_depth=st.floats(0, 0.99),
            stochastic_depth_schedule=st.sampled_from(["i/n", "i/(n-1)"]),
        ),
        "numerics": {"round_width": round_width},
        "norm": maybe(kind=st.sampled_from(["none", "batch"])),
        "resolution": draw(
            st.fixed_dictionaries({"train": st.just(32), "test": st.integers(32, 600)})
        ),
    }


def rounded(width: float, multiple: int, limit: float = 0.9) -> int:
    if multiple == 1:
        return max(int(width), 1)
    new = max(multiple, int(width + multiple / 2) // multiple * multiple)
    return new + multiple if new < limit * width else new


def parameters(spec: Spec) -> int:
    """Trainable parameters, added up from the shapes of the layers (not from the plan)."""
    stages, attention, multiple = spec.stages, spec.attention, spec.numerics.round_width
    normed = spec.norm.kind == "batch"

    def conv(inputs: int, outputs: int, kernel: int = 1, groups: int = 1) -> int:
        return outputs * (kernel**2 * inputs // groups) + (0 if normed else 2 * outputs)

    def attend(channels: int) -> int:
        if attention.kind == "se":
            hidden = rounded(channels * attention.ratio, multiple, limit=0)
            return 2 * channels * hidden + channels + hidden
        if attention.kind == "eca":
            size = int((math.log2(channels) + 1) / 2)
            return max(3, size + 1 - size % 2)
        return 0

    total, channels = 0, spec.stem.in_channels
    for i, (width, kernel) in enumerate(zip(spec.stem.width, spec.stem.kernel, strict=True)):
        last = i == len(spec.stem.width) - 1
        width = rounded(width, multiple) if last else width
        total += conv(channels, width, kernel) + (2 * width if normed and not last else 0)
        channels = width
    for s, depth in enumerate(stages.depth):
        width = rounded(stages.width[s], multiple)
        for i in range(depth):
            ratio = stages.expansion[s]
            if s == i == 0 and stages.first_expansion is not None:
                ratio = stages.first_expansion
            middle = rounded(
                (channels if stages.expansion_of[s] == "in" else width) * ratio, multiple
            )
            size = stages.group_width[s] or middle
            groups = middle // size
            middle = groups * size
            total += conv(channels, middle) + conv(middle, width)
            total += stages.spatial_convs[s] * conv(middle, middle, stages.kernel[s], groups)
            if channels != width or (i == 0 and stages.stride[s] > 1):
                total += conv(channels, width)
            total += attend(middle if attention.position == "inside" else width)
            total += spec.block.skip_gain != "none"
            total += 2 * (channels + middle * (1 + stages.spatial_convs[s])) if normed else 0
            channels = width
    if final := spec.head.width or spec.head.width_mult * stages.width[-1]:
        total += conv(channels, rounded(final, multiple))
        channels = rounded(final, multiple)
    total += 2 * channels if normed else 0
    classes = spec.head.num_classes
    return total + (channels * classes + classes if classes else 0)


@many(300)
@given(source=valid_specs())
def test_valid_specs_make_sound_plans(folder, source):
    compiled = judge(source)
    assert isinstance(compiled, Plan), str(compiled)
    spec = compiled.spec

    (folder / "valid.json").write_text(spec.model_dump_json(), encoding="utf-8")
    copies = [load_spec(folder / "valid.json"), Spec.model_validate_json(spec.model_dump_json())]
    assert all(copy == spec and hash(copy) == hash(spec) for copy in [*copies, load_spec(spec)])
    assert plan(copies[0]) == compiled

    assert compiled.params == parameters(spec)
    side = spec.resolution.test
    for stride in (*spec.stem.stride, *[2] * (spec.stem.pool == "max")):
        side = -(-side // stride)
    nominal, rates = spec.regularization.stochastic_depth, []
    for stride, blocks in zip(spec.stages.stride, compiled.stages(), strict=True):
        side = -(-side // stride)
        assert len({block.resolution for block in blocks} | {(side, side)}) == 1
        for block in blocks:
            assert block.mid_channels % block.groups == 0
            assert 0 < block.beta <= 1
            assert block.beta == pytest.approx(block.expected_variance**-0.5, rel=1e-12)
            assert block.macs > 0
            rates.append(block.drop_rate)
    assert rates == sorted(rates)
    assert 0 <= rates[0] <= rates[-1] <= nominal * (1 + 1e-15)
    assert compiled.feature_info[-1].channels == compiled.num_features
    assert compiled.macs() > 0
