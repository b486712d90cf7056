"""What is shown: plain lines in a log, a bar on a terminal, nothing without a stream."""

import io
import re
import sys

import pytest

from nfflax.train.progress import Progress

TRAIN = {
    "loss": 0.51234,
    "top1": 0.75,
    "learning_rate": 0.1,
    "clipped": 0.125,
    "images_per_second": 1234.5,
    "step_time": 0.5,
    "input_wait": 0.031,
    "guard/skipped": 0,
    "guard/norm": 2.0,
}
EVAL = {"loss": 0.5, "top1": 0.9, "top5": 0.99, "examples": 360, "seconds": 1.25}
AVERAGE = {"ema/loss": 0.25, "ema/top1": 0.9861, "ema/top5": 1.0}


class Clock:
    """A clock that stands still unless told."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    """Keeps what it is sent, and says that it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return Terminal()


def seen(terminal) -> str:
    """What was sent to a terminal, without colours and movements."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())


def test_a_log_file_gets_plain_lines(clock):
    log = io.StringIO()
    with Progress(200, stream=log, clock=clock) as progress:
        with progress.phase("compiling the train step"):
            clock.now += 3700
        progress.step(100, TRAIN)
        progress.evaluated(100, EVAL | AVERAGE)
        progress.evaluated(100, EVAL)
        progress.note("saved step 100")
        progress.warn("step 50 is damaged")
        progress.step(200, TRAIN | {"guard/skipped": 2})
    learning = "loss 0.512  top1 75.0%  rate 0.1  clipped 12%  input wait 3%"
    average = "top1 98.61% (raw 90.00%)  top5 100.00%  loss 0.25"
    assert log.getvalue().splitlines() == [
        "0:00:00  compiling the train step",
        f"1:01:40  step 100/200  50%  1,234 images/s  50s left  {learning}",
        f"1:01:40  evaluated step 100  {average}  360 images in 1.2s",
        "1:01:40  evaluated step 100  top1 90.00%  top5 99.00%  loss 0.5  360 images in 1.2s",
        "1:01:40  saved step 100",
        "1:01:40  warning: step 50 is damaged",
        f"1:01:40  step 200/200  100%  1,234 images/s  0.0s left  {learning}  skipped 2",
    ]
    assert log.getvalue().isascii()


def test_a_log_file_gets_a_line_per_ten_seconds_and_the_last(clock):
    log = io.StringIO()
    with Progress(1000, stream=log, clock=clock) as progress:
        for step in range(1, 101):
            clock.now += 0.25
            progress.step(step, {"loss": 1.0})
    assert re.findall(r"step (\d+)/1000", log.getvalue()) == ["40", "80", "100"]


def test_nothing_is_said_twice_or_of_no_step(clock):
    log = io.StringIO()
    with Progress(10, stream=log, clock=clock) as progress:
        clock.now += 11
        progress.step(10, {})
    with Progress(10, stream=log, clock=clock):
        pass
    assert log.getvalue() == "0:00:11  step 10/10  100%\n"


@pytest.mark.usefixtures("terminal")
def test_colours_that_ci_asks_for_do_not_make_a_terminal(monkeypatch, clock):
    monkeypatch.setenv("FORCE_COLOR", "1")
    log = io.StringIO()
    with Progress(10, stream=log, clock=clock) as progress:
        progress.warn("plain")
    assert log.getvalue() == "0:00:00  warning: plain\n"


def test_a_log_that_cannot_be_written_does_not_end_a_run():
    class ClosedPipe(io.StringIO):
        def write(self, text: str, /) -> int:
            raise BrokenPipeError

    with Progress(10, stream=ClosedPipe()) as progress:
        progress.note("nobody reads this")
        progress.step(1, TRAIN)


def test_without_a_stream_nothing_is_shown(capfd):
    with Progress(10) as progress, progress.phase("evaluating") as advance:
        advance(1)
        progress.step(1, TRAIN)
        progress.evaluated(1, EVAL)
    assert capfd.readouterr() == ("", "")


def test_a_terminal_gets_a_bar_below_the_messages(terminal, clock):
    with Progress(200, stream=terminal, clock=clock) as progress:
        with progress.phase("compiling the train step"):
            clock.now += 12
            progress.note("still at it")  # which draws what is below as well
            assert "compiling the train step  12s" in seen(terminal)
        progress.step(50, TRAIN)
        progress.evaluated(50, EVAL | AVERAGE)
        with progress.phase("evaluating", total=8) as advance:
            advance(3)
            progress.note("still at it")
    text = seen(terminal)
    top, below = "step 50/200  25%  ━", "eval 98.61% at 50  loss 0.512  top1 75.0%  rate 0.1"
    assert re.search(rf"{top}.*━  1,234 images/s  1m15s left *\n{below}", text)
    assert re.search(r"evaluating  3/8  0\.0s", text)
    assert "0:00:12  evaluated step 50  top1 98.61% (raw 90.00%)" in text
    assert text.rindex("0:00:12  step 50/200  25%  1,234 images/s") > text.rindex("evaluating")
    hidden, shown = map(terminal.getvalue().rindex, ("\x1b[?25l", "\x1b[?25h"))
    assert shown > hidden  # the cursor


@pytest.mark.parametrize("width", [20, 40, 60, 80, 160])
def test_the_bar_fits_its_terminal(width, terminal, clock, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    with Progress(1_000_000, stream=terminal, clock=clock) as progress:
        progress.step(123_456, TRAIN)
        progress.note("now")
    lines = [line.strip() for line in seen(terminal).splitlines()]
    drawn = lines[lines.index("0:00:00  now") + 1 :]
    assert drawn[0].startswith("step 123456/1000000")
    assert max(map(len, drawn[:2])) <= width


def test_a_terminal_shows_stray_warnings_above_the_bar(terminal, clock, monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress(10, stream=terminal, clock=clock):
        print("a stray warning", file=sys.stderr)
        assert "a stray warning\n" in seen(terminal)
    assert sys.stderr is terminal
