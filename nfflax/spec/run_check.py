"""Rules that join several keys of a run: a batch can be divided and mixed, a warm-up fits."""

from collections.abc import Iterator, Mapping
from typing import Any

from nfflax.spec.augment import Augment
from nfflax.spec.base import Table
from nfflax.spec.check import Finding
from nfflax.spec.run import Schedule, Train


def problems_between(tables: Mapping[str, Any]) -> list[Finding]:
    """Every broken rule among the tables that are themselves valid; the others are skipped."""
    train, schedule = tables.get("train"), tables.get("schedule")
    found: list[Finding] = []
    for name, table in tables.items():
        if isinstance(table, Table):
            found += _two_units(name, table)
    if isinstance(train, Train):
        found += _uneven_microbatches(train)
        if isinstance(augment := tables.get("augment"), Augment):
            found += _nobody_to_mix_with(train, augment)
    if isinstance(schedule, Schedule) and isinstance(train, Train):
        found += _long_warmup(train, schedule)
        found += _rates_above_the_peak(train, schedule)
    return found


def _two_units(name: str, table: Table) -> Iterator[Finding]:
    for one, other in table.either:
        value, same = getattr(table, one), getattr(table, other)
        if value and same:
            message = f"{name}.{other} = {same:.10g} says the same in another unit"
            yield Finding(f"{name}.{one}", message, value, "one of the two; set the other to 0")


def _uneven_microbatches(train: Train) -> Iterator[Finding]:
    if train.batch_size % train.accumulate:
        yield Finding(
            "train.accumulate",
            f"does not divide train.batch_size = {train.batch_size}",
            train.accumulate,
            f"a divisor of {train.batch_size}",
            against="train.batch_size",
        )


def _nobody_to_mix_with(train: Train, augment: Augment) -> Iterator[Finding]:
    if train.batch_size == 1 and augment.mixes and augment.partners == "batch":
        yield Finding(
            "augment.partners",
            "a batch of one image has no partner in it",
            augment.partners,
            '"fresh", or neither mixup nor cutmix',
            against="train.batch_size",
        )


def _long_warmup(train: Train, schedule: Schedule) -> Iterator[Finding]:
    run, warmup, unit = train.length, schedule.warmup(train), "steps"
    if run is None and not schedule.warmup_steps:  # epochs compare whatever their length
        run, warmup, unit = train.epochs, schedule.warmup_epochs, "epochs"
    if run and warmup and warmup > run:
        key = "warmup_steps" if schedule.warmup_steps else "warmup_epochs"
        yield Finding(
            f"schedule.{key}",
            f"the warm-up of {warmup:.10g} {unit} is longer than the run of {run:.10g}",
            getattr(schedule, key),
            "a warm-up that ends within the run",
            against="train.steps" if train.steps else "train.epochs",
        )


def _rates_above_the_peak(train: Train, schedule: Schedule) -> Iterator[Finding]:
    peak = schedule.peak(train)
    for key in ("start", "end"):
        if (rate := getattr(schedule, key)) > peak:
            yield Finding(
                f"schedule.{key}",
                f"is above the peak learning rate, {peak:g} for a batch of {train.batch_size}",
                rate,
                f"a number from 0 to {peak:g}",
                against="schedule.learning_rate",
            )
