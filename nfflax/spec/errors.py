"""What is wrong with a spec, said so that it can be mended: all problems, each with its place."""

import difflib
import enum
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

SHOWN_PROBLEMS = 50  # a message lists no more of them
_SHOWN_VALUE = 80  # characters of an offending value that a message repeats
_SHOWN_NAME = 200  # characters of a key or file name
_ENCODER = json.JSONEncoder(default=str, ensure_ascii=False)


class _NotGiven(enum.Enum):
    NOT_GIVEN = enum.auto()  # an enum member stays itself when an error is pickled


NOT_GIVEN = _NotGiven.NOT_GIVEN  # no value to show, as against the value null


@dataclass(frozen=True)
class Problem:
    """One mistake: where it stands, what is there, what may be there, the nearest right name."""

    file: str
    key: str
    message: str
    value: Any = NOT_GIVEN
    allowed: str = ""
    nearest: str = ""

    def __str__(self) -> str:
        place = _shortened(self.file, _SHOWN_NAME)
        if self.key:
            place += f": {_shortened(self.key, _SHOWN_NAME)}"
        if self.value is not NOT_GIVEN:
            place += f"{' =' if self.key else ':'} {_shown(self.value)}"
        lines = [place, f"    {self.message}"]
        if self.nearest:
            lines.append(f"    did you mean: {self.nearest}")
        if self.allowed:
            lines.append(f"    allowed: {self.allowed}")
        return "\n".join(map(_printable, lines))


class SpecError(ValueError):
    """A spec that cannot be used. `problems` lists every mistake found in it."""

    subject: ClassVar[str] = "spec"
    """What the problems are in, as the first line of the message calls it."""

    def __init__(self, problems: Sequence[Problem]):
        self.problems = tuple(problems)
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        lines = [f"{count} in the {self.subject}", *map(str, self.problems[:SHOWN_PROBLEMS])]
        if len(self.problems) > SHOWN_PROBLEMS:
            lines.append(f"... and {len(self.problems) - SHOWN_PROBLEMS} more problems")
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[Any, ...]:  # else copies would be built from the message
        return type(self), (self.problems,)


def nearest(word: str, names: Iterable[str]) -> str:
    """The most similar of `names`, or nothing when none is close. Case and hyphens do not count."""
    names = list(names)
    plain = {_plain(name): name for name in reversed(names)}  # of two alike, the first
    matches = difflib.get_close_matches(_plain(word[:_SHOWN_NAME]), plain, n=1, cutoff=0.6)
    return plain[matches[0]] if matches else ""


def _plain(name: str) -> str:
    return name.lower().replace("-", "_").replace(" ", "_")


def _shown(value: Any) -> str:
    text = ""
    try:
        for piece in _ENCODER.iterencode(value):  # lazy: a value may be megabytes long
            text += piece
            if len(text) > _SHOWN_VALUE:
                break
    except (ValueError, TypeError):  # a number of 5000 digits, a key that is no text
        text = "(a value that cannot be shown)"
    return _shortened(text, _SHOWN_VALUE)


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _printable(text: str) -> str:
    """The text without what confuses a terminal: control characters, lone surrogates."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
