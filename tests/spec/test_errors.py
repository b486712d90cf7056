"""Mistakes in specs: each one's file, key, value, what is allowed, and the nearest right name."""

import copy
import json
import os
import pickle
import time
from pathlib import Path

import pytest

from nfflax.spec.errors import NOT_GIVEN, Problem, SpecError, nearest
from nfflax.spec.load import load_spec, parse_override
from nfflax.spec.plan import plan
from nfflax.spec.schema import Spec

F0 = {"extends": "nfnet_f0"}
TABLES = "attention block head norm numerics preprocess regularization resolution stages stem"
HUGE = 10**5000


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


# One wrong key or value


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        # misspelt
        ("stages.depths", "stages.depth"),
        ("stages.groupwidth", "stages.group_width"),
        ("stages.Depth", "stages.depth"),
        ("attention.knid", "attention.kind"),
        ("head.num-classes", "head.num_classes"),
        ("stage.depth", "stages.depth"),
        ("normalisation.kind", "norm.kind"),
        ("resolutions", "resolution"),
        ("sumary", "summary"),
        # in the wrong table, or in none
        ("stages.dropout", "head.dropout"),
        ("dropout", "head.dropout"),
        ("block.activation", "numerics.activation"),
        ("depth", "stages.depth"),
        ("block.stochastic_depth", "regularization.stochastic_depth"),
        ("stages.kind", "stem.kind, attention.kind or norm.kind"),
        # under timm's name
        ("regularization.drop_path_rate", "regularization.stochastic_depth"),
        ("head.drop_rate", "head.dropout"),
        ("stages.bottle_ratio", "stages.expansion"),
        ("stages.group_size", "stages.group_width"),
        ("stages.channels", "stages.width"),
        ("stem.channels", "stem.width"),
        ("head.num_features", "head.width"),
        ("act_layer", "numerics.activation"),
        ("in_chans", "stem.in_channels"),
        ("attention.rd_ratio", "attention.ratio"),
        # nothing like it
        ("stages.zzz", ""),
        ("zzz", ""),
    ],
)
def test_unknown_keys(mistake, key, nearest):
    table, dot, name = key.partition(".")
    for source in ({table: {name: 3}} if dot else {key: 3},):
        problem = mistake(F0 | source)
        unknown_table = dot and table not in TABLES.split()
        assert problem.key == (table if unknown_table else key)
        assert problem.file == "spec"
        assert problem.message == "no such key"
        if not unknown_table:
            assert (problem.value, problem.nearest) == (3, nearest)
    problem = mistake("nfnet_f0", {key: 3})
    assert (problem.file, problem.key, problem.value) == ("override", key, 3)
    assert problem.nearest == nearest


def test_unknown_keys_list_the_known_ones(mistake):
    assert mistake(F0 | {"norm": {"kidn": "none"}}).allowed == "kind, momentum, eps"
    assert mistake(F0 | {"nrom": {}}).allowed.split(", ") == list(Spec.model_fields)


WHOLE = "must be a whole number"
NUMBER = "must be a number"


@pytest.mark.parametrize(
    ("key", "value", "message", "allowed", "near"),
    [
        # booleans, texts and fractions for numbers
        ("head.num_classes", True, WHOLE, "a whole number from 0 to 1000000", ""),
        ("head.num_classes", "10", WHOLE, "a whole number from 0 to 1000000", "10"),
        ("head.num_classes", 10.0, WHOLE, "a whole number from 0 to 1000000", "10"),
        ("head.num_classes", 10.5, WHOLE, "a whole number from 0 to 1000000", ""),
        ("head.num_classes", "ten", WHOLE, "a whole number from 0 to 1000000", ""),
        ("head.num_classes", [10], WHOLE, "a whole number from 0 to 1000000", ""),
        ("block.alpha", "0.2", NUMBER, "a number above 0 and up to 10", "0.2"),
        ("block.alpha", True, NUMBER, "a number above 0 and up to 10", ""),
        ("block.alpha", None, NUMBER, "a number above 0 and up to 10", ""),
        ("block.alpha", {}, NUMBER, "a number above 0 and up to 10", ""),
        # and the other way round
        ("name", 3, "must be text", "text of at most 100 characters", ""),
        ("summary", ["a"], "must be text", "text of at most 1000 characters", ""),
        ("numerics.activation", 1, "must be text", "text", ""),
        ("regularization.scale_by_keep", 1, "must be true or false", "true or false", ""),
        ("regularization.scale_by_keep", "true", "must be true or false", "true or false", "true"),
        # out of range
        ("block.alpha", 0, "must be greater than 0", "a number above 0 and up to 10", ""),
        ("head.dropout", 1, "must be less than 1", "a number from 0 to below 1", ""),
        ("head.dropout", -0.1, "must be at least 0", "a number from 0 to below 1", ""),
        ("numerics.round_width", 0, "must be at least 1", "a whole number from 1 to 1024", ""),
        ("resolution.test", 10**6, "must be at most 16384", "a whole number from 1 to 16384", ""),
        ("preprocess.crop_fraction", 1.5, "must be at most 1", "a number above 0 and up to 1", ""),
        # not a number at all
        ("block.alpha", float("nan"), "must be a finite number", "above 0 and up to 10", ""),
        ("block.alpha", float("inf"), "must be a finite number", "above 0 and up to 10", ""),
        ("head.num_classes", float("nan"), WHOLE, "a whole number from 0 to 1000000", ""),
        pytest.param("head.num_classes", HUGE, "must be at most 1000000", "", "", id="huge"),
        pytest.param("block.alpha", HUGE, NUMBER, "above 0 and up to 10", "", id="huge float"),
        # choices
        ("attention.kind", "sse", "is none of the allowed values", "", "se"),
        ("attention.kind", "SE", "is none of the allowed values", "", "se"),
        ("attention.kind", None, "is none of the allowed values", "", ""),
        ("head.pool", "mean", "is none of the allowed values", "", ""),
        ("stem.kind", "patch", "is none of the allowed values", "", ""),
        ("stages.shortcut", "avgpool", "is none of the allowed values", "", "avgpool+1x1"),
        ("numerics.activation", "ReLU", "no activation has this name", "relu, relu6", "relu"),
        ("numerics.activation", "swish", "no activation has this name", "relu, relu6", "silu"),
        ("numerics.activation", "Swish", "no activation has this name", "relu, relu6", "silu"),
        ("numerics.activation", "hardswish", "no activation has this name", "", "hard_swish"),
        ("numerics.activation", "glu", "no activation has this name", "", "gelu"),
        ("numerics.activation", "", "no activation has this name", "celu, elu", ""),
        # texts
        ("name", "", "letters, digits and . _ + - only", "text of at most 100 characters", ""),
        ("name", "my net", "letters, digits and . _ + - only", "", ""),
        ("name", "../x", "letters, digits and . _ + - only", "", ""),
        ("name", "n" * 101, "must have at most 100 characters", "", ""),
        ("name", "\ud800", "is not valid Unicode text", "", ""),
        # tables
        ("stages", 5, "must be a table", "depth, width", ""),
        ("stages", [{"depth": 1}], "must be a table", "depth, width", ""),
        ("norm", None, "must be a table", "kind, momentum, eps", ""),
        # one value, or one for each channel
        ("preprocess.std", 0, "must be greater than 0", "above 0; one for all channels", ""),
        ("preprocess.mean", "x", NUMBER, "a number; one for all channels, or one per channel", ""),
    ],
)
def test_values(mistake, key, value, message, allowed, near):
    table, dot, name = key.partition(".")
    problem = mistake(F0 | ({table: {name: value}} if dot else {key: value}))
    assert (problem.file, problem.key) == ("spec", key)
    assert problem.value is value
    assert problem.message.startswith(message)
    assert allowed in problem.allowed
    assert problem.nearest == near


@pytest.mark.parametrize(
    ("key", "value", "place", "message"),
    [
        ("stages.depth", [1, 2, "6", 3], "[2]", WHOLE),
        ("stages.depth", [1, 2, 6, True], "[3]", WHOLE),
        ("stages.depth", [0, 2, 6, 3], "[0]", "must be at least 1"),
        ("stages.depth", [1, 2, [6], 3], "[2]", WHOLE),
        ("stages.depth", "1, 2, 6, 3", "", WHOLE),
        ("stages.depth", {"0": 1}, "", WHOLE),
        ("stages.depth", 0, "", "must be at least 1"),
        ("stages.kernel", 4, "", "is none of the allowed values"),
        ("stages.kernel", [3, 3, 4, 3], "[2]", "is none of the allowed values"),
        ("stages.kernel", True, "", WHOLE),
        ("stages.kernel", 3.0, "", WHOLE),
        ("stages.kernel", "3", "", WHOLE),
        ("stages.spatial_convs", [1, True, 1, 1], "[1]", WHOLE),
        ("stages.spatial_convs", 3, "", "is none of the allowed values"),
        ("stages.stride", [1, 2, 9, 1], "[2]", "must be at most 8"),
        ("stages.group_width", -1, "", "must be at least 0"),
        ("stages.expansion", [0.5, 0.5, 0, 0.5], "[2]", "must be greater than 0"),
        ("stages.expansion_of", "input", "", "is none of the allowed values"),
        (
            "stages.expansion_of",
            ["out", "both", "in", "in"],
            "[1]",
            "is none of the allowed values",
        ),
        ("stem.width", [16, 32, 64, 10**6], "[3]", "must be at most 65536"),
        ("stem.width", 10**6, "", "must be at most 65536"),
        ("stages.width", None, "", WHOLE),
        ("stages.depth", nested(5000), "[0]", WHOLE),
    ],
)
def test_columns(mistakes, key, value, place, message):
    table, _, name = key.partition(".")
    problem = mistakes(F0 | {table: {name: value}})[0]
    assert (problem.file, problem.key) == ("spec", key + place)
    assert problem.message.startswith(message)
    assert problem.allowed.endswith("; one per entry, or one for all")
    assert problem.value is (value[int(place[1])] if place else value)


def test_a_wrong_scalar_is_one_problem_not_one_per_stage(mistake):
    assert mistake("nfnet_f0", {"stages.width": "wide"}).key == "stages.width"


# Rules that join several keys


def test_columns_of_unequal_length(mistakes):
    first, second = mistakes("nfnet_f0", {"stages.depth": [1, 2, 6]})
    assert (first.file, first.key) == ("preset nfnet", "stages.width")
    assert first.message == (
        "has 4 entries, but stages.depth has 3 (stages.depth is set in override)"
    )
    assert first.allowed == "3 entries, or one value for all"
    assert second.key == "stages.stride"
    problem = mistakes(F0 | {"stages": {"width": [1, 2, 3, 4, 5]}})[0]
    assert (problem.file, problem.key) == ("spec", "stages.width")
    assert (
        problem.message
        == "has 5 entries, but stages.depth has 4 (stages.depth is set in preset nfnet_f0)"
    )


def test_an_empty_column_is_the_only_one_blamed(mistake):
    problem = mistake(F0 | {"stages": {"depth": []}})
    assert (problem.key, problem.message) == ("stages.depth", "has too few entries")
    problem = mistake(F0 | {"stages": {"kernel": []}})
    assert problem.key == "stages.kernel"
    assert problem.message.startswith("has 0 entries, but stages.depth has 4")


def test_seventeen_stages_are_too_many(mistakes):
    problem = mistakes(F0 | {"stages": {"depth": [1] * 17}})[0]
    assert (problem.key, problem.message) == ("stages.depth", "has too many entries")
    assert problem.value == [1] * 17


def test_groups_that_do_not_fit(mistake):
    problem = mistake("nfnet_f0", {"stages.width": [256, 500, 1536, 1536]})
    assert (problem.file, problem.key) == ("preset nfnet", "stages.group_width[1]")
    assert problem.value == 128
    assert problem.message == (
        "does not divide the bottleneck of stage 1, 250 channels wide "
        "(stages.width is set in override)"
    )
    assert problem.allowed == ('a divisor of 250, 0 for one group, or stages.fit_groups = "down"')
    problem = mistake("nfnet_f0", {"stages.group_width": 256})
    assert problem.message.startswith("is wider than the bottleneck of stage 0, 128 channels wide")
    assert problem.allowed == "a divisor of 128, 0 for one group"


def test_blocks_that_expand_their_input_may_misfit_later(mistake):
    wide = {"stages.expansion_of": "in", "stages.width": [256, 520], "stages.stride": 2}
    stem = {"stem.width": [256], "stem.stride": 2, "stem.kernel": 3}
    assert load_spec("nfnet_f0", stem | wide | {"stages.depth": [2, 1]})
    problem = mistake("nfnet_f0", stem | wide | {"stages.depth": [2, 2]})
    assert problem.key == "stages.group_width[1]"
    assert "260 channels wide" in problem.message


def test_a_resolution_that_the_strides_use_up(mistakes):
    first, second = mistakes("nfnet_f0", {"resolution": {"train": 31, "test": 16}})
    assert (first.file, first.key, first.value) == ("override", "resolution.train", 31)
    assert first.message == "the network divides the resolution by 32: nothing is left of 31 pixels"
    assert first.allowed == "32 or more, or smaller strides"
    assert second.key == "resolution.test"
    assert load_spec("nfnet_f0", {"resolution": {"train": 32, "test": 32}})


def test_two_widths_for_the_final_convolution(mistake):
    problem = mistake("nfnet_f0", {"head.width": 960})
    assert (problem.file, problem.key, problem.value) == ("override", "head.width", 960)
    assert "head.width_mult = 2.0" in problem.message


# Where it stands


def test_required_keys_are_missed_in_the_file_that_is_loaded(write, mistakes, mistake):
    assert {p.key for p in mistakes({})} == {"name", "stem.width", "stages.depth", "stages.width"}
    problem = mistake(write("a.toml", 'extends = "nfnet"'))
    assert (problem.file, problem.key) == (str(write("a.toml", "")), "stages.depth")
    assert problem.message == "is required"
    assert problem.value is NOT_GIVEN
    assert problem.allowed.startswith("a whole number from 1 to 1000")
    assert mistake(write("b.toml", 'extends = "nfnet"'), {"head.dropout": 0.1}).file.endswith(
        "b.toml"
    )


def test_the_file_of_a_chain_that_is_to_blame(write, mistakes):
    base = write("base.toml", 'extends = "nfnet_f0"\n[block]\nalpha = "a"\n[head]\ndropout = 2\n')
    heir = write("heir.json", {"extends": "base.toml", "head": {"dropout": 3, "pol": 1}})
    found = {p.key: p.file for p in mistakes(heir, {"norm.eps": -1})}
    assert found == {
        "block.alpha": str(base),
        "head.dropout": str(heir),
        "head.pol": str(heir),
        "norm.eps": "override",
    }


def test_dotted_and_bracketed_keys_keep_their_file(write, mistakes):
    base = write("base.toml", 'extends = "nfnet_f0"\n"a.b" = 1\n"c[0]" = 1\n[stages]\n"d.e" = 1\n')
    heir = write("heir.toml", 'extends = "base.toml"\n[stages]\ndepth = [1, 1, 1, 1]\n')
    assert {p.key: p.file for p in mistakes(heir)} == dict.fromkeys(
        ["a.b", "c[0]", "stages.d.e"], str(base)
    )


def test_all_problems_come_at_once(write, mistakes):
    path = write(
        "bad.toml",
        """
        extends = "nfnet_f0"
        colour = "red"
        [stages]
        depth = [1, 2, "6", 3]
        wdith = 3
        [attention]
        kind = "sae"
        [numerics]
        activation = "swish"
        [resolution]
        test = 8
        """,
    )
    found = {p.key for p in mistakes(path)}
    # resolution.test cannot be judged before the stages are right
    assert found == {
        "colour",
        "stages.depth[2]",
        "stages.wdith",
        "attention.kind",
        "numerics.activation",
    }


@pytest.mark.parametrize(
    "key", ["stages.depth.0", "a.b.c", "name.first", ".", "..", "stages.", ".x"]
)
def test_overrides_of_keys_that_cannot_be(mistake, key):
    problem = mistake("nfnet_f0", {key: 3})
    assert (problem.file, problem.key, problem.value) == ("override", key, 3)


def test_extends_cannot_be_overridden(mistake):
    problem = mistake("nfnet_f0", {"extends": "nfnet_f1"})
    assert (problem.file, problem.key) == ("override", "extends")
    assert "file" in problem.message


# Names, paths and files


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("nfnet_f00", "nfnet_f0"),
        ("NFNet-F0", "nfnet_f0"),
        ("nfnet f1+", "nfnet_f1"),
        ("dm_nfnet_f0", "timm_dm_nfnet_f0"),
        ("nf_resnet_50", "nf_resnet50"),
        ("zzz", ""),
        ("", ""),
    ],
)
def test_unknown_presets(mistake, name, near):
    problem = mistake(name)
    assert problem.message == "no preset has this name; `nfflax spec list` shows them"
    assert problem.nearest == near
    assert problem.allowed == "a preset name, or a path that ends in .toml or .json"
    assert name in str(problem)
    heir = mistake({"extends": name})
    assert (heir.file, heir.key, heir.value, heir.nearest) == ("spec", "extends", name, near)


def test_a_family_is_no_network(mistake):
    problem = mistake("nfnet")
    assert problem.message == "is a family base, not a network: a spec file can extend it"


@pytest.mark.parametrize("reference", [5, None, True, b"nfnet_f0", ["nfnet_f0"], 1.5, object()])
def test_sources_of_the_wrong_type(mistake, reference):
    assert "is no name" in mistake(reference).message
    problem = mistake({"extends": reference})
    assert (problem.file, problem.key) == ("spec", "extends")
    assert problem.value is reference
    assert problem.allowed == "the name of a preset or family, or a path"


@pytest.mark.parametrize("content", [3, True, None, ["nfnet"], {"a": 1}])
def test_extends_of_the_wrong_type_in_files(write, mistake, content):
    path = write("a.json", {"extends": content})
    problem = mistake(path)
    assert (problem.file, problem.key, problem.value) == (str(path), "extends", content)


@pytest.mark.parametrize("name", ["gone.toml", "no/such/folder/a.json", "./gone.toml"])
def test_files_that_are_not_there(mistake, monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    problem = mistake(name)
    assert problem.file == os.path.normpath(name)
    assert problem.message == "cannot be read: No such file or directory"


def test_an_extended_file_that_is_not_there(write, mistake):
    path = write("heir.toml", 'extends = "nfnet_f0.toml"')
    problem = mistake(path)
    assert (problem.file, problem.key) == (str(path), "extends")
    assert problem.value == "nfnet_f0.toml"
    assert "No such file" in problem.message
    assert problem.nearest == "nfnet_f0"


@pytest.mark.parametrize(
    "name", ["a\0b.toml", "a/\0.json", "a" * 5000, "a" * 5000 + ".toml", "\ud800/"]
)
def test_impossible_paths(mistake, name):
    assert mistake(name).message
    assert mistake({"extends": name}).key == "extends"


@pytest.mark.parametrize("name", ["a.yaml", "a.py", "a.toml.bak", "toml", "a."])
def test_other_extensions(write, mistake, monkeypatch, tmp_path, name):
    write(name, 'extends = "nfnet_f0"')
    problem = mistake(tmp_path / name)
    assert (problem.file, problem.value) == ("spec", str(tmp_path / name))
    assert problem.message == "is not called .toml or .json"
    heir = mistake(write("heir.toml", f'extends = "./{name}"'))
    assert (heir.file, heir.key, heir.value) == (
        str(tmp_path / "heir.toml"),
        "extends",
        f"./{name}",
    )
    monkeypatch.chdir(tmp_path)
    assert "path that ends in .toml or .json" in mistake(name).allowed


@pytest.mark.parametrize("name", ["folder.toml", "folder.json"])
def test_folders(mistake, tmp_path, name):
    (tmp_path / name).mkdir()
    problem = mistake(tmp_path / name)
    assert problem.file == str(tmp_path / name)
    assert problem.message == "cannot be read: Is a directory"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read all")
def test_files_that_one_may_not_read(write, mistake):
    path = write("a.toml", "")
    path.chmod(0)
    assert mistake(path).message == "cannot be read: Permission denied"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "", "is not valid JSON: Expecting value: line 1 column 1"),
        ("a.json", '{\n "a": 1,\n "b" 2}', "line 3 column 6"),
        ("a.json", '{"a": 1} x', "is not valid JSON: Extra data: line 1 column 10"),
        ("a.toml", "a = 1\nb = \n", "is not valid TOML: Invalid value (at line 2, column 5)"),
        ("a.toml", "a = 1\na = 2\n", "Cannot overwrite a value (at line 2, column 6)"),
        ("a.toml", "[head]\n[head]\n", "is not valid TOML: Cannot declare ('head',) twice"),
        ("a.toml", "{}", "is not valid TOML: Invalid statement (at line 1, column 1)"),
        ("a.toml", b"a = '\xff'", "is not UTF-8 text (byte 5): invalid start byte"),
        ("a.json", '{"name": "ü"}'.encode("latin-1"), "is not UTF-8 text (byte 10)"),
        ("a.toml", 'name = "a"'.encode("utf-16"), "is not UTF-8 text (byte 0)"),
        ("a.toml", b"\x00", "is not valid TOML"),
        ("a.json", '{"a": ' + "9" * 5000 + "}", "is not valid JSON: Exceeds the limit"),
        ("a.toml", "a = " + "9" * 5000, "is not valid TOML: Exceeds the limit"),
        ("a.json", "[" * 30_000, "is nested too deeply"),
        ("a.json", '{"a": ' * 10_000, "is nested too deeply"),
        ("a.toml", "a = " + "[" * 30_000, "is nested too deeply"),
        ("a.toml", "a." * 20_000 + "a = 1", "line 1 is no part of a spec: it has 20000 dots"),
        ("a.json", "[" * 100_000, "is larger than 65536 bytes: this is no spec"),
        ("a.toml", "a = " + "[" * 100_000, "is larger than 65536 bytes: this is no spec"),
        ("a.toml", "#" * 2_000_000, "is larger than 65536 bytes: this is no spec"),
        ("a.json", "[]", "must be a table (an object) at the top"),
        ("a.json", "null", "must be a table (an object) at the top"),
        ("a.json", "3", "must be a table (an object) at the top"),
        ("a.json", '"nfnet_f0"', "must be a table (an object) at the top"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_unreadable_content(write, mistake, name, content, message):
    path = write(name, content.encode() if isinstance(content, str) else content)
    problem = mistake(path)
    assert (problem.file, problem.key) == (str(path), "")
    assert message in problem.message
    heir = mistake(write("heir.toml", f'extends = "{name}"'))
    assert (heir.file, heir.message) == (str(path), problem.message)


def test_an_empty_toml_file_lacks_what_is_required(write, mistakes):
    path = write("a.toml", "")
    found = {p.key: p.file for p in mistakes(path)}
    assert found == dict.fromkeys(["stem.width", "stages.depth", "stages.width"], str(path))


def test_repeated_json_keys(write, mistakes):
    path = write(
        "a.json",
        '{"extends": "nfnet_f0", "head": {"dropout": 0.1, "pool": "max", "dropout": 0.2},'
        ' "block": {}, "block": {"alpha": 1}, "block": {}}',
    )
    problems = mistakes(path)
    assert [(p.file, p.key) for p in problems] == [
        (str(path), "block"),
        (str(path), "head.dropout"),
    ]
    assert {p.message for p in problems} == {"stands there more than once"}


def test_null_and_special_numbers_in_json(write, mistakes):
    path = write(
        "a.json",
        '{"extends": "nfnet_f0", "name": null, "block": {"alpha": NaN}, "norm": null,'
        ' "head": {"dropout": Infinity, "width": 1e999}, "stages": {"first_expansion": null}}',
    )
    assert {p.key for p in mistakes(path)} == {
        *("name", "block.alpha", "norm", "head.dropout", "head.width")
    }


@pytest.mark.parametrize("key", [1, None, (1, 2), 1.5, b"name"])
def test_keys_that_are_no_text(mistake, key):
    problem = mistake(F0 | {key: 3})
    assert problem.message == "keys must be text"
    assert str(key) in problem.key
    problem = mistake(F0 | {"stages": {key: 3}})
    assert problem.message == "keys must be text"
    assert problem.key.startswith("stages.")
    assert mistake("nfnet_f0", {key: 3}).file == "override"


UNSHOWABLE = ["a\nb", "\x1b[31m", "a\u202eb", "k" * 10_000, " ", ""]


@pytest.mark.parametrize("key", ["\ud800", *UNSHOWABLE])
def test_json_keys_that_a_terminal_cannot_show(write, mistakes, key):
    path = write("a.json", {key: 3, "stem": {key: 3}, "extends": "nfnet_f0"})
    first, second = mistakes(path)
    assert {first.file, second.file} == {str(path)}
    assert max(len(str(first)), len(str(second))) < 1000


@pytest.mark.parametrize("key", UNSHOWABLE)
def test_toml_keys_that_a_terminal_cannot_show(write, mistake, key):
    path = write("a.toml", f'extends = "nfnet_f0"\n{json.dumps(key)} = 3\n')
    problem = mistake(path)
    assert (problem.file, problem.key, problem.value) == (str(path), key, 3)
    assert len(str(problem)) < 1000


def test_circular_and_bottomless_dicts(mistake):
    circle: dict = {}
    circle["stages"] = circle
    assert mistake(F0 | {"stages": circle}).key == "stages.stages"
    deep: dict = {}
    for _ in range(100_000):
        deep = {"stages": deep}
    assert mistake(F0 | deep).key == "stages.stages"


# What it costs, and what is shown


@pytest.mark.parametrize(
    "tables",
    [
        {"stages": {"depth": ["a"] * 200_000}},
        {"stages": {f"key{i}": 1 for i in range(20_000)}},
        {f"key{i}": 1 for i in range(20_000)},
        {"preprocess": {"mean": ["a"] * 50_000}},
        {"name": "n" * 10_000_000},
        {"head": {"num_classes": [10**4000] * 50_000}},
    ],
    ids=["entries", "keys", "tables", "channels", "text", "digits"],
)
def test_no_mistake_takes_long_to_explain(mistakes, tables):
    start = time.process_time()
    problems = mistakes(F0 | tables)
    assert time.process_time() - start < 2
    assert len(problems) <= 1001  # of one table, and that columns are uneven
    assert len(str(SpecError(problems))) < 50_000


def test_no_network_takes_long_to_plan():
    start = time.process_time()
    stages = {"depth": 1000, "width": [8] * 16, "stride": 1, "group_width": 0}
    assert len(plan(F0 | {"stages": stages}).blocks) == 16_000
    assert time.process_time() - start < 2


def test_long_lists_of_problems_are_cut_when_shown(mistakes):
    problems = mistakes(F0 | {f"key{i}": 1 for i in range(200)})
    assert len(problems) == 200
    text = str(SpecError(problems))
    assert text.startswith("200 problems in the spec\n")
    assert text.endswith("\n... and 150 more problems")


def test_errors_survive_copying_and_pickling():
    with pytest.raises(SpecError) as caught:
        load_spec({"stages": {"depths": [1]}})
    for twin in (pickle.loads(pickle.dumps(caught.value)), copy.deepcopy(caught.value)):
        assert str(twin) == str(caught.value)
        assert twin.problems == caught.value.problems
        assert twin.problems[0].value is NOT_GIVEN
    assert isinstance(caught.value, ValueError)


def test_how_a_problem_reads():
    problem = Problem("a.toml", "stages.depths", "no such key", [1, 2], "depth", "stages.depth")
    assert str(problem) == (
        "a.toml: stages.depths = [1, 2]\n"
        "    no such key\n"
        "    did you mean: stages.depth\n"
        "    allowed: depth"
    )
    assert str(Problem("a.toml", "", "is nested too deeply")) == "a.toml\n    is nested too deeply"
    assert str(Problem("a.toml", "", "no table", [1])) == "a.toml: [1]\n    no table"
    assert str(SpecError([problem])).startswith("1 problem in the spec\na.toml: stages.depths")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "null"),
        (True, "true"),
        ("ü\n\u202e", '"ü\\n\\u202e"'),
        ({"b": (1, 2.5), "a": None}, '{"b": [1, 2.5], "a": null}'),
        ({(1, 2): 3}, "(a value that cannot be shown)"),
        ("x" * 1000, '"' + "x" * 78 + "…"),
        pytest.param(HUGE, "(a value that cannot be shown)", id="huge"),
        pytest.param(nested(200_000), "[" * 79 + "…", id="nested"),
        (Path("a"), '"a"'),
        (float("nan"), "NaN"),
    ],
)
def test_how_a_value_reads(value, shown):
    assert str(Problem("f", "k", "m", value)).splitlines()[0] == f"f: k = {shown}"


def test_nearest_names():
    assert nearest("Group-Width", ["width", "group_width"]) == "group_width"
    assert nearest("", ["a"]) == nearest("a", []) == ""
    assert nearest("x" * 1_000_000, ["x"]) == ""


def test_a_spec_made_in_python_obeys_the_joint_rules():
    data = load_spec("nfnet_f0").model_dump()
    data["stages"]["width"] = (256, 500, 1536, 1536)
    with pytest.raises(ValueError, match=r"stages\.group_width\[1\]: does not divide"):
        Spec.model_validate(data)


def test_mistaken_assignments_name_themselves():
    with pytest.raises(SpecError) as caught:
        parse_override("stages.depth")
    assert str(caught.value) == (
        "1 problem in the spec\n--set: stages.depth\n"
        "    is no assignment\n    allowed: key.path=value"
    )
