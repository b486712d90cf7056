"""What a person sees while a run goes on.

On a terminal, a bar that stays at the bottom while messages scroll above it. Elsewhere, in a log
file or under Slurm, plain ASCII lines. Every message begins with the time since the start.
"""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import IO

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from nfflax.train.history import AVERAGE, best
from nfflax.train.meter import duration

_SECONDS_PER_LINE = 10  # between two plain lines on how far a run is
_FRAMES_PER_SECOND = 5
_WIDEST, _NARROWEST = 40, 8  # characters of the bar; with less room it is left out


class Progress:
    """Shows how far a run is, and what it has to say. A context manager.

    `total` is the step that the run ends at. Without a stream, nothing is shown.
    """

    def __init__(
        self,
        total: int,
        *,
        stream: IO[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._stream, self._clock, self._start = stream, clock, clock()
        self._status = _Status(total, clock)
        self._live = _live(self._status, stream)
        self._next_line = self._start + _SECONDS_PER_LINE
        self._last_line = -1

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Tell that `step` updates are made, with the last one's metrics. Call it at every step."""
        self._status.step, self._status.values = step, values
        if self._live is None and self._clock() >= self._next_line:
            self._say_step()

    @contextlib.contextmanager
    def phase(self, what: str, total: int = 0) -> Iterator[Callable[[int], None]]:
        """Around something that takes a while: "compiling the train step".

        Yields a function to call with the number of pieces, out of `total`, that got done.
        """
        outer, phase = self._status.phase, _Phase(what, total, self._clock())
        self._status.phase = phase
        if self._live is None:
            self._say(what)
        try:
            yield phase.advance
        finally:
            self._status.phase = outer

    def evaluated(self, step: int, values: Mapping[str, float]) -> None:
        """Tell what an evaluation found. The average's numbers come first, where there are any."""
        self._status.evaluated = f"eval {best(values, 'top1'):.2%} at {step}"
        self._say("  ".join([f"evaluated step {step}", *_findings(values)]), "green")

    def note(self, text: str) -> None:
        """Tell something by the way."""
        self._say(text)

    def warn(self, text: str) -> None:
        """Tell something that should not be overlooked."""
        self._say(f"warning: {text}", "yellow")

    def _say_step(self) -> None:
        self._next_line = self._clock() + _SECONDS_PER_LINE
        self._last_line = self._status.step
        self._say("  ".join([*self._status.position, *self._status.pace, *self._status.learning]))

    def _say(self, text: str, style: str = "") -> None:
        passed = int(self._clock() - self._start)
        since = f"{passed // 3600}:{passed // 60 % 60:02d}:{passed % 60:02d}"
        if self._live:
            line = Text.assemble((since, "dim"), "  ", (text, style))
            self._live.console.print(line, soft_wrap=True)
        elif self._stream:
            try:
                print(since, text, sep="  ", file=self._stream, flush=True)
            except OSError:  # a closed pipe, a full disk: training goes on though nobody can watch
                self._stream = None

    def __enter__(self) -> "Progress":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()
        if self._status.step != self._last_line:
            self._say_step()


@dataclasses.dataclass
class _Phase:
    """Something that takes a while, and how much of it is done."""

    what: str
    total: int
    start: float
    done: int = 0

    def advance(self, count: int) -> None:
        self.done += count


@dataclasses.dataclass
class _Status:
    """Where a run stands. rich draws it, a few times per second, as the lines at the bottom."""

    total: int
    clock: Callable[[], float]
    step: int = -1  # none yet
    values: Mapping[str, float] = dataclasses.field(default_factory=dict)
    evaluated: str = ""
    phase: _Phase | None = None

    @property
    def position(self) -> list[str]:
        return [f"step {self.step}/{self.total}", f"{self.step / max(self.total, 1):.0%}"]

    @property
    def pace(self) -> list[str]:
        if "step_time" not in self.values:
            return []
        rate = self.values["images_per_second"]
        left = duration(self.values["step_time"] * (self.total - self.step))
        return [f"{rate:,.{0 if rate >= 10 else 1}f} images/s", f"{left} left"]

    @property
    def learning(self) -> list[str]:
        formats = {
            "loss": "loss {:.3f}",
            "top1": "top1 {:.1%}",
            "learning_rate": "rate {:.3g}",
            "clipped": "clipped {:.0%}",
            "input_wait": "input wait {:.0%}",
        }
        words = [text.format(self.values[k]) for k, text in formats.items() if k in self.values]
        skipped = self.values.get("guard/skipped", 0)
        return [*words, f"skipped {skipped:.0f}"] if skipped else words

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.step >= 0:
            yield self._bar(options.max_width)
            facts = [self.evaluated] if self.evaluated else []
            yield _fitting([*facts, *self.learning], options.max_width, "dim")
        if phase := self.phase:
            count = f"  {phase.done}/{phase.total}" if phase.total else ""
            passed = duration(self.clock() - phase.start)
            dots = "line" if options.ascii_only else "dots"
            spinner = Spinner(dots, Text.assemble(phase.what, (f"{count}  {passed}", "dim")))
            # The spinner is made anew for every frame, so it is told when it began to turn.
            spinner.start_time = console.get_time() - (self.clock() - phase.start)
            yield spinner

    def _bar(self, width: int) -> RenderableType:
        left, right = "  ".join(self.position), "  ".join(self.pace)
        room = min(width - len(left) - len(right) - 4, _WIDEST)
        if room < _NARROWEST:
            return _fitting([*self.position, *self.pace], width, "bold")
        line = Table.grid(padding=(0, 2, 0, 0))
        bar = ProgressBar(total=max(self.total, 1), completed=self.step, width=room)
        line.add_row(Text(left, "bold"), bar, Text(right, "cyan"))
        return line


def _live(status: _Status, stream: IO[str] | None) -> Live | None:
    """rich's display on a terminal, None elsewhere."""
    if stream is None or not stream.isatty():  # rich would take FORCE_COLOR, as CI has it, for one
        return None
    console = Console(file=stream, markup=False, emoji=False, highlight=False)
    if console.is_dumb_terminal:
        return None
    return Live(
        status,
        console=console,
        refresh_per_second=_FRAMES_PER_SECOND,
        transient=True,
        redirect_stdout=sys.stdout.isatty(),  # a pipe gets what is printed, and nothing else
    )


def _fitting(words: list[str], width: int, style: str) -> Text:
    """As many of the words as there is room for, two spaces apart."""
    while words and len("  ".join(words)) > width:
        words = words[:-1]
    return Text("  ".join(words), style)


def _findings(values: Mapping[str, float]) -> Iterator[str]:
    """An evaluation in a few words each."""
    raw = f" (raw {values['top1']:.2%})" if f"{AVERAGE}top1" in values else ""
    yield f"top1 {best(values, 'top1'):.2%}{raw}"
    yield f"top5 {best(values, 'top5'):.2%}"
    yield f"loss {best(values, 'loss'):.4g}"
    yield f"{values['examples']:.0f} images in {duration(values['seconds'])}"
