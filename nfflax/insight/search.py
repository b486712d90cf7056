"""The best ways to spread a run over a pod: every mesh, remat policy and microbatch, on paper.

Memory on paper is a count, which the compiler then has the last word on: see `checked`.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from nfflax.insight.chips import Pod, PodError
from nfflax.insight.estimate import Estimate, estimate
from nfflax.insight.rehearsal import Rehearsal
from nfflax.spec.errors import NOT_GIVEN, Problem
from nfflax.spec.plan import plan
from nfflax.spec.run import Run

_REMATS = ("none", "conv", "block")  # the one that changes least first
_MOST_FSDP = 16  # a chip's share is small by then (NFNet-F6: 0.3 GB), and gathers stay in a row
_MOST_TENSOR = 16  # more devices for one block than any network here has groups to share out
_MOST_MICROBATCHES = 64


@dataclass(frozen=True)
class Candidate:
    """One way to carry out a run."""

    run: Run
    """With `mesh`, `model.remat` and `train.accumulate` as this candidate has them."""
    estimate: Estimate

    @property
    def settings(self) -> dict[str, Any]:
        """The keys of a run file that make it this candidate."""
        mesh = self.run.mesh
        return {
            "mesh.fsdp": mesh.fsdp,
            "mesh.tensor": mesh.tensor,
            "model.remat": self.run.model.remat,
            "train.accumulate": self.run.train.accumulate,
        }


def search(run: Run, pod: Pod) -> list[Candidate]:
    """All ways that fit on the pod, by the time to expect of a step; of equals the simplest first.

    Where none fits, all that were looked at, those that need least memory first.
    """
    found = [Candidate(changed, estimate(changed, pod, mesh)) for changed, mesh in _ways(run, pod)]
    fitting = [each for each in found if each.estimate.fits]
    if not fitting:
        return sorted(found, key=lambda each: each.estimate.memory)
    return sorted(fitting, key=lambda each: (each.estimate.expected, *_complexity(each.run)))


def checked(
    ways: Sequence[Candidate], compile: Callable[[Run], Rehearsal]
) -> Iterator[tuple[Candidate, Rehearsal]]:
    """Compile ways from the first on, until one fits; all that were compiled, in that order.

    After one that does not fit, counts are taken to be off as much as that one's was.
    """
    error = 1.0
    for way in ways:
        if way.estimate.memory * error > way.estimate.pod.chip.usable:
            continue
        found = compile(way.run)
        yield way, found
        if found.fits:
            return
        error = max(error, found.memory / way.estimate.memory)


def mesh_on(run: Run, pod: Pod) -> dict[str, int]:
    """The axes of a run's mesh on a pod; raises a SpecError where they do not fit together."""
    from nfflax.train.mesh import check_fits

    table, count = run.mesh, pod.count
    others = {"fsdp": table.fsdp, "tensor": table.tensor, "spatial": table.spatial}
    product = math.prod(others.values())
    data = table.data or count // product
    mesh = {"data": data, **others}
    for key, size in {"": data * product, "devices": table.devices or count}.items():
        if size != count:
            asked = " x ".join(f"{name} {length}" for name, length in mesh.items())
            message = f"{asked} does not make the {count} chips of {pod.name}"
            value = table.devices if key else NOT_GIVEN
            where = f"mesh.{key}".rstrip(".")
            raise PodError([Problem(f"run {run.name}", where, message, value, f"in all {count}")])
    check_fits(run, _abstract(mesh))
    return mesh


def _ways(run: Run, pod: Pod) -> Iterator[tuple[Run, dict[str, int]]]:
    """Every changed run with its mesh, of those that are possible at all."""
    from nfflax.train.errors import MeshError

    spatial = run.mesh.spatial
    groups = {block.groups for block in plan(run.spec).blocks}
    tensors = [t for t in _powers(_MOST_TENSOR) if not any(group % t for group in groups)]
    for tensor, fsdp in itertools.product(tensors, _powers(_MOST_FSDP)):
        if pod.count % (fsdp * tensor * spatial):
            continue
        for accumulate, remat in itertools.product(_powers(_MOST_MICROBATCHES), _REMATS):
            changed = run.model_copy(
                update={
                    "mesh": run.mesh.model_copy(
                        update={"data": 0, "fsdp": fsdp, "tensor": tensor, "devices": 0}
                    ),
                    "model": run.model.model_copy(update={"remat": remat}),
                    "train": run.train.model_copy(update={"accumulate": accumulate}),
                }
            )
            try:
                yield changed, mesh_on(changed, pod)
            except MeshError:  # a batch or an image that does not divide
                continue


def _complexity(run: Run) -> tuple[int, ...]:
    """How far a run is from the simplest one."""
    remat = _REMATS.index(run.model.remat)
    return run.mesh.tensor, run.mesh.fsdp, run.train.accumulate, remat


def _powers(most: int) -> list[int]:
    """1, 2, 4, ... up to a number."""
    return [1 << i for i in range(most.bit_length()) if 1 << i <= most]


def _abstract(mesh: dict[str, int]) -> Any:
    from jax.sharding import AbstractMesh, AxisType

    types = (AxisType.Auto,) * len(mesh)
    return AbstractMesh(tuple(mesh.values()), tuple(mesh), axis_types=types)
