"""What the tests of the spec compiler share: reference numbers, spec files, and their mistakes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nfflax.spec.errors import Problem, SpecError
from nfflax.spec.load import load_spec

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a file of the test's own folder; anything but text and bytes becomes JSON."""

    def write_file(name: str, content: Any) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(content, str | bytes):
            content = json.dumps(content)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write_file


@pytest.fixture
def mistakes() -> Callable[..., tuple[Problem, ...]]:
    """All problems that loading a source raises; that it does raise is part of the test."""

    def load_and_fail(source: Any, overrides: Any = None) -> tuple[Problem, ...]:
        with pytest.raises(SpecError) as caught:
            load_spec(source, overrides)
        text = str(caught.value)
        for problem in caught.value.problems:
            assert problem.message
            assert problem.key or problem.file
        assert text.isprintable() or set(filter(lambda c: not c.isprintable(), text)) == {"\n"}
        return caught.value.problems

    return load_and_fail


@pytest.fixture
def mistake(mistakes: Callable[..., tuple[Problem, ...]]) -> Callable[..., Problem]:
    """The only problem that loading a source raises."""

    def load_and_fail_once(source: Any, overrides: Any = None) -> Problem:
        problems = mistakes(source, overrides)
        assert len(problems) == 1, [str(p) for p in problems]
        return problems[0]

    return load_and_fail_once
