"""Rates from a clock that the test turns."""

import pytest

from nfflax.train.meter import Meter, duration


class Clock:
    """A clock that stands still unless told."""

    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_rates_without_compilation_and_pauses(clock):
    meter = Meter(batch_size=50, clock=clock)
    clock.now += 60  # the first step compiles
    assert meter.stepped() == {}
    assert meter.images_per_second is None
    for _ in range(10):
        with meter.paused():
            clock.now += 1000  # evaluates, saves
        with meter.waiting():
            clock.now += 0.5
        clock.now += 1.5
        rates = meter.stepped()
        assert rates == pytest.approx(
            {"step_time": 2.0, "images_per_second": 25.0, "input_wait": 0.25}
        )
    assert meter.images_per_second == pytest.approx(25.0)


def test_a_reader_that_stalls_now_and_then_costs_what_it_costs(clock):
    meter = Meter(batch_size=1, clock=clock)
    meter.stepped()
    rates = {}
    for step in range(100):
        with meter.waiting():
            clock.now += 9.0 if step % 10 == 0 else 0.0
        clock.now += 0.1
        rates = meter.stepped()
    assert rates == pytest.approx({"step_time": 1.0, "images_per_second": 1.0, "input_wait": 0.9})


def test_rates_are_those_of_late_and_the_total_is_of_the_run(clock):
    meter = Meter(batch_size=1, clock=clock)
    rates = meter.stepped()
    for seconds in [3.0] * 100 + [1.0] * 100:
        clock.now += seconds
        rates = meter.stepped()
    assert rates["step_time"] == pytest.approx(1.0)
    assert meter.images_per_second == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0s"),
        (1.24, "1.2s"),
        (9.96, "10s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (3599.6, "1h00m"),
        (11_220, "3h07m"),
        (86_400 * 4 + 7300, "4d02h"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text
