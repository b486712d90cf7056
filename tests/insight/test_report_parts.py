"""What the report is made of: axes and thinned lines, numbers in words, settings compared."""

import math

import numpy as np
import pytest

from nfflax.insight.report_compare import run_departure, spec_departure
from nfflax.insight.report_scale import fitted, number, thinned, tick_labels
from nfflax.insight.spp import input_of
from nfflax.spec.load import load_run, load_spec
from nfflax.spec.plan import plan


@pytest.mark.parametrize("name", ["nfnet_nano", "nfnet_f0", "nfnet_f6"])
def test_a_measurement_takes_bounded_work(name: str):
    spec = load_spec(name)
    images, size = input_of(spec)
    assert 1 <= images <= 8
    assert size <= spec.resolution.train
    assert images * plan(spec, resolution=size).macs() <= 16e9


def test_a_run_is_held_against_its_preset_or_the_nearest():
    run = load_run("nfnet_f3", {"ema.decay": 0.9, "model.set.head.dropout": 0.1})
    departure = run_departure(run)
    assert departure.preset == "nfnet_f3"
    assert departure.differences == (("ema.decay", ("0.99999", "0.9")),)
    assert spec_departure(run.spec).differences == (("head.dropout", ("0.4", "0.1")),)
    renamed = load_run("nf_resnet", {"name": "mine", "train.seed": 7})
    assert run_departure(renamed).preset == "nf_resnet"
    shipped = load_run("digits", {"train.examples": 1437})
    assert run_departure(shipped).differences == ()


def test_long_lines_are_thinned_and_keep_their_extremes():
    x = np.arange(100_000.0)
    y = np.sin(x / 5000)
    y[[777, 54_321]] = 9, -9
    y[5] = np.nan
    thin_x, thin_y = thinned(x, y)
    assert len(thin_x) <= 1000
    assert (np.diff(thin_x) > 0).all()
    assert {0.0, 777.0, 54_321.0, 99_999.0} <= set(thin_x)
    np.testing.assert_array_equal(y[thin_x.astype(int)], thin_y)


@pytest.mark.parametrize(
    ("low", "high", "is_log", "labels"),
    [
        (0, 112_602, False, ["0", "50,000", "100,000"]),
        (0.5, 1, False, ["0.6", "0.8", "1.0"]),
        (0.009, 11, True, ["0.01", "0.1", "1", "10"]),
        (0.0002, 0.0009, False, ["2e-4", "4e-4", "6e-4", "8e-4"]),
    ],
)
def test_ticks_are_round(low: float, high: float, is_log: bool, labels: list[str]):
    scale = fitted([np.array([low, high])], is_log=is_log)
    inside = [tick for tick in scale.ticks(4) if low <= tick <= high]
    assert tick_labels(inside) == labels


@pytest.mark.parametrize("value", [0.0, 5.0, -3.0, 1e-12, 1e12])
def test_an_axis_has_a_length_around_one_value(value: float):
    scale = fitted([np.array([value])])
    assert scale.low < value < scale.high
    assert 0 < scale.place(np.array(value)) < 1


def test_numbers_in_a_few_characters():
    shown = [number(0.98765, "share"), number(1234.6, "count"), number(2.2, "loss")]
    assert shown == ["98.77%", "1,235", "2.2000"]
    assert [number(v) for v in (0, 0.00012, 0.5, 123456, math.nan)] == [
        "0", "1.2e-4", "0.5", "1.23e5", "not finite"]  # fmt: skip
