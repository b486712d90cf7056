"""Layers of a document merged into one, validated, and every mistake traced to its file."""

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any, Generic, TypeVar

from pydantic import ValidationError

from nfflax.spec.base import Document, Table, Title, other_units
from nfflax.spec.check import Finding, uneven_columns
from nfflax.spec.errors import NOT_GIVEN, Problem, SpecError, nearest
from nfflax.spec.explain import explain, keys_of, suggestion, tables_of
from nfflax.spec.files import NOT_FOR_DOCUMENTS, Layer, Origin

D = TypeVar("D", bound=Document)
OVERRIDE = Origin("override")
_MAX_FINDINGS = 1000  # mistakes of one table that are explained; nobody reads so many


class Merged(Generic[D]):
    """Layers merged into one dict, and for every key the layer that it came from."""

    def __init__(self, root: type[D], layers: Iterable[Layer]) -> None:
        self.root = root
        self.data: dict[Any, Any] = {}
        self.origin: dict[str, Origin] = {}  # by dotted key
        self.source = OVERRIDE  # the layer that is loaded, which the others are bases of
        self.problems: list[Problem] = []
        for layer in layers:
            self._add(layer)

    def _add(self, layer: Layer) -> None:
        """Tables merge; anything else, lists included, replaces what stood there."""
        self.source = layer.origin
        if "summary" not in layer.data:
            self.data.pop("summary", None)  # a summary tells of one variant, not of its heirs
        for key, value in layer.data.items():
            self.put(layer.origin, key, value)

    def override(self, key: str, value: Any, origin: Origin = OVERRIDE) -> None:
        """Set one dotted key. Spec files are two levels deep: a top-level key, or table.key."""
        table, dot, name = key.partition(".") if isinstance(key, str) else (key, "", "")
        if key in NOT_FOR_DOCUMENTS:
            message = "can only stand in a file"
            self.problems.append(origin.problem(key, message, value))
        elif not dot:
            self.put(origin, key, value)
        elif table in tables_of(self.root) and "." not in name:
            self.put(origin, table, {name: value})
        else:
            near = nearest(key, keys_of(self.root)) or suggestion(self.root, table, name)
            allowed = f"one of {', '.join(tables_of(self.root))}, a dot, and a key of that table"
            self.problems += [self._placed_at(origin, key, "no such key", value, allowed, near)]

    def put(self, origin: Origin, key: Any, value: Any) -> None:
        """Set a top-level key, or merge a table into what stands there."""
        if isinstance(value, Table):
            value = value.model_dump()
        if isinstance(value, Mapping):
            table = tables_of(self.root).get(key, Table)
            value = dict(value) | other_units(table, value)
            self.origin |= {f"{key}.{k}": origin for k in value}
            below = self.data.get(key)
            value = (below if isinstance(below, dict) else {}) | value
        self.data[key] = value
        self.origin[str(key)] = origin

    def validate(self) -> D:
        """The document, or one SpecError with all that is wrong."""
        tables = tables_of(self.root)
        valid: dict[str, Any] = {}
        top_level = {k: v for k, v in self.data.items() if k not in tables}
        for name, model in {"": Title, **tables}.items():
            raw = self.data.get(name, {}) if name else top_level
            try:
                valid[name] = model.model_validate(raw)
            except (ValidationError, RecursionError) as error:
                self._add_errors(error, model, name, raw)
        self.problems += map(self._placed, self.root.problems_between(valid))
        if self.problems:
            raise SpecError(self.problems)
        return self.root.model_validate(dict(valid.pop("")) | valid)

    def _add_errors(self, error: Exception, model: type[Table], name: str, raw: Any) -> None:
        found = [Finding(name, "is nested too deeply")]
        if isinstance(error, ValidationError):
            found = list(islice(explain(error, self.root, name, raw), _MAX_FINDINGS))
        if isinstance(raw, Mapping):
            blamed = {finding.key for finding in found}
            uneven = uneven_columns(name, raw, model.columns)
            found += [finding for finding in uneven if finding.key not in blamed]
        self.problems += map(self._placed, found)

    def _placed(self, finding: Finding) -> Problem:
        """The problem that a finding is, once it is known which file the key stands in."""
        key, message, value, allowed, near, against = finding
        places = [key, key.split("[")[0]] + [key.split(".")[0]] * (value is not NOT_GIVEN)
        origin = next((self.origin[p] for p in places if p in self.origin), self.source)
        other = self.origin.get(against, origin)
        if other.file != origin.file:
            message += f" ({other.prefix}{against} is set in {other.file})"
        return self._placed_at(origin, key, message, value, allowed, near)

    def _placed_at(
        self, origin: Origin, key: str, message: str, value: Any, allowed: str, near: str
    ) -> Problem:
        if near in keys_of(self.root):
            near = f"{origin.prefix}{near}"
        return origin.problem(key, message, value, allowed, near)
