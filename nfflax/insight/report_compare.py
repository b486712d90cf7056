"""Runs and networks key by key: against the shipped one that is nearest, and among each other."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from nfflax.spec.base import Document, by_key
from nfflax.spec.load import load_run, load_spec
from nfflax.spec.presets import list_specs, shipped
from nfflax.spec.run import Run
from nfflax.spec.schema import Spec

_EXAMPLES = "train.examples"  # 0 leaves it to the data, which has answered when a run is recorded


class Difference(NamedTuple):
    """A key, and what each of the compared files says."""

    key: str
    values: tuple[str, ...]


class Departure(NamedTuple):
    """How a file differs from the shipped one that it is nearest to."""

    preset: str
    differences: tuple[Difference, ...]


def run_departure(run: Run) -> Departure:
    """How a run differs from a shipped one; of the network, only what it is called."""
    presets = {name: load_run(name) for name in shipped(Run.presets)}
    return _departure(run, presets)


def spec_departure(spec: Spec) -> Departure:
    """How a network differs from a shipped one."""
    return _departure(spec, {name: load_spec(name) for name in list_specs()})


def differences(documents: Sequence[Document]) -> list[Difference]:
    """The keys in which some differ, networks key by key."""
    return _differing([values_of(document, whole=True) for document in documents])


def values_of(document: Document, *, whole: bool = False) -> dict[str, str]:
    """All that a file says, by dotted key, as text; `whole`: a run's network key by key as well."""
    data = document.model_dump(mode="json", exclude={"name", "summary"})
    if isinstance(document, Run) and not whole:
        data["model"] |= {"spec": document.spec.name}
    found = by_key(data).items()
    return {key: shown(value) for key, value in found if not key.endswith(".summary")}


def shown(value: Any) -> str:
    """A value as a spec file has it, nearly."""
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


def _departure(document: Any, presets: Mapping[str, Any]) -> Departure:
    """Against the preset of the same name, or else the one with the fewest other values."""
    name = document.name
    chosen = {name: presets[name]} if name in presets else presets
    ours = values_of(document)
    found = []
    for preset, other in chosen.items():
        theirs = values_of(other)
        if theirs.get(_EXAMPLES) == "0" and ours.get(_EXAMPLES):
            theirs[_EXAMPLES] = ours[_EXAMPLES]
        found.append(Departure(preset, tuple(_differing([theirs, ours]))))
    return min(found, key=lambda departure: len(departure.differences))


def _differing(tables: Sequence[Mapping[str, str]]) -> list[Difference]:
    keys = dict.fromkeys(key for table in tables for key in table)
    rows = (Difference(key, tuple(table.get(key, "") for table in tables)) for key in keys)
    return [row for row in rows if len(set(row.values)) > 1]
