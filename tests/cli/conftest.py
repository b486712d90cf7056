"""What the tests of the command line share: running one, in black and white or in colour."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from nfflax.cli import main


class Ran(NamedTuple):
    """What a command line did."""

    code: int
    out: str
    err: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    """Run one command line in this process; its output goes where a pipe's would."""
    monkeypatch.setenv("COLUMNS", "110")
    monkeypatch.delenv("FORCE_COLOR", raising=False)

    def run_line(*words: str | Path) -> Ran:
        try:
            code = main([str(word) for word in words])
        except SystemExit as end:
            code = end.code
        assert isinstance(code, int)
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return Ran(code, out, err)

    return run_line


@pytest.fixture
def run_in_colour(run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    """The same as on a terminal with colours."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return run


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write a spec file as JSON."""

    def write_file(name: str, **content: Any) -> Path:
        path = tmp_path / name
        path.write_text(json.dumps(content))
        return path

    return write_file


@pytest.fixture
def write_bad(write: Callable[..., Path]) -> Callable[[str], Path]:
    """Write a spec file with two mistakes: stages.dept and block.alpha."""
    mistakes = {"stages": {"dept": [1, 2, 6, 3]}, "block": {"alpha": -1}}
    return lambda name: write(name, extends="nfnet_f0", **mistakes)
