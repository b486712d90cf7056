"""From turns to the numbers of a table: medians, ratios of turns in the same round, shares."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from peers.driver import Measured, Turn
from peers.job import Ready, What

PASSES = {"step": 3, "forward": 1}  # a backward pass takes the multiply-adds of two forward passes
ALIKE = 0.02  # of parameters and multiply-adds: implementations count the small ones differently


@dataclass(frozen=True)
class Row:
    """One contestant's numbers. Ratios are to the table's first contestant: above 1 is slower."""

    label: str
    failure: str = ""
    wall: float = 0.0
    cpu: float = 0.0
    """Seconds of one step, by the clock and of CPU time."""
    wall_ratio: float = 0.0
    cpu_ratio: float = 0.0
    rate: float = 0.0
    """Operations per second by the clock: two per multiply-add, and none for recomputing."""
    share: float = 0.0
    """Of the rate of one matrix product in the same round: per CPU second, or on a GPU by the
    clock; 0 where that was not measured."""
    images: float = 0.0
    """Per second, by the clock."""
    compile_wall: float = 0.0
    compile_cpu: float = 0.0
    memory: int = 0
    params: int = 0
    macs: float = 0.0


def rows(all_found: Sequence[Measured], *, what: What, batch: int, device: str) -> list[Row]:
    """The rows of a table. The first one measured is the one to compare with, the last the floor.

    A contestant that gave up on the way is left with its reason.
    """
    *competing, floor = all_found
    first = competing[0]
    of_clock: Callable[[Turn], float] = lambda turn: turn.wall  # noqa: E731
    of_cpu: Callable[[Turn], float] = lambda turn: turn.cpu  # noqa: E731
    clock = of_clock if device == "cuda" else of_cpu

    def label(found: Measured) -> str:
        same = _alike(found.ready, first.ready)
        return found.contestant.label + ("" if same else ", another network")

    def row(found: Measured) -> Row:
        if found.failure or found.ready is None:
            return Row(found.contestant.label, found.failure)
        operations = 2 * PASSES[what] * batch * found.ready.macs
        wall = median(map(of_clock, found.turns))
        share = 0.0
        if not floor.failure and floor.ready:
            share = operations / (2 * floor.ready.macs) * paired(floor, found, clock)
        return Row(
            label(found),
            wall=wall,
            cpu=median(map(of_cpu, found.turns)),
            wall_ratio=0.0 if first.failure else paired(found, first, of_clock),
            cpu_ratio=0.0 if first.failure else paired(found, first, of_cpu),
            rate=operations / wall,
            share=share,
            images=batch / wall,
            compile_wall=found.ready.compile_wall,
            compile_cpu=found.ready.compile_cpu,
            memory=found.ready.memory,
            params=found.ready.params,
            macs=found.ready.macs,
        )

    return [row(found) for found in competing]


def _alike(one: Ready | None, other: Ready | None) -> bool:
    """Whether both have the same network: peers use names for networks of their own, too."""
    if one is None or other is None:
        return True
    pairs = (one.params, other.params), (one.macs, other.macs)
    return all(abs(mine - theirs) < ALIKE * theirs for mine, theirs in pairs)


def paired(one: Measured, other: Measured, of: Callable[[Turn], float]) -> float:
    """The median over rounds of one's time in parts of the other's."""
    turns = zip(one.turns, other.turns, strict=True)
    return median(of(mine) / of(theirs) for mine, theirs in turns)
