"""Spec files on disk: from a name or path, through all that it extends, to plain dicts."""

import json
import os
import re
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from nfflax.spec.base import Document
from nfflax.spec.errors import Problem, SpecError, nearest
from nfflax.spec.presets import preset_paths, shipped

NOT_FOR_DOCUMENTS = ("$schema", "extends")  # keys of a file that no resolved document keeps
_MAX_BYTES = 1 << 16  # a spec is a page of text; anything larger is another kind of file
_MAX_DOTS = 250  # in one line; tomllib's time grows with the square of a dotted key's length
_MAX_CHAIN = 16  # files that may extend one another
_FORMATS = {".toml": "TOML", ".json": "JSON"}


class Origin(NamedTuple):
    """Where a key was said."""

    file: str
    folder: Path = Path()
    """What paths are relative to there."""
    prefix: str = ""
    """What the key is called there, less its own name: a run says a network's below `model`."""

    def problem(self, key: str, message: str, *rest: Any) -> Problem:
        """A problem with a key that was said here."""
        return Problem(self.file, f"{self.prefix}{key}", message, *rest)


class Layer(NamedTuple):
    """What one file, or one dict, says."""

    origin: Origin
    data: Mapping[Any, Any]


def layers(root: type[Document], source: Any, at: Origin, key: str = "") -> list[Layer]:
    """The source and all that it extends, the most general first. `at`, `key`: who names it."""
    found: list[Layer] = []
    chain: list[str] = []
    reference, origin = source, at
    while True:
        if not chain and isinstance(reference, root):
            layer = reference.model_dump()
        elif not chain and isinstance(reference, Mapping):
            layer = reference
        else:
            path = _locate(root, reference, origin, key, is_parent=bool(chain))
            label = _label(root, path)
            if label in chain or len(chain) == _MAX_CHAIN:
                circle = " -> ".join([*chain, label])
                message = f"the files extend each other in a circle: {circle}"
                if label not in chain:
                    message = f"more than {_MAX_CHAIN} files extend one another: {circle}"
                raise SpecError([origin.problem(key, message, str(reference))])
            try:
                layer = _read(path, label)
            except OSError as error:
                message = f"cannot be read: {error.strerror or error}"
                if not key:
                    raise SpecError([Problem(label, "", message)]) from None
                near = nearest(path.stem, _shipped(root))
                raise SpecError([origin.problem(key, message, reference, "", near)]) from None
            origin = Origin(label, path.parent)
            if not chain:  # a variant is called what its file is called, if it does not say
                layer = {"name": _name_of(path)} | dict(layer)
        chain.append(origin.file)
        data = {k: v for k, v in layer.items() if k not in NOT_FOR_DOCUMENTS}
        found.insert(0, Layer(origin, data))
        if "extends" not in layer:
            return found
        reference, key = layer["extends"], "extends"


def parse_toml(text: str) -> dict[str, Any]:
    """A TOML text as a dict. Raises ValueError, or RecursionError where it is nested too deeply."""
    for number, line in enumerate(text.split("\n"), 1):
        if (dots := line.count(".")) > _MAX_DOTS:
            raise ValueError(f"line {number} is no part of a spec: it has {dots} dots")
    return tomllib.loads(text)


def _locate(
    root: type[Document], reference: Any, origin: Origin, key: str, *, is_parent: bool
) -> Path:
    """The file that a name or path means; paths are relative to the file that names them."""
    bases = shipped(root.bases) if root.bases else {}
    text = os.fspath(reference) if isinstance(reference, str | os.PathLike) else None
    if not isinstance(text, str):
        allowed = f"the name of a preset{' or family' if bases and is_parent else ''}, or a path"
        raise SpecError([origin.problem(key, "is no name or path", reference, allowed)])
    is_path = not isinstance(reference, str) or "/" in text or os.sep in text
    if text.lower().endswith(tuple(_FORMATS)):
        return origin.folder / text
    if is_path:
        raise SpecError([origin.problem(key, "is not called .toml or .json", text)])
    known = _shipped(root) if is_parent else shipped(root.presets)
    if text in known:
        return known[text]
    message = "no preset has this name; `nfflax spec list` shows them"
    near = f"timm_{text}" if f"timm_{text}" in known else nearest(text, known)
    if text in bases:
        message, near = "is a family base, not a network: a spec file can extend it", ""
    if root.noun != "model":
        message = f"no {root.noun} preset has this name; there are {', '.join(known)}"
        if text in preset_paths():
            near = ""
            message = f"is a model, not a {root.noun}: a {root.noun} names it as model.spec"
    allowed = "a preset name, or a path that ends in .toml or .json"
    raise SpecError([origin.problem(key, message, text, allowed, near)])


def _shipped(root: type[Document]) -> dict[str, Path]:
    """Name and file of all that may be extended by its name."""
    return shipped(root.presets) | (shipped(root.bases) if root.bases else {})


def _label(root: type[Document], path: Path) -> str:
    """What messages call a file."""
    if _shipped(root).get(path.stem) != path:
        return os.path.normpath(path)
    return f"preset {path.stem}" if root.noun == "model" else f"{root.noun} preset {path.stem}"


def _name_of(path: Path) -> str:
    """The variant's name that a file name makes."""
    stem = re.sub(r"[^A-Za-z0-9._+-]", "_", path.name[: -len(".toml")])
    return stem.lstrip("._+-")[:100] or "spec"


def _read(path: Path, label: str) -> Mapping[str, Any]:
    """A file's content. An OSError is left to the caller, who knows which file named this one."""
    form = _FORMATS[path.name[-len(".toml") :].lower()]
    try:
        with open(path, "rb") as file:
            raw = file.read(_MAX_BYTES + 1)
    except ValueError as error:  # a null byte or a lone surrogate in the name
        raise OSError(str(error)) from None
    if len(raw) > _MAX_BYTES:
        message = f"is larger than {_MAX_BYTES} bytes: this is no spec"
        raise SpecError([Problem(label, "", message)])
    try:
        text = raw.decode("utf-8-sig")
        data = _parse_json(text, label) if form == "JSON" else parse_toml(text)
    except UnicodeDecodeError as error:
        message = f"is not UTF-8 text (byte {error.start}): {error.reason}"
        raise SpecError([Problem(label, "", message)]) from None
    except RecursionError:
        raise SpecError([Problem(label, "", "is nested too deeply")]) from None
    except SpecError:
        raise
    except ValueError as error:  # syntax errors of both formats, and what Python refuses to parse
        raise SpecError([Problem(label, "", f"is not valid {form}: {error}")]) from None
    if not isinstance(data, dict):
        raise SpecError([Problem(label, "", "must be a table (an object) at the top", data)])
    return data


class _Object(dict[str, Any]):
    """A JSON object, and the keys that stand in it more than once (an error, as in TOML)."""

    def __init__(self, pairs: list[tuple[str, Any]]):
        super().__init__(pairs)
        counts = Counter(key for key, _ in pairs)
        self.repeated = [key for key, count in counts.items() if count > 1]


def _parse_json(text: str, label: str) -> Any:
    data = json.loads(text, object_pairs_hook=_Object)
    if keys := list(_repeated(data, "")):
        raise SpecError([Problem(label, key, "stands there more than once") for key in keys])
    return data


def _repeated(value: Any, place: str) -> Iterator[str]:
    """Dotted keys that stand more than once in an object, at any depth."""
    if isinstance(value, _Object):
        prefix = f"{place}." if place else ""
        yield from (f"{prefix}{key}" for key in value.repeated)
        for key, below in value.items():
            yield from _repeated(below, f"{prefix}{key}")
    elif isinstance(value, list):
        for index, entry in enumerate(value):
            yield from _repeated(entry, f"{place}[{index}]")
