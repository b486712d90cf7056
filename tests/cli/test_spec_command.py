"""`nfflax spec` prints what the library computes, for people and for programs."""

import json
import re

from nfflax.spec.load import load_spec
from nfflax.spec.plan import plan
from nfflax.spec.presets import list_specs, preset_root
from nfflax.spec.schema import file_schema


def test_list_shows_every_preset_in_order_with_its_costs(run):
    ran = run("spec", "list")
    lines = ran.out.splitlines()
    assert ran.code == 0
    assert [line.split()[0] for line in lines[2:] if line] == list_specs()
    assert re.split(r"\s{2,}", lines[0]) == ["name", "params", "MACs", "at", "summary"]
    f0 = next(line for line in lines if line.startswith("nfnet_f0 "))
    assert re.split(r"\s+", f0, maxsplit=4) == (
        ["nfnet_f0", "71.5M", "12.38G", "256", "NFNet-F0, arXiv:2102.06171 table 1"]
    )
    assert max(map(len, lines)) <= 110
    assert lines[lines.index(f0) - 1] == ""  # families stand apart
    assert "" not in lines[lines.index(f0) : lines.index(f0) + 20]


def test_list_takes_a_pattern_or_part_of_a_name(run):
    names = [entry["name"] for entry in json.loads(run("spec", "list", "nf_reg*", "--json").out)]
    assert names == [f"nf_regnet_b{i}" for i in range(9)]
    names = [entry["name"] for entry in json.loads(run("spec", "list", "_tiny", "--json").out)]
    assert names == ["nfnet_tiny"]


def test_list_as_json_is_exact(run):
    listed = json.loads(run("spec", "list", "--json").out)
    assert [entry["name"] for entry in listed] == list_specs()
    for entry in listed:
        network = plan(entry["name"])
        assert entry == {
            "name": network.spec.name,
            "summary": network.spec.summary,
            "params": network.params,
            "macs": network.macs(),
            "resolution": network.spec.resolution.test,
        }


def test_a_list_of_nothing_is_an_error(run):
    ran = run("spec", "list", "nfnet_f00")
    assert (ran.code, ran.out) == (2, "")
    assert "no preset matches" in ran.err
    assert "did you mean: nfnet_f0\n" in ran.err


def test_show_prints_the_table_of_the_plan(run):
    ran = run("spec", "show", "nfnet_f0")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out == plan("nfnet_f0").table()
    assert "\x1b" not in ran.out
    assert max(map(len, ran.out.splitlines())) <= 110


def test_show_in_colour_says_the_same(run_in_colour):
    ran = run_in_colour("spec", "show", "nfnet_tiny")
    assert "\x1b[1;36mnfnet_tiny\x1b[0m" in ran.out
    bare = re.sub(r"\x1b\[[0-9;]*m", "", ran.out).splitlines()
    assert [line.rstrip() for line in bare] == plan("nfnet_tiny").table().splitlines()


def test_show_takes_changes_and_sizes(run):
    changes = ("--set", "stages.depth=[1, 1, 2, 1]", "--set", "numerics.activation=silu")
    ran = run("spec", "show", "nfnet_f0", *changes, "--resolution", "192x256")
    overrides = {"stages.depth": [1, 1, 2, 1], "numerics.activation": "silu"}
    assert ran.out == plan(load_spec("nfnet_f0", overrides), resolution=(192, 256)).table()
    ran = run("spec", "show", "nfnet_f0", "--output-stride", "16", "--resolution", "320")
    assert ran.out == plan("nfnet_f0", resolution=320, output_stride=16).table()


def test_show_every_block(run):
    rows = run("spec", "show", "nfnet_f0", "--blocks").out.splitlines()
    assert [row.split()[0] for row in rows if re.match(r" +\d\.\d ", row)] == (
        ["1.1", "2.1", "2.2", "2.3", "2.4", "2.5", "3.1", "3.2"]
    )


def test_show_reads_files(run, write):
    path = write("mine.json", extends="nfnet_f0", head={"num_classes": 10})
    ran = run("spec", "show", path)
    assert ran.out == plan(path).table()
    assert ran.out.startswith("mine\n")


def test_show_as_json_is_the_plan_and_the_resolved_spec(run):
    data = json.loads(
        run("spec", "show", "nf_regnet_b2", "--json", "--set", "stages.width=[8,16,32,64]").out
    )
    spec = load_spec("nf_regnet_b2", {"stages.width": [8, 16, 32, 64]})
    assert load_spec(data.pop("spec")) == spec
    assert data == json.loads(json.dumps(plan(spec).to_dict()))
    assert (data["name"], data["params"]) == ("nf_regnet_b2", plan(spec).params)
    assert data["macs"] == plan(spec).macs()
    assert len(data["blocks"]) == sum(spec.stages.depth)


def test_check_says_ok_for_each_good_file(run):
    paths = [preset_root() / "models" / f"nfnet_f{i}.toml" for i in range(3)]
    ran = run("spec", "check", *paths)
    assert (ran.code, ran.err) == (0, "")
    lines = ran.out.splitlines()
    assert len(lines) == 3
    for line, path in zip(lines, paths, strict=True):
        assert line.startswith("ok")
        assert path.name in ran.out
    assert "71.5M params" in ran.out
    assert "35.54G MACs at 320" in ran.out


def test_check_finds_every_problem_of_every_file(run, write, write_bad):
    bad, worse = write_bad("bad.json"), write("worse.json", extends="nfnet_f9")
    ran = run("spec", "check", bad, write("good.json", extends="nfnet_f0"), worse, "nowhere.toml")
    assert ran.code == 2
    assert ran.out.startswith("ok")
    assert ran.err.startswith("error: 4 problems in the spec\n")
    for place in (
        f"{bad}: stages.dept = [1, 2, 6, 3]\n    no such key\n    did you mean: ",
        f"{bad}: block.alpha = -1\n",
        f'{worse}: extends = "nfnet_f9"\n',
        "nowhere.toml\n    cannot be read: No such file or directory\n",
    ):
        assert place in ran.err


def test_check_tells_a_shared_mistake_once(run, write, write_bad):
    write_bad("base.json")
    heirs = [write(f"{name}.json", extends="./base.json") for name in "ab"]
    ran = run("spec", "check", *heirs)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("error: 2 problems")


def test_diff_shows_the_keys_that_differ_and_both_costs(run):
    ran = run("spec", "diff", "nfnet_f0", "nfnet_f1")
    assert ran.code == 0
    rows = [re.split(r"\s{2,}", line) for line in ran.out.splitlines()]
    assert rows[0] == ["key", "nfnet_f0", "nfnet_f1", "ratio"]
    assert rows[2:] == [
        ["stages.depth", "[1, 2, 6, 3]", "[2, 4, 12, 6]"],
        ["head.dropout", "0.2", "0.3"],
        ["resolution.train", "192", "224"],
        ["resolution.test", "256", "320"],
        [""],
        ["params", "71.5M", "132.6M", "1.86"],
        ["MACs", "12.38G", "35.54G", "2.87"],
        ["at", "256", "320"],
    ]


def test_diff_as_json_is_exact(run):
    data = json.loads(run("spec", "diff", "nfnet_f0", "timm_dm_nfnet_f0", "--json").out)
    f0, timm = plan("nfnet_f0"), plan("timm_dm_nfnet_f0")
    assert (data["a"]["params"], data["b"]["params"]) == (f0.params, timm.params)
    assert (data["a"]["macs"], data["b"]["macs"]) == (f0.macs(), timm.macs())
    assert data["ratio"] == {"params": timm.params / f0.params, "macs": timm.macs() / f0.macs()}
    assert data["differences"]["numerics.ws_eps"] == {"a": 1e-4, "b": 1e-5}
    for key, values in data["differences"].items():
        table, field = key.split(".")
        for network, side in ((f0, "a"), (timm, "b")):
            value = getattr(getattr(network.spec, table), field)
            assert values[side] == (list(value) if isinstance(value, tuple) else value)


def test_a_network_does_not_differ_from_itself(run):
    data = json.loads(run("spec", "diff", "nfnet_f0", "nfnet_f0", "--json").out)
    assert data["differences"] == {}
    assert data["ratio"] == {"params": 1, "macs": 1}


def test_the_shipped_schema_is_the_generated_one(run):
    ran = run("spec", "schema")
    assert json.loads(ran.out) == file_schema()
    shipped = (preset_root() / "schema.json").read_text()
    assert shipped == ran.out, "nfflax spec schema > specs/schema.json"
