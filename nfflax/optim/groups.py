"""Which parameter is treated how: roles, the run's rules, freezing and layer-wise rates, resolved.

The result is one table of roles for the transforms, one learning-rate factor per parameter, and the
groups that people read. Nothing is guessed: a parameter that neither carries a role nor meets a
rule is an error.
"""

import dataclasses
import fnmatch
import math
from collections.abc import Mapping, Sequence
from typing import Any

from flax import nnx

from nfflax.optim.roles import (
    Path,
    Roles,
    Treatment,
    by_rank,
    dotted,
    from_the_end,
    part_of,
    read_roles,
)
from nfflax.spec.errors import Problem, SpecError, nearest

_SHOWN = 5  # parameters that an error names


@dataclasses.dataclass(frozen=True)
class Group:
    """Parameters that the optimiser treats alike."""

    name: str
    parameters: tuple[str, ...]
    """Dotted paths."""
    count: int
    """Weights in all of them together."""
    decay: float
    """Weight decay; 0: none."""
    clip: float | None
    """The largest ratio of gradient to weight norm; None: not clipped."""
    learning_rate: float
    """Factor of the schedule's learning rate; 0: frozen."""


@dataclasses.dataclass(frozen=True)
class Groups:
    """The treatment and learning-rate factor of every parameter of a model."""

    roles: Roles
    factors: Mapping[Path, float]
    shapes: Mapping[Path, tuple[int, ...]]

    def listed(self, weight_decay: float, clipping: float | None) -> tuple[Group, ...]:
        """The groups, those with the most weights first."""
        members: dict[Any, list[Path]] = {}
        for path, treatment in self.roles.items():
            decay = weight_decay if treatment.decay else 0.0
            alike = decay, clipping if treatment.clip else None, self.factors[path]
            members.setdefault(alike, []).append(path)
        groups = []
        for (decay, clip, factor), paths in members.items():
            count = sum(math.prod(self.shapes[path]) for path in paths)
            if not factor:
                decay, clip = 0.0, None
            names = tuple(map(dotted, paths))
            groups.append(Group(_name(paths), names, count, decay, clip, factor))
        return tuple(sorted(groups, key=lambda group: -group.count))


def resolve(optimizer: Any, model: nnx.Module) -> Groups:
    """What the `[optimizer]` table of a run makes of the parameters of `model`."""
    parameters = nnx.state(model, nnx.Param)
    variables: dict[Any, Any] = dict(nnx.to_flat_state(parameters))
    shapes: dict[Path, tuple[int, ...]] = {path: v.shape for path, v in variables.items()}
    own = read_roles(parameters)
    stages = 1 + max(map(_stage, shapes), default=-1)
    problems: list[Problem] = []
    treatments: dict[Path, Treatment] = {}
    factors: dict[Path, float] = {}
    uncovered = []
    for path, shape in shapes.items():
        rules = [rule for rule in optimizer.rules if fnmatch.fnmatchcase(dotted(path), rule.match)]
        if path not in own and not rules:
            uncovered.append(dotted(path))
        treatment, factor = own.get(path) or by_rank(shape), 1.0
        for rule in rules:
            said = {"decay": rule.decay, "clip": rule.clip, "unit_axes": _axes(rule, path, shape)}
            changes = {key: value for key, value in said.items() if value is not None}
            treatment = dataclasses.replace(treatment, **changes)
            factor = factor if rule.learning_rate is None else rule.learning_rate
        treatments[path] = treatment
        factors[path] = factor * optimizer.layer_decay ** _height(path, stages)
    if uncovered:
        more = f" and {len(uncovered) - _SHOWN} more" if len(uncovered) > _SHOWN else ""
        problems.append(
            Problem(
                "run",
                "optimizer.rules",
                "these parameters carry no role and no rule matches them: "
                f"{', '.join(uncovered[:_SHOWN])}{more}",
                allowed='a rule that says how they are treated, e.g. match = "head.*"',
            )
        )
    problems += _unused_rules(optimizer.rules, shapes)
    for index, name in enumerate(optimizer.freeze):
        frozen = [path for path in shapes if f"{dotted(path)}.".startswith(f"{name}.")]
        factors |= dict.fromkeys(frozen, 0.0)
        if not frozen:
            parts = sorted({part_of(path) for path in shapes})
            message, key = "no parameter lies there", f"optimizer.freeze[{index}]"
            allowed = f"{', '.join(parts)}, or the beginning of a parameter's path"
            problems.append(Problem("run", key, message, name, allowed, nearest(name, parts)))
    if shapes and not any(factors.values()):
        problems.append(Problem("run", "optimizer.freeze", "leaves nothing to train"))
    if problems:
        raise SpecError(problems)
    return Groups(Roles(treatments), factors, shapes)


def _unused_rules(rules: Sequence[Any], shapes: Mapping[Path, Any]) -> list[Problem]:
    names = [dotted(path) for path in shapes]
    return [
        Problem(
            "run",
            f"optimizer.rules[{index}].match",
            "matches no parameter",
            rule.match,
            nearest=nearest(rule.match, names),
        )
        for index, rule in enumerate(rules)
        if not fnmatch.filter(names, rule.match)
    ]


def _axes(rule: Any, path: Path, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The unit axes that a rule names, counted from the end."""
    if rule.unit_axes is None:
        return None
    try:
        return from_the_end(rule.unit_axes, len(shape))
    except ValueError:
        message = f"{dotted(path)} has shape {list(shape)}: it lacks some of these axes"
        key = f"optimizer.rules ({rule.match}).unit_axes"
        raise SpecError([Problem("run", key, message, list(rule.unit_axes))]) from None


def _height(path: Path, stages: int) -> int:
    """How many parts lie between a parameter and the top: the stem is farthest, the head at 0."""
    if _stage(path) >= 0:
        return stages - _stage(path)
    return stages + 1 if "stem" in path[:-1] else 0


def _stage(path: Path) -> int:
    """The number of the stage that a parameter belongs to, or -1."""
    return int(path[path.index("stages") + 1]) if "stages" in path[:-1] else -1


def _name(paths: Sequence[Path]) -> str:
    """What a group is called: the parameters' last names, and their part if they share one."""
    if len(paths) == 1:
        return dotted(paths[0])
    kinds = ", ".join(sorted({str(path[-1]) for path in paths}))
    parts = {part_of(path) for path in paths}
    return f"{parts.pop()}: {kinds}" if len(parts) == 1 else kinds
