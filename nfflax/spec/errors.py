"""What is wrong with a spec, said so that it can be mended: all problems at once, each with its place."""

import difflib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

_SHOWN_VALUE = 80  # characters of an offending value that a message repeats
NOT_GIVEN = object()  # no value to show, as against the value null


@dataclass(frozen=True)
class Problem:
    """One mistake: where it stands, what is there, what may be there, and the nearest right name."""

    file: str
    key: str
    message: str
    value: Any = NOT_GIVEN
    allowed: str = ""
    nearest: str = ""

    def __str__(self) -> str:
        shown = self.key or "(whole file)"
        if self.value is not NOT_GIVEN:
            shown += f" = {_short(self.value)}"
        lines = [f"{self.file}: {shown}", f"    {self.message}"]
        if self.nearest:
            lines.append(f"    did you mean: {self.nearest}")
        if self.allowed:
            lines.append(f"    allowed: {self.allowed}")
        return "\n".join(lines)


class SpecError(ValueError):
    """A spec that cannot be used. `problems` lists every mistake found in it."""

    def __init__(self, problems: Sequence[Problem]):
        self.problems = tuple(problems)
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__(f"{count} in the spec\n" + "\n".join(map(str, self.problems)))


def nearest(word: str, names: Iterable[str]) -> str:
    """The most similar of `names`, or nothing when none is close."""
    matches = difflib.get_close_matches(word[:200], list(names), n=1, cutoff=0.5)
    return matches[0] if matches else ""


def _short(value: Any) -> str:
    try:
        text = json.dumps(value, default=str, ensure_ascii=False)
    except (ValueError, RecursionError, TypeError):
        text = f"({type(value).__name__})"
    return text if len(text) <= _SHOWN_VALUE else text[: _SHOWN_VALUE - 1] + "…"
