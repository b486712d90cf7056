"""Pydantic's findings in this project's words: key path, value, what is allowed, nearest name."""

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from nfflax.spec.base import Document, Table, Title
from nfflax.spec.check import Finding
from nfflax.spec.errors import NOT_GIVEN, SHOWN_PROBLEMS, nearest

# What other libraries call a key, timm first.
_OTHER_NAMES = {
    "act": "activation",
    "act_layer": "activation",
    "bottle_ratio": "expansion",
    "ch_div": "round_width",
    "channels": "width",
    "classes": "num_classes",
    "drop_path": "stochastic_depth",
    "drop_path_rate": "stochastic_depth",
    "drop_rate": "dropout",
    "ema_decay": "decay",
    "grad_accum_steps": "accumulate",
    "global_pool": "pool",
    "group_size": "group_width",
    "groups": "group_width",
    "in_chans": "in_channels",
    "layers": "depth",
    "lr": "learning_rate",
    "min_lr": "end",
    "model_ema_decay": "decay",
    "num_features": "width",
    "opt": "kind",
    "rd_ratio": "ratio",
    "sched": "kind",
    "se_ratio": "ratio",
    "smoothing": "label_smoothing",
    "std_conv_eps": "ws_eps",
    "stochdepth_rate": "stochastic_depth",
    "warmup_lr": "start",
    "wd": "weight_decay",
}
_MESSAGES = {
    "bool_type": "must be true or false",
    "extra_forbidden": "no such key",
    "finite_number": "must be a finite number",
    "float_type": "must be a number",
    "greater_than": "must be greater than {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "int_type": "must be a whole number",
    "invalid_key": "keys must be text",
    "less_than": "must be less than {lt:g}",
    "less_than_equal": "must be at most {le:.10g}",
    "literal_error": "is none of the allowed values",
    "missing": "is required",
    "model_type": "must be a table",
    "string_pattern_mismatch": "letters, digits and . _ + - only, a letter or digit first",
    "string_too_short": "must not be empty",
    "string_too_long": "must have at most {max_length} characters",
    "string_type": "must be text",
    "string_unicode": "is not valid Unicode text",
    "too_long": "has too many entries",
    "too_short": "has too few entries",
    "tuple_type": "must be a list",
}


@functools.cache
def tables_of(root: type[Document]) -> dict[str, type[Table]]:
    """The tables of a kind of file, by name."""
    fields = {name: field.annotation for name, field in root.model_fields.items()}
    return {k: v for k, v in fields.items() if isinstance(v, type) and issubclass(v, Table)}


@functools.cache
def keys_of(root: type[Document]) -> dict[str, str]:
    """Every key of a kind of file: dotted, and alone."""
    tables = tables_of(root).items()
    return {f"{name}.{key}": key for name, model in tables for key in names_in(model)}


def names_in(model: type[Table]) -> list[str]:
    """What may stand in a table, keys that only files have included."""
    return list(dict.fromkeys([*model.model_fields, *model.file_keys]))


def explain(
    error: ValidationError, root: type[Document], table: str, raw: Any
) -> Iterator[Finding]:
    """One Finding per distinct mistake in the table called `table` ("" for the top level)."""
    model = tables_of(root)[table] if table else Title
    prefix = f"{table}." if table else ""
    seen: set[str] = set()
    blamed: set[str] = set()  # fields with a wrong entry
    for detail in error.errors(include_url=False, include_context=True):
        field, *index = detail["loc"] or ("",)
        value: Any = detail["input"]
        if field in model.model_fields and isinstance(raw, Mapping) and field in raw:
            if not isinstance(raw[field], list | tuple):  # a spread scalar: one mistake, not many
                index, value = [], raw[field]
            elif not index:
                if field in blamed:
                    continue  # the column's own error only follows from an entry's
                value = raw[field]
        if index:
            blamed.add(str(field))
        key = f"{prefix}{field}" if detail["loc"] else table
        owner, name, place = model, str(field), prefix
        if index and (entry := _entry_of(model, name)):
            owner, name, place = entry, "".join(map(str, index[1:2])), f"{key}[{index[0]}]."
        for part in index:
            key += f"[{part}]" if isinstance(part, int) else f".{part}"
        if key in seen:
            continue
        seen.add(key)
        known = names_in(root if model is Title else owner)
        near = ""
        if detail["type"] == "extra_forbidden" and len(seen) <= SHOWN_PROBLEMS:
            near = _meant(root, known, place, name)
        yield _finding(key, name, value, detail, owner, known, near)


def suggestion(root: type[Document], table: str, field: str) -> str:
    """The dotted key that was likely meant by an unknown one ("" as table: at the top level)."""
    own = tables_of(root).get(table, Table) if table else root
    return _meant(root, names_in(own), f"{table}." if table else "", field)


def _meant(root: type[Document], own: Sequence[str], prefix: str, field: str) -> str:
    keys = keys_of(root)
    meant = _OTHER_NAMES.get(field) or nearest(field, own) or nearest(field, keys.values())
    if meant in own:
        return f"{prefix}{meant}"
    places = [key for key, name in keys.items() if name == meant]
    return " or ".join(filter(None, [", ".join(places[:-1]), *places[-1:]]))


def _finding(
    key: str,
    field: str,
    value: Any,
    detail: ErrorDetails,
    model: type[Table],
    known: Sequence[str],
    near: str,
) -> Finding:
    kind, allowed = detail["type"], _allowed(model, field)
    template = _MESSAGES.get(kind)
    message = template.format(**detail.get("ctx", {})) if template else detail["msg"]
    if kind in ("missing", "invalid_key"):
        value = NOT_GIVEN
    elif kind in ("extra_forbidden", "model_type"):
        allowed = ", ".join(known)
    elif kind == "literal_error" and isinstance(value, str):
        near = nearest(value, map(str, _options(model, field)))
    else:
        near = _intended(kind, value)
    return Finding(key, message, value, allowed, near)


def _entry_of(model: type[Table], field: str) -> type[Table] | None:
    """The table that a list in `field` is made of, if it is one of tables."""
    annotation = model.model_fields[field].annotation if field in model.model_fields else None
    entry = next(iter(get_args(annotation)), None)
    return entry if isinstance(entry, type) and issubclass(entry, Table) else None


def _intended(kind: str, value: Any) -> str:
    """A value of the right type that says the same: 10 for "10" or 10.0."""
    if kind == "bool_type":
        return value if value in ("true", "false") else ""
    if kind == "int_type" and isinstance(value, float) and value.is_integer():
        return f"{value:.0f}"
    if isinstance(value, str) and len(value) < 20:
        try:
            return str({"int_type": int, "float_type": float}[kind](value))
        except (KeyError, ValueError):
            pass
    return ""


@functools.cache
def _schema(model: type[Table]) -> dict[str, Any]:
    return model.model_json_schema()["properties"]


def _options(model: type[Table], field: str) -> list[Any]:
    """What a choice may be."""
    schema = _schema(model)[field]
    schema = schema.get("items", schema)
    return schema.get("enum") or [schema["const"]]


@functools.cache
def _allowed(model: type[Table], field: str) -> str:
    """A field's permitted values, from its own JSON Schema."""
    schema = _schema(model).get(field)
    if schema is None:
        return ""
    schema = next((s for s in schema.get("anyOf", ()) if s.get("type") == "array"), schema)
    text = _describe(schema)
    if field in model.columns:
        text += "; one per entry, or one for all"
    elif field in model.per_channel:
        text += "; one for all channels, or one per channel"
    elif schema.get("type") == "array":
        text = f"a list; each entry: {text}"
    if examples := schema.get("examples"):
        text += f", e.g. {' or '.join(map(json.dumps, examples))}"
    return text


def _describe(schema: Mapping[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(_describe(s) for s in schema["anyOf"] if s.get("type") != "null")
    if "const" in schema or "enum" in schema:
        return ", ".join(json.dumps(o) for o in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        return _describe(schema.get("items", {}))
    words = {"integer": "a whole number", "number": "a number", "string": "text"}
    words["boolean"] = "true or false"
    text = words.get(schema.get("type", ""), "a table")
    if "maxLength" in schema:
        text += f" of at most {schema['maxLength']} characters"
    if "minimum" in schema:
        text += f" from {schema['minimum']:g}"
    if "exclusiveMinimum" in schema:
        text += f" above {schema['exclusiveMinimum']:g}"
    if "maximum" in schema:
        text += f" {'to' if 'minimum' in schema else 'and up to'} {schema['maximum']:.10g}"
    if "exclusiveMaximum" in schema:
        text += f" to below {schema['exclusiveMaximum']:g}"
    return text
