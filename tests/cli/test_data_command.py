"""`nfflax data`: what it prints, what it writes, and how it ends when it cannot."""

import json

import pytest


@pytest.fixture
def toy(run, tmp_path):
    folder = tmp_path / "toy"
    words = "--classes 3 --train 12 --test 5 --size 32".split()
    ran = run("data", "generate", folder, *words)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out == f"{folder}  12 + 5 images in 3 classes\n"
    return folder


def test_inspect(run, toy):
    ran = run("data", "inspect", toy)
    assert (ran.code, ran.err) == (0, "")
    header, _, test, train = ran.out.splitlines()
    assert header.split() == "split images classes opened kinds short side".split()
    assert test.split() == "test 5 3 5 5 JPEG RGB 32 to 32 px".split()
    assert train.split() == "train 12 3 12 12 JPEG RGB 32 to 32 px".split()


def test_inspect_as_json(run, toy):
    (report,) = json.loads(run("data", "inspect", toy, "--split", "test", "--json").out)
    assert report == {
        "split": "test",
        "images": 5,
        "classes": 3,
        "opened": 5,
        "kinds": {"JPEG RGB": 5},
        "short_side": {"least": 32, "most": 32},
    }


def test_inspect_finds_damaged_images(run, toy):
    files = sorted((toy / "train").rglob("*.jpeg"))
    files[3].write_bytes(files[3].read_bytes()[:-40])
    assert run("data", "inspect", toy).code == 0  # looks at headers only
    files[5].write_bytes(b"")
    for json_too in ((), ("--json",)):
        ran = run("data", "inspect", toy, "--verify", *json_too)
        assert ran.code == 2
    problems = json.loads(ran.out)["problems"]
    assert [problem["file"] for problem in problems] == [str(files[3]), str(files[5])]
    assert problems[0]["message"].startswith("is damaged: image file is truncated")


def test_pack_and_look_again(run, toy, tmp_path):
    packed = tmp_path / "packed"
    ran = run("data", "pack", toy, packed, "--shard-images", "5")
    assert (ran.code, ran.err) == (0, "")
    assert [line.split(",")[0] for line in ran.out.splitlines()] == [
        "test  5 images in 1 files",
        "train  12 images in 3 files",
    ]
    again = json.loads(run("data", "pack", toy, packed, "--shard-images", "5", "--json").out)
    assert [(report["split"], report["files"]) for report in again] == [("test", 1), ("train", 3)]
    reports = [
        json.loads(run("data", "inspect", s, "--verify", "--json").out) for s in (toy, packed)
    ]
    assert reports[0] == reports[1]
    shard = packed / "train-00001.arrayrecord"
    data = bytearray(shard.read_bytes())
    data[-100] ^= 1
    shard.write_bytes(data)
    ran = run("data", "inspect", packed, "--verify")
    assert ran.code == 2
    assert "its checksum is not the manifest's" in ran.err


def test_digits(run, tmp_path):
    (report,) = json.loads(run("data", "pack", "digits", tmp_path, "--split", "test", "--json").out)
    assert (report["images"], report["files"]) == (360, 1)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["inspect", "digitz"], "did you mean: digits"),
        (["inspect", "digits", "--split", "tset"], "did you mean: test"),
        (["inspect", ""], "must have 1 to 1000 characters"),
        (["inspect", "tfds:x"], 'pip install "nfflax[tfds]"'),
        (["pack", "digits", "there", "--shard-images", "0"], "is no whole number from 1"),
        (["generate", "."], "exists already"),
    ],
)
def test_mistakes_end_with_2(run, monkeypatch, tmp_path, words, says):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "tensorflow_datasets", None)
    ran = run("data", *words)
    assert ran.code == 2
    assert says in ran.err
    assert not list(tmp_path.iterdir())
