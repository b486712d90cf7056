"""`nfflax data`: what it prints, what it writes, and how it ends when it cannot."""

import json

import pytest
from PIL import Image


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


PREVIEW = ("data", "preview", "digits", "--set", "train.batch_size=4")


def test_preview_draws_a_picture_and_says_where(run, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    ran = run(*PREVIEW, "--step", "3", "--count", "2")
    assert (ran.code, ran.out, ran.err) == (0, "digits_step3.png\n", "")
    with Image.open("digits_step3.png") as picture:
        first = picture.copy()
    ran = run(*PREVIEW, "--step", "4", "--count", "2", "--out", "digits_step3.png", "--json")
    assert json.loads(ran.out) == {
        "file": "digits_step3.png",
        "width": first.width,
        "height": first.height,
    }
    with Image.open("digits_step3.png") as picture:
        assert picture.tobytes() != first.tobytes()


@pytest.mark.parametrize(
    ("out", "says"),
    [
        ("a.jpeg", "is not called .png"),
        ("notes.png", "exists and is no picture, so it is not overwritten"),
        ("folder.png", "cannot be written: Is a directory"),
        ("gone/a.png", "is in a folder that is not there"),
    ],
)
def test_preview_overwrites_nothing_but_pictures(run, tmp_path, monkeypatch, out, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.png").write_text("dear diary")
    (tmp_path / "folder.png").mkdir()
    before = sorted(tmp_path.iterdir())
    ran = run(*PREVIEW, "--out", out)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith(f'error: 1 problem in the command line\n--out: "{out}"\n')
    assert says in ran.err
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "notes.png").read_text() == "dear diary"


BENCH = ("data", "bench", "digits", "--seconds", "0.01", "--set", "train.batch_size=8")


def test_bench_names_the_part_that_limits(run):
    ran = run(*BENCH)
    assert (ran.code, ran.err) == (0, "")
    table, _, words = ran.out.partition("\n\n")
    header, _, *rows = table.splitlines()
    assert header.split() == "part what it does images/s MB/s s/step".split()
    assert [row.split()[0] for row in rows] == ["host", "transfer", "device"]
    assert "MixUp 0.2 and CutMix with fresh partners, float32" in rows[2]
    assert " limits: " in words.splitlines()[0]
    data = json.loads(run(*BENCH, "--json").out)
    assert data["run"] == "digits"
    assert data["limit"] in ("host", "transfer", "device")
    assert data["images_per_second"] == data[data["limit"]]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["preview", "digitz"], "no run preset has this name"),
        (["preview", "digits", "--step", "-1"], "is no whole number from 0"),
        (["preview", "digits", "--count", "0"], "is no whole number from 1"),
        (["preview", "digits", "--set", "data.source=gone"], "no such folder"),
        (["preview", "digits", "--set", "model.set.head.num_classes=9"], "10 or more, or 0"),
        (["bench", "nfnet"], 'data: source = "imagenet"\n    no such folder'),
        (["bench", "digits", "--seconds", "nan"], "is no number of seconds"),
        (["bench", "digits", "--set", "augment.mixup=-1"], "augment.mixup = -1"),
    ],
)
def test_mistakes_about_a_run_end_with_2(run, monkeypatch, tmp_path, words, says):
    monkeypatch.chdir(tmp_path)
    ran = run("data", *words)
    assert ran.code == 2
    assert says in ran.err
    assert not list(tmp_path.iterdir())
