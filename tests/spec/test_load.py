"""From names, files and dicts to specs: inheritance, overrides, both formats, every preset."""

import json
import tomllib
from collections import defaultdict
from pathlib import Path
from types import MappingProxyType

import pytest

from nfflax.spec.errors import SpecError
from nfflax.spec.load import load_spec, parse_override
from nfflax.spec.presets import family_paths, list_specs, preset_paths
from nfflax.spec.schema import Spec, Stages, Stem, file_schema

PRESETS = list_specs()

SMALL = {
    "name": "small",
    "stem": {"width": [8, 16], "stride": [2, 1]},
    "stages": {"depth": [1, 2], "width": [32, 64], "group_width": 16},
    "attention": {"kind": "se"},
    "resolution": {"train": 32, "test": 48},
}
SMALL_TOML = """\
name = "small"
stem = { width = [8, 16], stride = [2, 1] }

[stages]
depth       = [1, 2]
width       = [32, 64]
group_width = 16      # a scalar holds for both stages

[attention]
kind = "se"

[resolution]
train = 32
test  = 48
"""


def body(spec: Spec) -> dict:
    """All that makes the network: the spec without its name and summary."""
    return spec.model_dump(exclude={"name", "summary"})


# Formats


def test_toml_json_and_dict_say_the_same(write):
    toml, as_json = write("a.toml", SMALL_TOML), write("b.json", SMALL)
    specs = [load_spec(toml), load_spec(as_json), load_spec(SMALL), load_spec(str(toml))]
    assert all(spec == specs[0] and hash(spec) == hash(specs[0]) for spec in specs)


def test_a_spec_loads_as_itself():
    spec = load_spec("nfnet_f1")
    assert load_spec(spec) == spec


@pytest.mark.parametrize("name", ["small.TOML", "small.toml"])
def test_the_extension_may_be_in_capitals(write, name):
    assert load_spec(write(name, SMALL_TOML)).name == "small"


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_editors_bom_and_line_ends_do_not_matter(write, bom, newline):
    content = bom + SMALL_TOML.replace("\n", newline).encode()
    assert load_spec(write("small.toml", content)) == load_spec(SMALL)


def test_schema_key_is_for_editors_only(write):
    path = write("a.json", SMALL | {"$schema": "https://example.org/spec.schema.json"})
    assert load_spec(path) == load_spec(SMALL)


def test_mappings_and_tables_serve_as_dicts():
    frozen = MappingProxyType(SMALL | {"stages": MappingProxyType(SMALL["stages"])})
    assert load_spec(frozen) == load_spec(SMALL)
    tables = SMALL | {"stem": Stem(**SMALL["stem"]), "stages": Stages(**SMALL["stages"])}
    assert load_spec(tables) == load_spec(SMALL)
    deeper = load_spec(tables, {"stages.depth": [3, 3]})
    assert deeper.stages.depth == (3, 3)


def test_loading_leaves_dicts_alone():
    source, overrides = json.loads(json.dumps(SMALL)), {"stages": {"depth": 1}, "stages.width": 64}
    load_spec(source, overrides)
    assert source == SMALL
    assert overrides == {"stages": {"depth": 1}, "stages.width": 64}


# Names and summaries


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("my_net-2.toml", "my_net-2"),
        ("my net.toml", "my_net"),
        ("v1.5.json", "v1.5"),
        ("_draft.toml", "draft"),
        ("настройка.toml", "spec"),
        (".toml", "spec"),
        ("a" * 150 + ".toml", "a" * 100),
    ],
)
def test_a_spec_is_called_what_its_file_is_called(write, file, name):
    content = {"extends": "nfnet_f0"} if file.endswith("json") else 'extends = "nfnet_f0"'
    assert load_spec(write(file, content)).name == name


def test_a_name_in_the_file_wins(write):
    assert load_spec(write("a.toml", 'name = "b"\nextends = "nfnet_f0"')).name == "b"


def test_summaries_are_not_inherited(write):
    write("base.toml", 'extends = "nfnet_f0"\nsummary = "The base."')
    heir = write("heir.toml", 'extends = "base.toml"')
    assert load_spec("nfnet_f0").summary
    assert load_spec(heir).summary == ""
    assert load_spec({"extends": "nfnet_f0"}).summary == ""
    assert load_spec("nfnet_f0", {"head.num_classes": 10}).summary == load_spec("nfnet_f0").summary


# Inheritance


@pytest.mark.parametrize("base", ["nfnet_f0", "nf_regnet_b0", "timm_eca_nfnet_l1"])
def test_extends_a_preset(write, base):
    heir = load_spec(write("heir.toml", f'extends = "{base}"\n[head]\nnum_classes = 10'))
    assert body(heir) == body(load_spec(base, {"head.num_classes": 10}))


def test_extends_a_family(write):
    path = write(
        "heir.toml",
        'extends = "nfnet"\n[stages]\ndepth = [1, 2, 6, 3]\n[head]\ndropout = 0.2\n'
        "[resolution]\ntrain = 192\ntest = 256\n",
    )
    assert body(load_spec(path)) == body(load_spec("nfnet_f0"))


def test_paths_are_relative_to_the_file_that_names_them(write, monkeypatch, tmp_path):
    write("shared/base.toml", 'extends = "nfnet_f0"\n[head]\nnum_classes = 7')
    write("shared/middle.json", {"extends": "base.toml", "block": {"alpha": 0.3}})
    path = write("nets/deep/heir.toml", 'extends = "../../shared/middle.json"')
    monkeypatch.chdir(tmp_path / "nets")
    for source in (path, "deep/heir.toml", Path("deep/heir.toml")):
        spec = load_spec(source)
        assert (spec.head.num_classes, spec.block.alpha, spec.name) == (7, 0.3, "heir")


def test_a_dict_extends_relative_to_the_working_directory(write, monkeypatch, tmp_path):
    path = write("base.toml", SMALL_TOML)
    monkeypatch.chdir(tmp_path)
    assert body(load_spec({"extends": "base.toml"})) == body(load_spec(SMALL))
    assert body(load_spec({"extends": path})) == body(load_spec(SMALL))


def test_a_file_named_like_a_preset_does_not_hide_it(write, monkeypatch, tmp_path):
    write("nfnet_f0.toml", SMALL_TOML)
    monkeypatch.chdir(tmp_path)
    assert len(load_spec("nfnet_f0").stages.depth) == 4
    assert len(load_spec("./nfnet_f0.toml").stages.depth) == 2
    assert len(load_spec("nfnet_f0.toml").stages.depth) == 2


def test_tables_merge_and_lists_replace(write):
    write("base.json", SMALL)
    heir = load_spec(write("heir.json", {"extends": "base.json", "stages": {"width": [64, 128]}}))
    assert heir.stages.width == (64, 128)
    assert heir.stages.depth == (1, 2)
    assert heir.stages.group_width == (16, 16)
    assert heir.stem == load_spec(SMALL).stem


def test_lists_do_not_merge_by_position(write):
    write("base.json", SMALL)
    one_stage = {"depth": [3], "width": [64]}
    heir = load_spec(write("heir.json", {"extends": "base.json", "stages": one_stage}))
    assert (heir.stages.depth, heir.stages.width) == ((3,), (64,))


def test_the_nearest_layer_wins(write):
    write("a.toml", SMALL_TOML + "[block]\nalpha = 0.1\nskip_gain = 'ones'\n")
    write("b.toml", 'extends = "a.toml"\n[block]\nalpha = 0.2\n')
    spec = load_spec(write("c.toml", 'extends = "b.toml"\n'), {"block.last_gain": "zeros"})
    assert (spec.block.alpha, spec.block.skip_gain, spec.block.last_gain) == (0.2, "ones", "zeros")


def chain(write, length: int) -> Path:
    write("0.json", SMALL)
    for i in range(1, length):
        write(f"{i}.json", {"extends": f"{i - 1}.json"})
    return Path(write("last.json", {"extends": f"{length - 1}.json"})) if length else Path()


def test_sixteen_files_may_extend_one_another(write, mistake):
    assert body(load_spec(chain(write, 15))) == body(load_spec(SMALL))
    problem = mistake(chain(write, 16))
    assert problem.key == "extends"
    assert "more than 16 files" in problem.message


@pytest.mark.parametrize("others", [[], ["b"], ["b", "c", "d"]])
def test_circles_are_named(write, mistake, tmp_path, others):
    names = ["a", *others]
    for name, following in zip(names, [*others, "a"], strict=True):
        write(f"{name}.toml", f'extends = "./{following}.toml"')
    problem = mistake(tmp_path / "a.toml")
    assert problem.file == str(tmp_path / f"{names[-1]}.toml")
    assert problem.key == "extends"
    circle = " -> ".join(str(tmp_path / f"{name}.toml") for name in [*names, "a"])
    assert circle in problem.message


# Scalars for all


def test_a_scalar_holds_for_every_entry():
    spec = load_spec(SMALL)
    assert spec.stem.kernel == (3, 3)
    assert spec.stages.group_width == (16, 16)
    assert spec.stages.expansion_of == ("out", "out")
    assert spec.stages.stride == (2, 2)


def test_scalars_alone_make_one_stage():
    spec = load_spec({"name": "one", "stem": {"width": 16}, "stages": {"depth": 3, "width": 256}})
    assert (spec.stages.depth, spec.stages.width, spec.stem.stride) == ((3,), (256,), (2,))


def test_a_scalar_spreads_over_an_inherited_length():
    assert load_spec("nfnet_f0", {"stages.depth": 2}).stages.depth == (2, 2, 2, 2)
    assert load_spec("nfnet_f0", {"stages.width": 512}).stages.width == (512,) * 4


def test_one_mean_for_all_channels():
    spec = load_spec("nfnet_f0", {"preprocess.mean": 0.5, "preprocess.std": [0.25, 0.5, 0.25]})
    assert (spec.preprocess.mean, spec.preprocess.std) == ((0.5,), (0.25, 0.5, 0.25))


# Overrides


def test_overrides_set_dotted_keys():
    overrides = {"stages.depth": [1, 1, 2, 1], "head.num_classes": 10, "name": "mine"}
    spec = load_spec("nfnet_f0", overrides)
    assert (spec.stages.depth, spec.head.num_classes, spec.name) == ((1, 1, 2, 1), 10, "mine")
    changed = body(spec)
    plain = body(load_spec("nfnet_f0"))
    assert {k for k in plain if plain[k] != changed[k]} == {"stages", "head"}


def test_an_overriding_table_merges_like_any_other():
    spec = load_spec("nfnet_f0", {"stages": {"depth": [1, 1, 1, 1]}, "stages.kernel": 5})
    assert spec.stages.depth == (1, 1, 1, 1)
    assert spec.stages.width == load_spec("nfnet_f0").stages.width
    assert spec.stages.kernel == (5, 5, 5, 5)


def test_later_overrides_win():
    spec = load_spec("nfnet_f0", {"head.dropout": 0.1, "head": {"dropout": 0.3}})
    assert spec.head.dropout == 0.3


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("stages.depth=[1, 2, 6, 3]", "stages.depth", [1, 2, 6, 3]),
        ("stages.depth=2", "stages.depth", 2),
        (" head.dropout = 0.25 ", "head.dropout", 0.25),
        ("regularization.scale_by_keep=true", "regularization.scale_by_keep", True),
        ('numerics.activation="silu"', "numerics.activation", "silu"),
        ("numerics.activation='silu'", "numerics.activation", "silu"),
        ("numerics.activation=silu", "numerics.activation", "silu"),
        ("stages.shortcut=strided 1x1", "stages.shortcut", "strided 1x1"),
        ("head={num_classes = 10, dropout = 0.5}", "head", {"num_classes": 10, "dropout": 0.5}),
        ("summary=", "summary", ""),
        ("summary=a = b", "summary", "a = b"),
        ("summary=1 # not a comment of a file", "summary", 1),
        ("name=1\nhead.dropout = 2", "name", "1\nhead.dropout = 2"),
        ("numerics.ws_eps=1e-5", "numerics.ws_eps", 1e-5),
    ],
)
def test_overrides_as_text(text, key, value):
    assert parse_override(text) == (key, value)
    assert type(parse_override(text)[1]) is type(value)


@pytest.mark.parametrize("text", ["", "=", "stages.depth", "=3", "  = 3"])
def test_text_that_assigns_nothing_is_refused(text):
    with pytest.raises(SpecError, match=r"key\.path=value"):
        parse_override(text)


# Presets


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_called_what_its_file_is_called(name):
    spec = load_spec(name)
    assert spec.name == name == tomllib.loads(preset_paths()[name].read_text())["name"]
    assert spec.summary


@pytest.mark.parametrize("name", family_paths())
def test_every_family_is_called_what_its_file_is_called(name):
    assert tomllib.loads(family_paths()[name].read_text())["name"] == name
    assert name not in PRESETS


@pytest.mark.parametrize("path", [*preset_paths().values(), *family_paths().values()], ids=str)
def test_every_shipped_file_cites_its_source(path):
    lines = path.read_text().splitlines()
    header = " ".join(line for line in lines[: lines.index("") if "" in lines else None])
    assert lines[0].startswith("# ")
    sources = ("arXiv:", "deepmind-research", "timm 1.", "No published result")
    assert any(source in header for source in sources)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_survives_the_round_trip(name, write):
    spec = load_spec(name)
    by_file = load_spec(write("copy.json", spec.model_dump_json()))
    by_dict = load_spec(spec.model_dump())
    by_pydantic = Spec.model_validate_json(spec.model_dump_json(indent=1))
    for copy in (by_file, by_dict, by_pydantic):
        assert copy == spec
        assert hash(copy) == hash(spec)
        assert copy.model_dump_json() == spec.model_dump_json()


def test_no_two_presets_are_the_same_network():
    twins = defaultdict(set)
    for name in PRESETS:
        twins[json.dumps(body(load_spec(name)), sort_keys=True)].add(name)
    found = [names for names in twins.values() if len(names) > 1]
    # The last row of the paper's ablation of the architecture is NFNet itself.
    expected = [{f"se_resnext_d_f{n}_width_conv", f"nfnet_f{n}"} for n in range(4)]
    assert sorted(map(sorted, found)) == sorted(map(sorted, expected))


def test_presets_are_listed_in_natural_order():
    assert list_specs("nf_resnet*") == [f"nf_resnet{n}" for n in (50, 101, 152, 200, 288, 600)]
    assert list_specs("nfnet_f[01]") == ["nfnet_f0", "nfnet_f1"]
    assert list_specs("no such preset") == []
    assert "nfnet" not in PRESETS


# The schema for editors


def test_the_schema_describes_every_key():
    schema = file_schema()
    assert json.loads(json.dumps(schema)) == schema
    tables = {"": schema} | schema["$defs"]
    for title, table in tables.items():
        assert table["additionalProperties"] is False, title
        assert "required" not in table, title
        for key, field in table["properties"].items():
            assert "description" in field or "$ref" in field or "default" in field, (title, key)
            assert "\n" not in field.get("description", ""), (title, key)
    assert {"extends", "$schema", *Spec.model_fields} == set(schema["properties"])


def test_the_schema_lets_scalars_stand_for_columns():
    depth = file_schema()["$defs"]["Stages"]["properties"]["depth"]
    scalar, column = depth["anyOf"]
    assert scalar == {"maximum": 1000, "minimum": 1, "type": "integer"}
    assert column["items"] == scalar
    assert column["type"] == "array"
