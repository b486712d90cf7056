"""The `nfflax` command itself: errors are readable, endings quiet, imports few."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import nfflax


def test_a_spec_error_is_readable(run):
    ran = run("spec", "show", "nfnet_f00")
    assert (ran.code, ran.out) == (2, "")
    with pytest.raises(nfflax.SpecError) as caught:
        nfflax.load_spec("nfnet_f00")
    assert ran.err == f"error: {caught.value}\n"
    assert "did you mean: nfnet_f0" in ran.err


def test_a_spec_error_is_red(run_in_colour):
    assert run_in_colour("spec", "show", "nfnet_f00").err.startswith(
        "\x1b[1;31merror\x1b[0m: 1 problem"
    )


def test_errors_as_json(run, write_bad):
    ran = run("spec", "show", write_bad("bad.json"), "--json")
    assert (ran.code, ran.err) == (2, "")
    problems = {problem["key"]: problem for problem in json.loads(ran.out)["problems"]}
    assert set(problems) == {"stages.dept", "block.alpha"}
    assert problems["block.alpha"]["value"] == -1
    assert problems["block.alpha"]["file"].endswith("bad.json")
    assert problems["stages.dept"]["nearest"].endswith("depth")
    for problem in problems.values():
        assert set(problem) == {"file", "key", "message", "value", "allowed", "nearest"}
    ran = run("spec", "diff", "nowhere.toml", "nfnet_f0", "--json")
    (problem,) = json.loads(ran.out)["problems"]
    assert "value" not in problem
    assert problem["message"].startswith("cannot be read")


@pytest.mark.parametrize(
    ("value", "shown"), [("nan", "nan"), ("2020-01-01", "2020-01-01"), ("null", "null")]
)
def test_values_that_json_lacks_are_text(run, value: str, shown: str):
    ran = run("spec", "show", "nfnet_f0", "--json", "--set", f"block.alpha={value}")
    (problem,) = json.loads(ran.out, parse_constant=pytest.fail)["problems"]
    assert (problem["key"], problem["value"]) == ("block.alpha", shown)


@pytest.mark.parametrize("words", ["foo", "=1", ""])
def test_a_malformed_change(run, words: str):
    ran = run("spec", "show", "nfnet_f0", "--set", words)
    assert ran.code == 2
    assert "is no assignment" in ran.err
    assert "allowed: key.path=value" in ran.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["spce"], "did you mean spec?"),
        (["spec", "shwo", "nfnet_f0"], "did you mean show?"),
        (["spec", "qqqq"], "is none of list, show, check, diff, schema\n"),
        (["spec", "show"], "required: NAME|FILE"),
        (["spec", "show", "nfnet_f0", "--output-stride", "12"], "12 is none of 8, 16, 32"),
        (["spec", "show", "nfnet_f0", "--resolution", "0"], "write 256, or 256x320"),
        (["spec", "show", "nfnet_f0", "--resolution", "9x"], "write 256, or 256x320"),
        (["spec", "show", "nfnet_f0", "--resol", "9"], "unrecognized arguments"),
    ],
)
def test_wrong_usage(run, words: list[str], said: str):
    ran = run(*words)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("usage: nfflax")
    assert said in ran.err


def test_a_command_without_arguments_shows_its_help(run):
    for words in ([], ["spec"]):
        bare = run(*words)
        assert (bare.code, bare.out) == (2, "")
        assert bare.err == run(*words, "--help").out


def test_version(run):
    assert run("--version") == (0, f"nfflax {nfflax.__version__}\n", "")


def test_ctrl_c_ends_quietly(run, monkeypatch: pytest.MonkeyPatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nfflax.spec.plan.plan", interrupted)
    assert run("spec", "list") == (130, "", "")


def python(*words: str, **environment: str) -> subprocess.Popen[str]:
    """A process of its own, with this nfflax."""
    root = str(Path(nfflax.__file__).parents[1])
    return subprocess.Popen(
        [sys.executable, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": root, "PYTHONUNBUFFERED": ""} | environment,
    )


@pytest.mark.parametrize("words", [["spec", "list"], ["--help"]])
def test_a_reader_that_leaves_early_is_no_error(words: list[str]):
    with python("-m", "nfflax", *words) as process:
        assert process.stdout
        process.stdout.close()  # long before the first line is printed
        process.stdout = None
        assert process.communicate(timeout=60) == (None, "")
        assert process.returncode == 1


def test_an_ascii_terminal_gets_what_it_can_show():
    process = python("-m", "nfflax", "spec", "show", "nfnet_tiny", PYTHONIOENCODING="ascii")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert out.startswith("nfnet_tiny")


def test_help_imports_nothing_heavy_and_spec_never_imports_jax():
    code = """
import contextlib, io, sys
from nfflax.cli import main

def modules_after(*words):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        assert main(words) == 0, words
    return set(sys.modules)

for words in (["--help"], ["spec", "--help"], ["spec", "show", "--help"], ["--version"]):
    assert not {"jax", "flax", "numpy", "pydantic", "rich"} & modules_after(*words), words
for words in (
    ["spec", "list"],
    ["spec", "show", "nfnet_f0"],
    ["spec", "show", "nfnet_f0", "--json"],
    ["spec", "check", "nfnet_f0"],
    ["spec", "diff", "nfnet_f0", "nfnet_f1"],
    ["spec", "schema"],
):
    assert not {"jax", "flax", "numpy"} & modules_after(*words), words
print("light")
"""
    process = python("-c", code)
    assert process.communicate(timeout=60) == ("light\n", "")
