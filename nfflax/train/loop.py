"""A whole training run: set up, resume, loop, and leave everything on disk.

The order inside the loop is fixed: evaluate -> save -> stop? -> next batch -> step -> metrics of
the step before. So a checkpoint at step k holds what was evaluated at k, a resumed run repeats no
step, and the host prepares step k + 1 while the devices compute step k.
"""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import jax

import nfflax
from nfflax.data.feed import check_source, sized
from nfflax.data.pipeline import Batches
from nfflax.data.sources import Source, open_source
from nfflax.optim.guard import raise_if_diverged
from nfflax.spec.run import Run
from nfflax.spec.table import plain_text
from nfflax.train.agree import by_first
from nfflax.train.checkpoint import Checkpoints
from nfflax.train.evaluate import evaluate
from nfflax.train.events import noted
from nfflax.train.history import AVERAGE, History, best, ready_wandb
from nfflax.train.layout import layout
from nfflax.train.mesh import make_mesh, mesh_notes
from nfflax.train.meter import Meter
from nfflax.train.outcome import Result
from nfflax.train.preflight import preflight
from nfflax.train.program import Program, make_program
from nfflax.train.progress import Progress
from nfflax.train.state import State
from nfflax.train.step import Metrics
from nfflax.train.stopping import StoppedError, StopSignals
from nfflax.train.transfer import starting_weights, with_weights
from nfflax.train.workdir import PROFILE, claim


def train(
    run: Run,
    workdir: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    steps: int | None = None,
    profile: range = range(0),
    stream: IO[str] | None = None,
) -> Result:
    """Carry out a run in a folder, where checkpoints and metrics are left.

    `steps` ends early, with a checkpoint, at that step of the run. `profile` names steps to record
    with JAX's profiler. `stream` is where progress is shown (None: nowhere).
    """
    started, workdir = time.perf_counter(), Path(workdir)
    source = open_source(run.data, run.data.train)
    run = sized(run, source)
    held_out = open_source(run.data, run.data.eval)
    check_source(run, source)
    check_source(run, held_out)
    if run.model.weights and not resume:
        starting_weights(run)
    by_first(lambda: ready_wandb(run))
    mesh = make_mesh(run.mesh)
    program = make_program(run, mesh)
    last = run.steps if steps is None else min(steps, run.steps)
    is_first = jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(Progress(last, stream=stream if is_first else None))
        signals = stack.enter_context(StopSignals())
        stack.enter_context(jax.set_mesh(mesh))
        for note in (*mesh_notes(run, mesh), *program.recipe.warnings):
            progress.warn(note)
        if mesh.size > 1:
            progress.note(f"layout\n{plain_text(layout(program.abstract))}")
        with progress.phase("checking gradients on the mesh"):
            preflight(mesh)
        # Whatever can be found wrong has been by now: from here on the folder is the run's.
        claim(workdir, run, resume=resume, overwrite=overwrite)
        checkpoints = stack.enter_context(
            Checkpoints(workdir, keep=run.checkpoint.keep, keep_best=run.checkpoint.keep_best)
        )
        state, is_evaluated = _first_state(program, checkpoints, progress)
        step = int(state["step"])
        history = stack.enter_context(History(workdir, run, start=step)) if is_first else None
        for note in history.notes if history else ():
            progress.note(note)
        loop = _Loop(program, held_out, workdir, checkpoints, progress, history)
        if is_first:
            stack.enter_context(noted(workdir, step, lambda: loop.step))
        with program.feed(source, step) as batches:
            state, stopped = loop.carry_out(state, is_evaluated, batches, last, signals, profile)
        return Result(
            workdir=workdir,
            step=int(state["step"]),
            steps=run.steps,
            seconds=time.perf_counter() - started,
            images_per_second=loop.meter.images_per_second,
            parameters=sum(leaf.size for leaf in jax.tree.leaves(program.abstract["params"])),
            evaluation=loop.evaluation,
            stopped=stopped,
        )


def _first_state(
    program: Program, checkpoints: Checkpoints, progress: Progress
) -> tuple[State, bool]:
    """The state to begin with, and whether it needs no evaluation any more.

    A checkpoint in the run's folder comes before given weights, and those before random ones.
    """
    with progress.phase("looking for a checkpoint"):
        restored = checkpoints.restore(program.abstract)
    if restored:
        for step, reason in restored.damaged:
            progress.warn(f"the checkpoint of step {step} is damaged and passed over: {reason}")
        progress.note(f"going on from step {restored.step}")
        return restored.state, bool(restored.metrics)
    with progress.phase("creating the network"):
        state = jax.block_until_ready(program.init())
    if program.run.model.weights:
        with progress.phase(f"loading {program.run.model.weights}"):
            state, notes = with_weights(state, program)
        for note in notes:
            progress.note(note)
    return state, True


class _Loop:
    """The loop and what it reports to."""

    def __init__(
        self,
        program: Program,
        held_out: Source,
        workdir: Path,
        checkpoints: Checkpoints,
        progress: Progress,
        history: History | None,
    ):
        self.program, self.run, self.held_out = program, program.run, held_out
        self.workdir, self.checkpoints = workdir, checkpoints
        self.progress, self.history = progress, history
        self.meter = Meter(self.run.train.batch_size)
        self.evaluation: dict[str, float] = {}
        self.evaluated = -1  # the step it was made at
        self.step = 0  # updates made so far

    def carry_out(
        self,
        state: State,
        is_evaluated: bool,
        batches: Batches,
        last: int,
        signals: StopSignals,
        profile: range,
    ) -> tuple[State, int | None]:
        """From the state's step to the last; the state there, and the exit code if told to stop.

        A run that is told to stop saves at once. The evaluation that may have been due is left to
        the one that resumes it, hence `is_evaluated`, of the state to begin with.
        """
        start, size = int(state["step"]), self.run.train.batch_size
        under_way: tuple[int, Metrics] | None = None  # a step's metrics, still on the devices
        stopped = None
        for step in range(start, last + 1):  # updates made so far
            self.step = step
            is_new, ends = step > start or not is_evaluated, step >= last
            evaluates = ends or (is_new and _is_due(step, self.run.eval_every))
            saves = is_new and (ends or _is_due(step, self.run.checkpoint_every))
            stopped = signals.asked(step)
            if evaluates or saves or stopped:
                self._report(under_way)
                under_way = None
            # The order from here on is what resuming rests on: see the top of this file.
            if evaluates and not stopped:
                stopped = self._evaluate(step, state, signals)
            if step == self.evaluated:
                saves |= is_new and self.checkpoints.would_be_best(self._merit)
            if saves or (stopped and is_new):
                self._save(step, state)
            if ends or stopped:
                break
            with self.meter.waiting():
                batch = self.program.put(next(batches), size)
            with _profiled(step, profile, self.workdir), self._first(step == start):
                state, metrics = self.program.train_step(state, batch)
            self._report(under_way)
            under_way = step + 1, metrics
        return state, stopped

    def _report(self, under_way: tuple[int, Metrics] | None) -> None:
        """Wait for a step's metrics, show them, write them down, and heed what they say."""
        if under_way is None:
            return
        step, metrics = under_way
        values = {key: value.item() for key, value in jax.device_get(metrics).items()}
        values |= self.meter.stepped()
        self.progress.step(step, values)
        if self.history:
            self.history.train(step, values)
        if values["guard/in_a_row"]:
            kept = self.checkpoints.steps()
            last = f"that of step {kept[-1]}, in {self.workdir}" if kept else ""
            raise_if_diverged(values, self.run.guard.patience, step=step, checkpoint=last)

    def _evaluate(self, step: int, state: State, signals: StopSignals) -> int | None:
        """Evaluate. It is given up when this process is told to stop: then the exit code."""
        weights = {"": state["params"]} | ({AVERAGE: state["ema"]} if "ema" in state else {})
        batches = self.program.eval_steps(self.held_out)
        try:
            with self.meter.paused(), self.progress.phase("evaluating", batches) as advance:

                def go_on(count: int) -> None:
                    signals.raise_if_alone()
                    advance(count)

                found = evaluate(self.program, weights, state["stats"], self.held_out, go_on)
        except StoppedError as told:
            return told.code
        self.evaluation, self.evaluated = found, step
        self.progress.evaluated(step, found)
        if self.history:
            self.history.write(step, "eval", found)
        return None

    def _save(self, step: int, state: State) -> None:
        about = {
            "run": self.run.model_dump(mode="json"),
            "class_names": list(self.held_out.class_names),
            "nfflax": nfflax.__version__,
        }
        metrics = self._merit if step == self.evaluated else None
        with self.meter.paused():
            self.checkpoints.save(step, state, about, metrics)

    @property
    def _merit(self) -> dict[str, float]:
        """What the last evaluation found of the weights that others will use."""
        return {"top1": best(self.evaluation, "top1")}

    def _first(self, is_first: bool) -> contextlib.AbstractContextManager[object]:
        """Around a step: the first one compiles, and that is shown."""
        if is_first:
            return self.progress.phase("compiling the train step")
        return contextlib.nullcontext()


def _is_due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0


@contextlib.contextmanager
def _profiled(step: int, steps: range, workdir: Path) -> Iterator[None]:
    """Around a step: the profiler runs from the first of `steps` to the last."""
    if steps and step == steps[0]:
        jax.profiler.start_trace(workdir / PROFILE)
    with jax.profiler.StepTraceAnnotation("train", step_num=step):
        yield
    if steps and step == steps[-1]:
        jax.profiler.stop_trace()
