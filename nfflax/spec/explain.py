"""Pydantic's findings in the words of this project: key path, value, what is allowed, nearest name."""

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from nfflax.spec.check import Finding
from nfflax.spec.errors import NOT_GIVEN, nearest
from nfflax.spec.schema import Spec, Table, Title

_MESSAGES = {
    "extra_forbidden": "no such key",
    "missing": "is required",
    "model_type": "must be a table",
    "invalid_key": "keys must be text",
    "too_short": "has too few entries",
    "too_long": "has too many entries",
    "string_pattern_mismatch": "letters, digits and . _ + - only, a letter or digit first",
    "finite_number": "must be a finite number",
}


def explain(
    error: ValidationError, model: type[Table], table: str, raw: Any
) -> Iterator[Finding]:
    """One Finding per distinct mistake in the table called `table` ("" for the top level)."""
    prefix = f"{table}." if table else ""
    seen: set[str] = set()
    for detail in error.errors(include_url=False, include_context=True):
        field, *index = detail["loc"] or ("",)
        value: Any = detail["input"]
        if isinstance(raw, Mapping) and field in raw and field in model.columns:
            if not isinstance(raw[field], list | tuple):  # a spread scalar: one mistake, not many
                index, value = [], raw[field]
            elif not index and any(key.startswith(f"{prefix}{field}[") for key in seen):
                continue  # the column's own error only follows from an entry's
        key = f"{prefix}{field}".rstrip(".") + "".join(f"[{i}]" for i in index)
        if key in seen:
            continue
        seen.add(key)
        yield _finding(key, str(field), value, detail, model)


def _finding(
    key: str, field: str, value: Any, detail: ErrorDetails, model: type[Table]
) -> Finding:
    kind = detail["type"]
    message = _MESSAGES.get(kind) or detail["msg"].replace("Input should", "must")
    if kind in ("extra_forbidden", "missing", "model_type"):
        known = list(Spec.model_fields if model is Title else model.model_fields)
        if kind == "missing":
            return Finding(key, message, NOT_GIVEN, _allowed(model, field))
        return Finding(key, message, value, ", ".join(known), nearest(field, known))
    near = ""
    if kind == "literal_error" and isinstance(value, str):
        options = [o.strip(" '") for o in str(detail["ctx"]["expected"]).replace(" or ", ",").split(",")]
        near = nearest(value, options)
    return Finding(key, message, value, _allowed(model, field), near)


def _allowed(model: type[Table], field: str) -> str:
    """A field's permitted values, from its own JSON Schema."""
    schema = model.model_json_schema()["properties"].get(field, {})
    text = _describe(schema)
    if field in model.columns:
        text += "; one per entry, or one for all"
    return text


def _describe(schema: Mapping[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(_describe(s) for s in schema["anyOf"] if s.get("type") != "null")
    if "const" in schema or "enum" in schema:
        options = schema.get("enum", [schema.get("const")])
        return ", ".join(f'"{o}"' if isinstance(o, str) else str(o) for o in options)
    if schema.get("type") == "array":
        return _describe(schema.get("items", {}))
    words = {"integer": "a whole number", "number": "a number", "string": "text"}
    text = words.get(schema.get("type", ""), "true or false")
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    high = schema.get("maximum", schema.get("exclusiveMaximum"))
    if low is not None:
        text += f" {'above' if 'exclusiveMinimum' in schema else 'from'} {low}"
    if high is not None:
        text += f" {'below' if 'exclusiveMaximum' in schema else 'to'} {high}"
    return text
