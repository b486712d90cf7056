"""How the signal propagates through a run's network before and after training, as charts.

Measured on a few images of N(0, 1) noise that are the same for every network, so that it needs no
data; `nfflax.signals` and docs/signal-propagation.md say what the curves mean.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from nfflax.insight.report_chart import COLORS, Across, Chart, Line, Marks, Ticks
from nfflax.insight.report_record import Record
from nfflax.insight.spp import input_of, signals
from nfflax.nn.builder import build
from nfflax.spec.errors import SpecError
from nfflax.spec.plan import plan
from nfflax.spec.run import Run
from nfflax.spec.schema import Spec
from nfflax.train.checkpoint import FOLDER as CHECKPOINTS
from nfflax.train.inference import load_model

_MOST_PARAMS = 1_000_000_000  # twice those of NFNet-F7: 4 GB each for the start and the end
_CHARTS = {
    "avg_sq_mean": ("average squared mean", "Of each block's output: far below the variance, "
                    "or the channels have drifted."),
    "avg_var": ("average variance", "Of each block's output, over channels."),
    "res_avg_var": ("variance of the residual branch", "At the end of each block's branch, before "
                    "gain and alpha: near 1 where the plan holds."),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Propagation:
    """What was measured of one run: the curves over depth at one or two moments of it."""

    record: Record
    moments: tuple[tuple[str, dict[str, np.ndarray]], ...]
    """A moment's name, "start" or "step 500", and its curves."""
    notes: tuple[str, ...]


def measured(record: Record, say: Callable[[str], None]) -> Propagation:
    """The curves of a run's first network and its last; what is not there is in the notes."""
    moments: list[tuple[str, dict[str, np.ndarray]]] = []
    notes: list[str] = []
    if record.spec and plan(record.spec).params > _MOST_PARAMS:
        notes.append(f"{record.label}: the network is too large to be measured here.")
        return Propagation(record, (), tuple(notes))
    last = _loaded(record, str(record.folder), notes) if record.checkpoints else None
    if record.run and not record.run.model.weights:
        say(f"{record.label}: the signal at the start")
        moments.append(("start", _curves(_initial(record.run), record.run.spec)))
    elif record.run:
        kept, end = record.checkpoints[:1], last[0] if last else None
        if kept and kept[0] != end:
            first = _loaded(record, str(record.folder / CHECKPOINTS / str(kept[0])), notes)
            moments += [(f"step {kept[0]:,}", _curves(first[1], first[1].spec))] if first else []
        notes.append(f"The run started from {record.run.model.weights}, not from random weights.")
    if last:
        say(f"{record.label}: the signal at step {last[0]:,}")
        moments.append((f"step {last[0]:,}", _curves(last[1], last[1].spec)))
    return Propagation(record, tuple(moments), tuple(notes))


def charts(found: Sequence[Propagation]) -> Iterator[Chart]:
    """The curves of all runs: each has its colour; its start is dashed, its end is solid."""
    across = _depths([moved.record.spec for moved in found if moved.record.spec])
    for name, (title, about) in _CHARTS.items():
        lines = [
            Line(
                _label(moved, moment, len(found)), _places(name, curves), curves[name], color, form
            )
            for number, moved in enumerate(found)
            for position, (moment, curves) in enumerate(moved.moments)
            for color, form in [_look(number, moved, position, len(found))]
        ]
        yield Chart(title, about, lines, across, is_log=True)


def _curves(model: Any, spec: Spec) -> dict[str, np.ndarray]:
    images, size = input_of(spec)
    shape = images, size, size, spec.stem.in_channels
    noise_NHWC = np.random.default_rng(0).standard_normal(shape, np.float32)
    return {name: np.asarray(values) for name, values in signals(model, noise_NHWC).items()}


def _initial(run: Run) -> nnx.Module:
    """The network as training begins with it, from the run's seed."""

    @nnx.jit
    def create() -> nnx.Module:
        rngs = nnx.Rngs(run.train.seed)
        return build(run.spec, rngs=rngs, dtype=jnp.float32, unroll=run.model.unroll)

    return create()


def _loaded(record: Record, path: str, notes: list[str]) -> tuple[int, Any] | None:
    """Step and network of a checkpoint; None, and a note, where it cannot be read."""
    try:
        loaded = load_model(path, dtype="float32")
    except SpecError as error:
        notes.append(
            f"{path} holds no network that could be measured: {error.problems[0].message}."
        )
        return None
    notes += loaded.notes
    return loaded.step or 0, loaded.model


def _places(name: str, curves: dict[str, np.ndarray]) -> np.ndarray:
    """Where values lie over depth: 0 is the stem, a block's number its output."""
    return np.arange(len(curves[name])) + (1 if name == "res_avg_var" else 0.0)


def _label(moved: Propagation, moment: str, runs: int) -> str:
    return f"{moved.record.label}, {moment}" if runs > 1 else moment


def _look(number: int, moved: Propagation, position: int, runs: int) -> tuple[int, Any]:
    is_last = position == len(moved.moments) - 1
    form = "solid" if is_last and moved.moments[position][0] != "start" else "dashed"
    return (number % COLORS if runs > 1 else int(is_last)), form


def _depths(specs: Sequence[Spec]) -> Across:
    """The axis of blocks; where all networks have the same stages, those are marked."""
    depths = {spec.stages.depth for spec in specs}
    blocks = max([1, *(sum(depth) for depth in depths)])
    if len(depths) != 1:
        ticks = [0, blocks]
        return Across(0, blocks, [Ticks("block", ticks, ["stem", str(blocks)])])
    (depth,) = depths
    ends = np.cumsum((0, *depth))
    middles = [(first + end + 1) / 2 for first, end in itertools.pairwise(ends.tolist())]
    marks = [Marks("", [end + 0.5 for end in ends[:-1].tolist()])]
    rows = [Ticks("stage", middles, [str(i) for i in range(len(depth))])]
    return Across(0, float(blocks), rows, marks=marks)
