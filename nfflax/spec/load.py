"""From a preset name, a file or a dict to a Spec or a Run: read, inherit, override, validate."""

import os
from collections.abc import Iterable, Mapping
from typing import Any

from nfflax.spec.errors import Problem, SpecError
from nfflax.spec.files import Layer, Origin, layers, parse_toml
from nfflax.spec.merge import OVERRIDE, Merged
from nfflax.spec.run import Run
from nfflax.spec.schema import Spec

Source = str | os.PathLike[str] | Mapping[str, Any] | Spec
RunSource = str | os.PathLike[str] | Mapping[str, Any] | Run


def load_spec(source: Source, overrides: Mapping[str, Any] | None = None) -> Spec:
    """The resolved spec of a preset name, a .toml or .json path, a dict, or another Spec.

    `overrides` maps dotted keys to values: `{"stages.depth": [1, 1, 2, 1]}`. Raises SpecError with
    every problem at once.
    """
    merged = Merged(Spec, layers(Spec, source, Origin("spec")))
    for key, value in (overrides or {}).items():
        merged.override(key, value)
    return merged.validate()


def load_run(source: RunSource, overrides: Mapping[str, Any] | None = None) -> Run:
    """The resolved training run of a preset name, a .toml or .json path, a dict, or another Run.

    `overrides` maps dotted keys to values: `{"train.epochs": 90, "model.set.head.dropout": 0}`.
    Raises SpecError with every problem at once, those of the network included.
    """
    merged = _MergedRun(layers(Run, source, Origin("run")))
    for key, value in (overrides or {}).items():
        merged.override(key, value)
    return merged.validate()


def parse_override(text: str) -> tuple[str, Any]:
    """`key.path=value` as the command line gives it; the value is TOML, or else plain text."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise SpecError([Problem("--set", text, "is no assignment", allowed="key.path=value")])
    try:
        parsed = parse_toml(f"value = {value}")
    except (RecursionError, ValueError):
        parsed = {}
    return key.strip(), parsed["value"] if parsed.keys() == {"value"} else value.strip()


class _MergedRun(Merged[Run]):
    """Layers of a run, and apart from them what each changes in the network, below `model.set`."""

    def __init__(self, layers: Iterable[Layer]) -> None:
        self.changes: list[tuple[Origin, Any]] = []
        super().__init__(Run, layers)

    def override(self, key: str, value: Any, origin: Origin = OVERRIDE) -> None:
        start = "model.set."
        if isinstance(key, str) and key.startswith(start):
            key, value = "model.set", {key.removeprefix(start): value}
        super().override(key, value, origin)

    def put(self, origin: Origin, key: Any, value: Any) -> None:
        if key == "model" and isinstance(value, Mapping) and "set" in value:
            value = dict(value)
            self.changes.append((origin, value.pop("set")))
        super().put(origin, key, value)

    def validate(self) -> Run:
        table = self.data.get("model")
        if isinstance(table, dict) and "spec" in table:
            self.data["model"] = table | {"spec": self._network(table["spec"])}
        return super().validate()

    def _network(self, source: Any) -> Spec:
        """The network that `model.spec` names, as `model.set` changes it."""
        origin = self.origin["model.spec"]
        inline = origin._replace(prefix="model.spec.")
        try:
            is_inline = isinstance(source, Mapping | Spec)
            at, key = (inline, "") if is_inline else (origin, "model.spec")
            merged = Merged(Spec, layers(Spec, source, at, key))
            for place, changes in self.changes:
                below = place._replace(prefix="model.set.")
                if not isinstance(changes, Mapping):
                    message, allowed = "must be a table", "keys of the model spec"
                    self.problems += [place.problem("model.set", message, changes, allowed)]
                    continue
                for name, value in changes.items():
                    merged.override(name, value, below)
            return merged.validate()
        except SpecError as error:
            self.problems += error.problems
            return load_spec("nfnet_f0")  # stands in while the rest of the run is checked
