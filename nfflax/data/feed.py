"""What a run feeds to its network: the host's batches and the device's augmentation, by step.

A run's seed and a step say everything about a training batch; nothing else is remembered.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from nfflax.data.augment import Mix, RandAugment, augment
from nfflax.data.errors import DataError
from nfflax.data.pipeline import Batches, train_batches
from nfflax.data.sources import Source
from nfflax.data.views import TrainView
from nfflax.spec.augment import Augment
from nfflax.spec.errors import Problem
from nfflax.spec.load import load_run
from nfflax.spec.run import Run

Augmentation = Callable[[dict[str, ArrayLike], ArrayLike], dict[str, jax.Array]]


def mix_of(table: Augment) -> Mix | None:
    """The mixing that an [augment] table asks for."""
    return Mix(table.mixup, table.cutmix) if table.mixes else None


def randaugment_of(table: Augment) -> RandAugment | None:
    """The RandAugment that an [augment] table asks for."""
    return RandAugment(table.layers, table.magnitude, table.numerics) if table.layers else None


def sized(run: Run, source: Source) -> Run:
    """The run, whose epochs are passes over the source unless it says how long they are."""
    if run.train.examples:
        return run
    return load_run(run, {"train.examples": len(source)})


def train_feed(
    run: Run, source: Source, *, step: int = 0, host: int = 0, hosts: int = 1
) -> Batches:
    """This host's batches from `step` on, as `augmentation` wants them.

    Raises DataError where the network cannot take the source's images or labels.
    """
    check_source(run, source)
    return train_batches(
        source,
        TrainView.of(run.spec, run.data),
        batch_size=run.train.batch_size,
        seed=run.train.seed,
        step=step,
        partners=run.augment.draws_partners,
        host=host,
        hosts=hosts,
        data=run.data,
    )


def augmentation(run: Run) -> Augmentation:
    """The device's part, a function of a batch and its step: `augment` with the run's settings.

    It belongs inside the jitted train step, and gives what `augment` gives.
    """
    settings = {
        "preprocess": run.spec.preprocess,
        "mix": mix_of(run.augment),
        "randaugment": randaugment_of(run.augment),
        "dtype": jnp.dtype(run.model.dtype),
    }

    def augmented(batch: dict[str, ArrayLike], step: ArrayLike) -> dict[str, jax.Array]:
        key = jax.random.fold_in(jax.random.key(run.train.seed), step)
        return augment(key, **{k: jnp.asarray(v) for k, v in batch.items()}, **settings)

    return augmented


def check_source(run: Run, source: Source) -> None:
    """That the network takes the source's images and knows its labels; raises DataError."""
    spec, name = run.spec, f"run {run.name}"
    channels, classes = spec.stem.in_channels, spec.head.num_classes
    problems = []

    def found(key: str, message: str, value: object, allowed: str) -> None:
        problems.append(Problem(name, f"model.set.{key}", message, value, allowed))

    if channels not in (1, 3):
        found("stem.in_channels", "is no number of channels that images have", channels, "1 or 3")
    for key in spec.preprocess.per_channel:
        values = getattr(spec.preprocess, key)
        if len(values) not in (1, channels):
            allowed = f"one value, or one for each of {channels} channels"
            found(f"preprocess.{key}", "does not fit the image's channels", values, allowed)
    if 0 < classes < len(source.class_names):
        message = f"is less than the {len(source.class_names)} classes of {run.data.source}"
        allowed = f"{len(source.class_names)} or more, or 0"
        found("head.num_classes", message, classes, allowed)
    if problems:
        raise DataError(problems)
