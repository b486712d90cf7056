"""events.jsonl: every start and end of a run's processes, also of those that failed."""

import pytest

from nfflax.optim.guard import DivergedError
from nfflax.train.errors import TrainError
from nfflax.train.events import EVENTS, noted, read_events


def test_starts_and_ends_are_told_in_order(tmp_path):
    with noted(tmp_path, 0, lambda: 40):
        (start,) = read_events(tmp_path / EVENTS)  # it is there while the run goes on
    with pytest.raises(DivergedError), noted(tmp_path, 40, lambda: 55):
        raise DivergedError("the loss is infinite")
    told = read_events(tmp_path / EVENTS)
    assert start == told[0]
    assert (start["devices"], start["device"], start["processes"]) == (8, "cpu", 1)
    assert [(event["event"], event["step"]) for event in told] == [
        ("start", 0), ("end", 40), ("start", 40), ("end", 55)]  # fmt: skip
    assert [event.get("error") for event in told] == [
        None, None, None, "DivergedError: the loss is infinite"]  # fmt: skip
    assert sorted(event["time"] for event in told) == [event["time"] for event in told]


def test_damaged_lines_are_left_out_and_a_missing_file_is_empty(tmp_path):
    path = tmp_path / EVENTS
    assert read_events(path) == []
    path.write_bytes(b'{"event": "end", "step": 1}\n{"event": "sta\n\xff\n7\n{"event": "noise"}\n')
    assert read_events(path) == [{"event": "end", "step": 1}]


def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path):
    (tmp_path / EVENTS).mkdir()
    with pytest.raises(TrainError, match=r"events\.jsonl cannot be written: Is a directory"):
        noted(tmp_path, 0, lambda: 0).__enter__()
