"""From a preset name, a file or a dict to a Spec: read, inherit, override, validate, explain."""

import json
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from nfflax.spec.check import Finding, problems_between, uneven_columns
from nfflax.spec.errors import Problem, SpecError, nearest
from nfflax.spec.explain import explain
from nfflax.spec.presets import family_paths, preset_paths
from nfflax.spec.schema import Spec, Table, Title

Source = str | os.PathLike[str] | Mapping[str, Any] | Spec

_MAX_BYTES = 1 << 20  # a spec is a page of text; anything larger is another kind of file
_MAX_CHAIN = 16  # files that may extend one another
_NOT_FOR_NETWORKS = ("$schema", "extends")  # keys of a file that no Spec keeps
_TABLES = {
    name: field.annotation
    for name, field in Spec.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Table)
}


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
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError, ValueError):
        return key.strip(), value.strip()


def _layers(source: Source) -> list[tuple[str, Mapping[str, Any]]]:
    """The source and all that it extends, the most general first."""
    if isinstance(source, Spec):
        return [("spec", source.model_dump())]
    layers: list[tuple[str, Mapping[str, Any]]] = []
    chain: list[str] = []
    reference: Any = source
    folder = Path()
    while True:
        if isinstance(reference, Mapping):
            label, layer = "spec", reference
        else:
            path = _locate(reference, folder, chain)
            label, folder = _display(path), path.parent
            if label in chain or len(chain) == _MAX_CHAIN:
                circle = " -> ".join([*chain, label])
                message = f"the files extend each other in a circle: {circle}"
                if label not in chain:
                    message = f"more than {_MAX_CHAIN} files extend one another: {circle}"
                raise SpecError([Problem(chain[-1], "extends", message, str(reference))])
            layer = _read(path, label)
            if not chain:  # a variant is called what its file is called, if it does not say
                layer = {"name": re.sub(r"[^A-Za-z0-9._+-]", "_", path.stem)} | dict(layer)
        chain.append(label)
        layers.insert(0, (label, {k: v for k, v in layer.items() if k not in _NOT_FOR_NETWORKS}))
        if "extends" not in layer:
            return layers
        reference = layer["extends"]
        if not isinstance(reference, str):
            allowed = "the name of a preset or family, or a path"
            raise SpecError([Problem(label, "extends", "is not a name", reference, allowed)])


def _locate(reference: str | os.PathLike[str], folder: Path, chain: list[str]) -> Path:
    """The file that a name or path means; paths are relative to the file that names them."""
    text = os.fspath(reference)
    if not isinstance(text, str):
        raise SpecError([Problem("spec", "", "is no name or path", repr(text))])
    is_path = not isinstance(reference, str) or text.endswith((".toml", ".json")) or "/" in text
    if is_path or os.sep in text:
        return folder / text
    known = preset_paths() | (family_paths() if chain else {})
    if text in known:
        return known[text]
    where = (chain[-1], "extends") if chain else ("spec", "")
    message = "no preset has this name; `nfflax spec list` shows them"
    if text in family_paths():
        message = "is a family base, not a network: a spec file can extend it"
    elif Path(text).is_file():
        message = f"no preset has this name; to read the file, write ./{text}"
    allowed = "a preset name, or a path that ends in .toml or .json"
    raise SpecError([Problem(*where, message, text, allowed, nearest(text, known))])


def _display(path: Path) -> str:
    presets = preset_paths() | family_paths()
    return f"preset {path.stem}" if presets.get(path.stem) == path else os.path.normpath(path)


def _read(path: Path, label: str) -> Mapping[str, Any]:
    try:
        with open(path, "rb") as file:
            raw = file.read(_MAX_BYTES + 1)
        if len(raw) > _MAX_BYTES:
            raise ValueError(f"the file is larger than {_MAX_BYTES} bytes: this is no spec")
        text = raw.decode("utf-8-sig")
        data = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        message = f"cannot be read: {error.strerror or error}"
        raise SpecError([Problem(label, "", message)]) from None
    except UnicodeDecodeError as error:
        message = f"is not UTF-8 text (byte {error.start}): {error.reason}"
        raise SpecError([Problem(label, "", message)]) from None
    except RecursionError:
        raise SpecError([Problem(label, "", "is nested too deeply")]) from None
    except ValueError as error:  # syntax errors of both formats, and what Python refuses to parse
        raise SpecError([Problem(label, "", f"is not valid {path.suffix[1:]}: {error}")]) from None
    if not isinstance(data, dict):
        raise SpecError([Problem(label, "", "must be a table (an object) at the top", data)])
    return data


class _Merged:
    """Layers merged into one dict, and for every key the layer that it came from."""

    def __init__(self) -> None:
        self.data: dict[str, Any] = {}
        self.origin: dict[tuple[str, ...], str] = {}
        self.problems: list[Problem] = []

    def add(self, label: str, layer: Mapping[str, Any]) -> None:
        """Tables merge; anything else, lists included, replaces what stood there."""
        if "summary" not in layer:
            self.data.pop("summary", None)  # a summary tells of one variant, not of its heirs
        for key, value in layer.items():
            below = self.data.get(key)
            if isinstance(value, Mapping) and isinstance(below, dict):
                value = below | dict(value)
            elif isinstance(value, Mapping):
                value = dict(value)
            self.data[key] = value
            self.origin[(str(key),)] = label
            if isinstance(layer[key], Mapping):
                self.origin |= {(str(key), str(k)): label for k in layer[key]}

    def override(self, key: str, value: Any) -> None:
        """Set one dotted key. Spec files are two levels deep: a top-level key, or table.key."""
        parts = str(key).split(".")
        if len(parts) == 1:
            self.data[key] = value
        elif len(parts) == 2 and isinstance(self.data.setdefault(parts[0], {}), dict):
            self.data[parts[0]][parts[1]] = value
        else:
            self.problems.append(Problem("override", key, "no such key", value, "table.key"))
            return
        self.origin[tuple(parts)] = "override"

    def validate(self) -> Spec:
        """The Spec, or one SpecError with all that is wrong."""
        titles = Title.model_fields
        valid: dict[str, Any] = {}
        top_level = {k: v for k, v in self.data.items() if k in titles or k not in _TABLES}
        for name, model in {"": Title, **_TABLES}.items():
            raw = self.data.get(name, {}) if name else top_level
            try:
                valid[name] = model.model_validate(raw)
            except (ValidationError, RecursionError) as error:
                self._add_errors(error, model, name, raw)
        for key, *rest in problems_between(valid):
            self.problems.append(Problem(self._origin(key), key, *rest))
        if self.problems:
            raise SpecError(self.problems)
        return Spec.model_validate(dict(valid.pop("")) | valid)

    def _add_errors(self, error: Exception, model: type[Table], name: str, raw: Any) -> None:
        found = [Finding(name, "is nested too deeply")]
        if isinstance(error, ValidationError):
            found = list(explain(error, model, name, raw))
        if isinstance(raw, Mapping):
            found += uneven_columns(name, raw, model.columns)
        self.problems += [Problem(self._origin(key), key, *rest) for key, *rest in found]

    def _origin(self, key: str) -> str:
        parts = tuple(key.split("[")[0].split("."))
        for length in range(len(parts), 0, -1):
            if parts[:length] in self.origin:
                return self.origin[parts[:length]]
        return next(reversed(self.origin.values()), "spec")
