"""examples/ablation: every row is what it claims to be, and one command makes the table."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

import nfflax
from nfflax.insight.report_compare import differences
from nfflax.spec.base import Document, by_key
from nfflax.spec.load import parse_override

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "ablation"
BATCH_NORM = "attention.gain block.alpha block.skip_gain numerics.gamma norm.kind".split()
NETWORK = "model.spec."
# What each row changes in the row that it extends.
CHANGES: dict[str, set[str]] = {
    "alpha_1": {f"{NETWORK}block.alpha"},
    "batch_norm": {NETWORK + key for key in BATCH_NORM},
    "default_width": {f"{NETWORK}stages.width"},
    "large_rate": {"schedule.learning_rate"},
    "large_rate_batch_norm": {NETWORK + key for key in BATCH_NORM},
    "large_rate_no_clipping": {"agc.clipping"},
    "narrow_groups": {f"{NETWORK}stages.group_width"},
    "no_attention": {f"{NETWORK}attention.kind"},
    "no_clipping": {"agc.clipping"},
    "no_cutmix": {"augment.cutmix"},
    "no_skip_gain": {f"{NETWORK}block.skip_gain"},
    "no_stochastic_depth": {f"{NETWORK}regularization.stochastic_depth"},
    "one_conv": {f"{NETWORK}stages.spatial_convs"},
    "relu": {f"{NETWORK}numerics.activation"},
    "silu": {f"{NETWORK}numerics.activation"},
    "strided_shortcut": {f"{NETWORK}stages.shortcut"},
}
# About the smallest run there is: two steps of one block.
TINY = {
    "train.steps": 2,
    "schedule.warmup_steps": 1,
    "augment.mixup": 0,
    "augment.cutmix": "false",
    "ema.decay": 0,
    "model.set.stem.width": [8],
    "model.set.stages": "{depth=[1],width=[16],stride=[2],group_width=[8],spatial_convs=[1]}",
    "model.set.attention.kind": "none",
    "model.set.head.width_mult": 1,
    "model.set.resolution.train": 8,
    "model.set.resolution.test": 8,
}


@pytest.fixture(scope="module")
def ablation():
    """The program, as a module."""
    found = importlib.util.spec_from_file_location("ablation", FOLDER / "run.py")
    assert found
    assert found.loader
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rows(ablation):
    return {row.name: row for row in ablation.read([*ablation.shipped()])}


def changed(a: Document, b: Document) -> set[str]:
    return {difference.key for difference in differences([a, b])}


def test_rows_change_what_they_claim(rows):
    assert set(rows) == {"base", *CHANGES}
    assert rows["base"].line == ("base",)
    for name, keys in CHANGES.items():
        parent = rows[rows[name].line[-2]]
        assert changed(parent.run, rows[name].run) == keys
        assert rows[name].run.summary != parent.run.summary


def test_rows_make_the_changes_of_the_papers(rows):
    def values(spec: nfflax.Spec, keys: set[str]) -> dict[str, Any]:
        """A column, of more stages there than here, as the set of its values."""
        found = {key: value for key, value in by_key(spec.model_dump()).items() if key in keys}
        return {k: set(v) if isinstance(v, tuple) else v for k, v in found.items()}

    pairs = {
        "batch_norm": ("nfnet_f0", "nfnet_f0_bn"),
        "one_conv": ("nfnet_f0", "se_resnext_d_f0_width"),
    }
    for name, (a, b) in pairs.items():
        specs = nfflax.load_spec(a), nfflax.load_spec(b)
        keys = changed(*specs)
        assert CHANGES[name] == {NETWORK + key for key in keys}
        assert values(rows[name].run.spec, keys) == values(specs[1], keys)


def test_figures_of_papers_belong_to_rows(ablation, rows):
    assert set(ablation.PAPERS) <= set(rows)


def test_rows_stand_below_what_they_extend(ablation):
    names = ["relu", "large_rate_no_clipping", "large_rate", "base"]
    assert [row.name for row in ablation.read(names)] == ["base", *names[2:0:-1], "relu"]


def test_a_table_is_made_once(ablation, tmp_path, capsys, monkeypatch):
    pytest.importorskip("sklearn")
    own = tmp_path / "own.toml"
    own.write_text(f'extends = "{FOLDER}/rows/base.toml"\nsummary = "mine"\n', "utf-8")
    out = tmp_path / "table.json"
    command = [str(own), "--seeds", "1", "--work", str(tmp_path / "work"), "--json", str(out)]
    assignments = [f"{key}={value}" for key, value in TINY.items()]
    for assignment in assignments:
        command += ["--set", assignment]

    assert ablation.main(command) == 0
    said = capsys.readouterr().out
    [row] = json.loads(out.read_text("utf-8"))
    assert (row["row"], row["extends"], row["summary"]) == ("own", ["base"], "mine")
    assert (
        row["params"]
        == nfflax.plan(nfflax.load_run(own, dict(map(parse_override, assignments))).spec).params
    )
    assert row["mean"] == row["top1"][0]
    assert 0 < row["mean"] < 100
    assert row["spread"] == row["diverged"] == 0
    assert row["step_ms"] > 0
    assert f"{row['mean']:.1f} ± 0.0" in said

    monkeypatch.setattr(ablation, "make_program", None)  # so that training fails
    own.write_text(own.read_text("utf-8").replace("mine", "the same"), "utf-8")
    assert ablation.main(command) == 0
    assert json.loads(out.read_text("utf-8")) == [row | {"summary": "the same"}]
    with pytest.raises(TypeError):
        ablation.main([*command, "--set", "agc.clipping=0.5"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[agc]\nclippin = 0\n", ("agc.clippin", "did you mean: agc.clipping")),
        ("[model.set]\nblock.alpha = -1\n", ("model.set.block.alpha = -1", "greater than 0")),
    ],
)
def test_a_broken_row_is_refused(ablation, tmp_path, capsys, text, said):
    row = tmp_path / "broken.toml"
    row.write_text(f'extends = "{FOLDER}/rows/base.toml"\n{text}', "utf-8")
    assert ablation.main([str(row), "--work", str(tmp_path / "work")]) == 2
    error = capsys.readouterr().err
    assert all(part in error for part in ("broken.toml", *said))
    assert not (tmp_path / "work").exists()


def test_an_unknown_row_is_refused(ablation, capsys):
    assert ablation.main(["no_cliping"]) == 2
    assert "did you mean: no_clipping" in capsys.readouterr().err
    assert ablation.main(["relu", "relu"]) == 2
    assert "two rows" in capsys.readouterr().err
