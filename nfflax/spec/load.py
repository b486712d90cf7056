"""From a preset name, a file or a dict to a Spec: read, inherit, override, validate, explain."""

import json
import os
import re
import tomllib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from nfflax.spec.check import Finding, problems_between, uneven_columns
from nfflax.spec.errors import NOT_GIVEN, Problem, SpecError, nearest
from nfflax.spec.explain import KEYS, TABLES, explain, suggestion
from nfflax.spec.presets import family_paths, preset_paths
from nfflax.spec.schema import Spec, Table, Title

Source = str | os.PathLike[str] | Mapping[str, Any] | Spec

_MAX_BYTES = 1 << 16  # a spec is a page of text; anything larger is another kind of file
_MAX_DOTS = 250  # in one line; tomllib's time grows with the square of a dotted key's length
_MAX_CHAIN = 16  # files that may extend one another
_FORMATS = {".toml": "TOML", ".json": "JSON"}
_NOT_FOR_NETWORKS = ("$schema", "extends")  # keys of a file that no Spec keeps


def load_spec(source: Source, overrides: Mapping[str, Any] | None = None) -> Spec:
    """The resolved spec of a preset name, a .toml or .json path, a dict, or another Spec.

    `overrides` maps dotted keys to values: `{"stages.depth": [1, 1, 2, 1]}`. Raises SpecError with
    every problem at once.
    """
    merged = _Merged()
    for label, layer in _layers(source):
        merged.add(label, layer)
    for key, value in (overrides or {}).items():
        merged.override(key, value)
    return merged.validate()


def parse_override(text: str) -> tuple[str, Any]:
    """`key.path=value` as the command line gives it; the value is TOML, or else plain text."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise SpecError([Problem("--set", text, "is no assignment", allowed="key.path=value")])
    try:
        parsed = _parse_toml(f"value = {value}")
    except (RecursionError, ValueError):
        parsed = {}
    return key.strip(), parsed["value"] if parsed.keys() == {"value"} else value.strip()


def _layers(source: Source) -> list[tuple[str, Mapping[str, Any]]]:
    """The source and all that it extends, the most general first."""
    if isinstance(source, Spec):
        return [("spec", source.model_dump())]
    layers: list[tuple[str, Mapping[str, Any]]] = []
    chain: list[str] = []
    reference: Any = source
    folder = Path()
    while True:
        if isinstance(reference, Mapping) and not chain:
            label, layer = "spec", reference
        else:
            path = _locate(reference, folder, chain)
            label = _display(path)
            if label in chain or len(chain) == _MAX_CHAIN:
                circle = " -> ".join([*chain, label])
                message = f"the files extend each other in a circle: {circle}"
                if label not in chain:
                    message = f"more than {_MAX_CHAIN} files extend one another: {circle}"
                raise SpecError([Problem(chain[-1], "extends", message, str(reference))])
            try:
                layer = _read(path, label)
            except OSError as error:
                message = f"cannot be read: {error.strerror or error}"
                if not chain:
                    raise SpecError([Problem(label, "", message)]) from None
                near = nearest(path.stem, preset_paths() | family_paths())
                problem = Problem(chain[-1], "extends", message, reference, nearest=near)
                raise SpecError([problem]) from None
            folder = path.parent
            if not chain:  # a variant is called what its file is called, if it does not say
                layer = {"name": _name_of(path)} | dict(layer)
        chain.append(label)
        layers.insert(0, (label, {k: v for k, v in layer.items() if k not in _NOT_FOR_NETWORKS}))
        if "extends" not in layer:
            return layers
        reference = layer["extends"]


def _locate(reference: Any, folder: Path, chain: list[str]) -> Path:
    """The file that a name or path means; paths are relative to the file that names them."""
    where = (chain[-1], "extends") if chain else ("spec", "")
    text = os.fspath(reference) if isinstance(reference, str | os.PathLike) else None
    if not isinstance(text, str):
        allowed = "the name of a preset or family, or a path"
        raise SpecError([Problem(*where, "is no name or path", reference, allowed)])
    is_path = not isinstance(reference, str) or "/" in text or os.sep in text
    if text.lower().endswith(tuple(_FORMATS)):
        return folder / text
    if is_path:
        raise SpecError([Problem(*where, "is not called .toml or .json", text)])
    known = preset_paths() | (family_paths() if chain else {})
    if text in known:
        return known[text]
    message = "no preset has this name; `nfflax spec list` shows them"
    near = f"timm_{text}" if f"timm_{text}" in known else nearest(text, known)
    if text in family_paths():
        message, near = "is a family base, not a network: a spec file can extend it", ""
    allowed = "a preset name, or a path that ends in .toml or .json"
    raise SpecError([Problem(*where, message, text, allowed, near)])


def _name_of(path: Path) -> str:
    """The variant's name that a file name makes."""
    stem = re.sub(r"[^A-Za-z0-9._+-]", "_", path.name[: -len(".toml")])
    return stem.lstrip("._+-")[:100] or "spec"


def _display(path: Path) -> str:
    presets = preset_paths() | family_paths()
    return f"preset {path.stem}" if presets.get(path.stem) == path else os.path.normpath(path)


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
        data = _parse_json(text, label) if form == "JSON" else _parse_toml(text)
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


def _parse_toml(text: str) -> dict[str, Any]:
    for number, line in enumerate(text.split("\n"), 1):
        if (dots := line.count(".")) > _MAX_DOTS:
            raise ValueError(f"line {number} is no part of a spec: it has {dots} dots")
    return tomllib.loads(text)


class _Object(dict[str, Any]):
    """A JSON object, and the keys that stand in it more than once (an error, as in TOML)."""

    def __init__(self, pairs: list[tuple[str, Any]]):
        super().__init__(pairs)
        counts = Counter(key for key, _ in pairs)
        self.repeated = [key for key, count in counts.items() if count > 1]


def _parse_json(text: str, label: str) -> Any:
    data = json.loads(text, object_pairs_hook=_Object)
    if isinstance(data, _Object):
        places = {"": data} | {f"{k}.": v for k, v in data.items() if isinstance(v, _Object)}
        keys = [f"{place}{key}" for place, table in places.items() for key in table.repeated]
        if keys:
            raise SpecError([Problem(label, k, "stands there more than once") for k in keys])
    return data


class _Merged:
    """Layers merged into one dict, and for every key the layer that it came from."""

    def __init__(self) -> None:
        self.data: dict[Any, Any] = {}
        self.origin: dict[str, str] = {}  # by dotted key
        self.source = "spec"  # the layer that is loaded, which the others are bases of
        self.problems: list[Problem] = []

    def add(self, label: str, layer: Mapping[str, Any]) -> None:
        """Tables merge; anything else, lists included, replaces what stood there."""
        self.source = label
        if "summary" not in layer:
            self.data.pop("summary", None)  # a summary tells of one variant, not of its heirs
        for key, value in layer.items():
            self._put(label, key, value)

    def override(self, key: str, value: Any) -> None:
        """Set one dotted key. Spec files are two levels deep: a top-level key, or table.key."""
        table, dot, name = key.partition(".") if isinstance(key, str) else (key, "", "")
        if key in _NOT_FOR_NETWORKS:
            message = "can only stand in a file"
            self.problems.append(Problem("override", key, message, value))
        elif not dot:
            self._put("override", key, value)
        elif table in TABLES and "." not in name:
            self._put("override", table, {name: value})
        else:
            near = nearest(key, KEYS) or suggestion(table, name)
            allowed = f"one of {', '.join(TABLES)}, a dot, and a key of that table"
            self.problems.append(Problem("override", key, "no such key", value, allowed, near))

    def _put(self, label: str, key: Any, value: Any) -> None:
        if isinstance(value, Table):
            value = value.model_dump()
        if isinstance(value, Mapping):
            self.origin |= {f"{key}.{k}": label for k in value}
            below = self.data.get(key)
            value = (below if isinstance(below, dict) else {}) | dict(value)
        self.data[key] = value
        self.origin[str(key)] = label

    def validate(self) -> Spec:
        """The Spec, or one SpecError with all that is wrong."""
        titles = Title.model_fields
        valid: dict[str, Any] = {}
        top_level = {k: v for k, v in self.data.items() if k in titles or k not in TABLES}
        for name, model in {"": Title, **TABLES}.items():
            raw = self.data.get(name, {}) if name else top_level
            try:
                valid[name] = model.model_validate(raw)
            except (ValidationError, RecursionError) as error:
                self._add_errors(error, model, name, raw)
        self.problems += map(self._placed, problems_between(valid))
        if self.problems:
            raise SpecError(self.problems)
        return Spec.model_validate(dict(valid.pop("")) | valid)

    def _add_errors(self, error: Exception, model: type[Table], name: str, raw: Any) -> None:
        found = [Finding(name, "is nested too deeply")]
        if isinstance(error, ValidationError):
            found = list(explain(error, model, name, raw))
        if isinstance(raw, Mapping):
            blamed = {finding.key for finding in found}
            uneven = uneven_columns(name, raw, model.columns)
            found += [finding for finding in uneven if finding.key not in blamed]
        self.problems += map(self._placed, found)

    def _placed(self, finding: Finding) -> Problem:
        """The problem that a finding is, once it is known which file the key stands in."""
        key, message, value, allowed, near, against = finding
        places = [key, key.split("[")[0]] + [key.split(".")[0]] * (value is not NOT_GIVEN)
        file = next((self.origin[p] for p in places if p in self.origin), self.source)
        other = self.origin.get(against, file)
        if other != file:
            message += f" ({against} is set in {other})"
        return Problem(file, key, message, value, allowed, near)
