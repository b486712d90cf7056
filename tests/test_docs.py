"""What the README and docs show works: every spec loads, every `nfflax` command line runs."""

import re
import shlex
from pathlib import Path
from typing import Any

import jax
import optax
import pytest
from flax import nnx
from golden_data import random_model

import nfflax
from nfflax.cli import main
from nfflax.spec.load import load_spec

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str) -> list[tuple[str, str]]:
    """(page, text) of every fenced block in a language."""
    fence = re.compile(rf"^```{language}\n(.*?)^```", re.DOTALL | re.MULTILINE)
    return [(page.name, text) for page in PAGES for text in fence.findall(page.read_text("utf-8"))]


COMMANDS = [
    line.partition("  #")[0]
    for _, text in blocks("bash")
    for line in text.splitlines()
    if line.startswith("nfflax ")
]


@pytest.fixture
def my_net(tmp_path, monkeypatch):
    """A folder with the spec that the pages call my_net.toml."""
    monkeypatch.chdir(tmp_path)
    tmp_path.joinpath("my_net.toml").write_text(blocks("toml")[0][1])


@pytest.mark.parametrize(("page", "text"), blocks("toml"))
def test_specs_load(page, text, tmp_path):
    path = tmp_path / "my_net.toml"
    path.write_text(text)
    assert load_spec(path).name == "my_net"


@pytest.mark.usefixtures("my_net")
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run(command, capsys):
    assert main(shlex.split(command)[1:]) == 0
    assert capsys.readouterr().out


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text("utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_optimiser_page_runs():
    """Its Python, from top to bottom, as one program."""
    names: dict[str, Any] = {"jax": jax, "nnx": nnx, "optax": optax, "nfflax": nfflax}
    names["model"] = random_model("nfnet_micro")
    page = (ROOT / "docs" / "optimizer.md").read_text("utf-8")
    for text in re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE):
        exec(text, names)
    assert names["recipe"].groups
