"""The stream: the same for any threads, hosts and starting step; exact in evaluation.

The sources are small; where it matters, an image's pixels say which image it is.
"""

import numpy as np
import pytest
from data_streams import (
    BATCH,
    HERE,
    IMAGES,
    SOURCE,
    STEPS,
    VIEW,
    WHOLE,
    FileSource,
    assert_equal,
    evaluate,
    jpegs,
    numbered,
    take,
)

from nfflax.data import (
    ArraySource,
    Data,
    DataError,
    ImageError,
    Record,
    TrainView,
    eval_batches,
    train_batches,
)
from nfflax.data.pipeline import MAX_SKIPPED


@pytest.fixture(scope="module")
def reference() -> list[dict[str, np.ndarray]]:
    return take()


# The same stream


def test_batches_are_uint8_and_int32(reference):
    described = {key: (value.shape, str(value.dtype)) for key, value in reference[0].items()}
    images, labels = ((BATCH, 6, 6, 3), "uint8"), ((BATCH,), "int32")
    mixed = {"mix_images": images, "mix_labels": labels}
    assert described == {"images": images, "labels": labels} | mixed
    assert take(1, partners=False)[0].keys() == {"images", "labels"}


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_threads_change_nothing(reference, workers: int):
    assert_equal(take(data=Data(workers=workers)), reference)


@pytest.mark.parametrize("hosts", [2, 4, 8])
def test_hosts_share_the_global_batch(reference, hosts: int):
    parts = [take(host=host, hosts=hosts) for host in range(hosts)]
    whole = [
        {key: np.concatenate([batch[key] for batch in step]) for key in step[0]}
        for step in zip(*parts, strict=True)
    ]
    assert_equal(whole, reference)


@pytest.mark.parametrize("step", [1, 4, 5, STEPS - 1])
def test_a_stream_goes_on_at_any_step(reference, step: int):
    assert_equal(take(STEPS - step, step=step, data=Data(workers=2)), reference[step:])


def test_large_batches_are_made_in_pieces():
    """67 rows cannot be divided, 66 can: neither is seen in the stream."""
    source = numbered(100)
    rows = [
        np.concatenate([batch["images"] for batch in take(6, source, batch_size=size)])
        for size in (33, 66, 67)
    ]
    for other in rows[1:]:
        np.testing.assert_array_equal(rows[0], other[: len(rows[0])])


def test_another_seed_is_another_stream(reference):
    assert not np.array_equal(take(1, seed=4)[0]["images"], reference[0]["images"])


# Epochs and partners


def labels(key: str = "labels", steps: int = STEPS, **options) -> np.ndarray:
    stream = take(steps, numbered(IMAGES), **options)
    for batch in stream:
        np.testing.assert_array_equal(batch["images"][:, 0, 0, 0], batch["labels"])
    return np.concatenate([batch[key] for batch in stream])


def test_every_epoch_shows_every_image_once_in_another_order():
    seen = labels(steps=2 * IMAGES // BATCH + 1, partners=False)
    first, second = seen[:IMAGES], seen[IMAGES : 2 * IMAGES]
    assert sorted(first) == sorted(second) == list(range(IMAGES))
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, np.arange(IMAGES))


def test_an_image_in_a_new_epoch_has_a_new_view(reference):
    with train_batches(jpegs(1), VIEW, batch_size=8, data=HERE) as batches:
        views = {image.tobytes() for _ in range(4) for image in next(batches)["images"]}
    assert len(views) > 30


def test_partners_are_other_images():
    """Pairs straddle epochs, as the number of images is odd; even then no image meets itself."""
    for images in (2, 3, IMAGES):
        stream = take(200, numbered(images))
        for batch in stream:
            np.testing.assert_array_equal(batch["mix_images"][:, 0, 0, 0], batch["mix_labels"])
            assert (batch["labels"] != batch["mix_labels"]).all()
    pairs = np.stack([labels(), labels("mix_labels")], -1).ravel()
    assert len(set(pairs[: IMAGES - 1])) == IMAGES - 1  # one permutation serves both


def test_partners_need_two_images():
    with pytest.raises(DataError, match="at least 2 images"):
        take(1, numbered(1))


# Evaluation


@pytest.mark.parametrize("count", [1, BATCH - 1, BATCH, IMAGES])
def test_evaluation_sees_every_image_once(count: int):
    for hosts in (1, 2, 4):
        parts = [evaluate(numbered(count), host=h, hosts=hosts) for h in range(hosts)]
        assert {len(part) for part in parts} == {-(-count // BATCH)}
        stream = [batch for step in zip(*parts, strict=True) for batch in step]
        assert {batch["images"].shape for batch in stream} == {(BATCH // hosts, 4, 4, 3)}
        valid = np.concatenate([batch["valid"] for batch in stream])
        assert valid.dtype == bool
        seen = np.concatenate([batch["labels"] for batch in stream])
        shown = np.concatenate([batch["images"][:, 0, 0, 0] for batch in stream])
        assert seen[valid].tolist() == shown[valid].tolist() == list(range(count))
        assert not seen[~valid].any()
        assert not shown[~valid].any()


def test_workers_change_nothing_in_evaluation():
    assert_equal(evaluate(SOURCE, data=Data(workers=4)), evaluate(SOURCE))


# Images that cannot be used


def damaged(*bad: int) -> FileSource:
    source = jpegs(IMAGES)
    for number in bad:
        source.files[number] = b"unreadable" if number % 2 else source.files[number][:-30]
    return source


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_ends_the_run(workers: int):
    with pytest.raises(DataError, match=r"(?s)4\.jpeg.*is damaged.*on_error = \"skip\""):
        take(STEPS, damaged(4), data=Data(workers=workers))
    with pytest.raises(DataError, match=r"5\.jpeg.*\n.*cannot be read"):
        evaluate(damaged(5))


def test_a_bad_image_is_replaced_by_the_next_good_one():
    labelled = damaged(4, 5, IMAGES - 1)
    options = {"batch_size": 1, "partners": False, "data": Data(workers=0, on_error="skip")}
    good = take(IMAGES, batch_size=1, partners=False)
    with train_batches(labelled, VIEW, seed=3, **options) as batches:
        replaced = [next(batches) for _ in range(IMAGES)]
        assert batches.skipped == 4  # 4 leads to 5 leads to 6; the last leads to the first
    changed = [
        not np.array_equal(a["images"], b["images"]) for a, b in zip(good, replaced, strict=True)
    ]
    assert sum(changed) == 3
    again = take(IMAGES, labelled, **options)
    assert_equal(again, replaced)


def test_a_replacement_is_no_partner_of_itself():
    class OneBad(ArraySource):
        def __getitem__(self, index: int) -> Record:
            if index == 1:
                raise ImageError("is bad")
            return super().__getitem__(index)

    source = OneBad(np.zeros((3, 4, 4), np.uint8), np.arange(3))
    for batch in take(50, source, data=Data(workers=0, on_error="skip")):
        assert (batch["labels"] != batch["mix_labels"]).all()
        assert 1 not in batch["labels"]


def test_a_bad_image_does_not_count_in_evaluation():
    source = damaged(4, 5)
    with eval_batches(source, WHOLE, batch_size=BATCH, data=Data(on_error="skip")) as batches:
        valid = np.concatenate([batch["valid"] for batch in batches])
        assert batches.skipped == 2
    assert np.flatnonzero(~valid[:IMAGES]).tolist() == [4, 5]


def test_data_without_good_images_is_given_up():
    source = FileSource([b"no image"] * (2 * MAX_SKIPPED))
    with pytest.raises(DataError, match=f"{MAX_SKIPPED - 1} before it are no better"):
        take(1, source, data=Data(workers=0, on_error="skip"))


# What is asked for


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"batch_size": 9, "hosts": 2}, "a multiple of the number of hosts, 2"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"host": 2, "hosts": 2}, "0 to 1"),
    ],
)
def test_batches_that_cannot_be_shared(options, says: str):
    with pytest.raises(DataError) as caught:
        take(1, **options)
    assert says in str(caught.value)


def test_grey_images_for_a_network_of_one_channel():
    with train_batches(SOURCE, TrainView(6, channels=1), batch_size=2, data=HERE) as batches:
        assert next(batches)["images"].shape == (2, 6, 6, 1)
