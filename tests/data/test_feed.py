"""What a run feeds to its network: the tables of its file become a stream and an augmentation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data_streams import assert_equal, numbered

from nfflax.data import ArraySource, DataError, TrainView, open_source, train_batches
from nfflax.data.augment import Mix, RandAugment, augment
from nfflax.data.feed import augmentation, mix_of, randaugment_of, sized, train_feed
from nfflax.spec.augment import Augment
from nfflax.spec.load import load_run

SOURCE = numbered(10)
RUN = load_run(
    "digits",
    {"train.batch_size": 4, "train.seed": 5, "model.set.resolution.train": 8, "data.workers": 0},
)


def test_the_table_says_what_is_mixed_and_distorted():
    assert mix_of(Augment()) == Mix() == Mix(0.2, cutmix=True)
    assert mix_of(Augment(mixup=0)) == Mix(0, cutmix=True)
    assert mix_of(Augment(mixup=0, cutmix=False)) is None
    assert randaugment_of(Augment()) == RandAugment.named("405")
    table = Augment(layers=1, magnitude=2.5, numerics="pillow")
    assert randaugment_of(table) == RandAugment(1, 2.5, "pillow")
    assert randaugment_of(Augment(layers=0)) is None


def test_epochs_are_passes_over_the_source():
    assert sized(RUN, SOURCE).steps_per_epoch == 10 / 4
    assert sized(load_run(RUN, {"train.examples": 8}), SOURCE).steps_per_epoch == 2


def test_the_feed_is_the_stream_that_the_tables_describe():
    view = TrainView(8, area=0.8, flip=False)
    expected = train_batches(SOURCE, view, batch_size=4, seed=5, step=3, partners=True)
    with expected, train_feed(RUN, SOURCE, step=3) as batches:
        assert_equal([next(batches)], [next(expected)])
    batch = load_run(RUN, {"augment.partners": "batch"})
    with train_feed(batch, SOURCE, host=1, hosts=2) as batches:
        images = next(batches)
    assert images.keys() == {"images", "labels"}
    assert images["images"].shape == (2, 8, 8, 3)


def test_the_augmentation_follows_seed_and_step():
    changes = {"augment.layers": 1, "augment.magnitude": 9.0, "model.dtype": "bfloat16"}
    run = load_run(RUN, changes)
    rng = np.random.default_rng(0)
    batch = {
        key: jnp.asarray(rng.integers(0, 256 if "images" in key else 10, shape), kind)
        for key, shape, kind in (
            ("images", (4, 8, 8, 3), jnp.uint8),
            ("labels", (4,), jnp.int32),
            ("mix_images", (4, 8, 8, 3), jnp.uint8),
            ("mix_labels", (4,), jnp.int32),
        )
    }
    work = jax.jit(augmentation(run))
    first, again, later = (jax.device_get(work(batch, step)) for step in (7, 7, 8))
    expected = jax.jit(
        lambda key: augment(
            key,
            **batch,
            preprocess=run.spec.preprocess,
            mix=Mix(),
            randaugment=RandAugment(1, 9),
            dtype="bfloat16",
        )
    )(jax.random.fold_in(jax.random.key(5), 7))
    assert_equal([first, again], [jax.device_get(expected)] * 2)
    assert not np.array_equal(first["ratio"], later["ratio"])
    assert not np.array_equal(first["images"], later["images"])


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({"model.set.stem.in_channels": 4}, {"stem.in_channels", "preprocess.mean"}),
        ({"model.set.stem.in_channels": 1}, {"preprocess.mean", "preprocess.std"}),
        ({"model.set.head.num_classes": 9}, {"head.num_classes"}),
    ],
)
def test_networks_that_cannot_take_the_source(changes, keys):
    with pytest.raises(DataError) as caught:
        train_feed(load_run(RUN, changes), SOURCE)
    assert {f"model.set.{key}" for key in keys} <= {p.key for p in caught.value.problems}
    assert {problem.file for problem in caught.value.problems} == {"run digits"}


def test_networks_that_can():
    grey = ArraySource(np.zeros((4, 9, 9), np.uint8), np.arange(4))
    changes = {"stem.in_channels": 1, "preprocess.mean": 0.5, "preprocess.std": 0.25}
    changes |= {"head.num_classes": 0}
    run = load_run(RUN, {f"model.set.{key}": value for key, value in changes.items()})
    with train_feed(run, grey) as batches:
        assert next(batches)["images"].shape == (4, 8, 8, 1)


def test_augmented_batches_are_the_same_for_any_workers_hosts_and_start():
    """Bit for bit, from the source to what the network gets."""
    run = load_run("digits", {"train.batch_size": 8, "augment.layers": 2, "augment.magnitude": 1.0})
    source = open_source(run.data, "train")
    augmented = jax.jit(augmentation(run))

    def seen(step, count, **how):
        workers, hosts = how.get("workers", 1), how.get("hosts", 1)
        changed = load_run(run, {"data.workers": workers})
        feeds = [train_feed(changed, source, step=step, host=h, hosts=hosts) for h in range(hosts)]
        batches = []
        for t in range(step, step + count):
            parts = [next(feed) for feed in feeds]
            whole = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
            batches.append(jax.device_get(augmented(whole, t)))
        for feed in feeds:
            feed.close()
        return batches

    wanted = seen(0, 4)
    for found in (seen(0, 4, workers=0), seen(0, 4, workers=3), seen(0, 4, hosts=2)):
        jax.tree.map(np.testing.assert_array_equal, found, wanted)
    jax.tree.map(np.testing.assert_array_equal, seen(2, 2), wanted[2:])
    assert not np.array_equal(wanted[0]["images"], wanted[1]["images"])
