"""`nfflax predict`: classes of images, one by one and from folders, and images that are none."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from trained import NAMES, save, tiny_run

from nfflax.train.inference import load_model, predictions


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run's folder with one checkpoint."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    save(folder, tiny_run())
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """40 small pictures, more than go into one batch, and a text."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number in range(40):
        pixels = rng.integers(0, 256, (20, 30, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    for name in ("notes.txt", "._00.png"):  # the second is what macOS leaves beside 00.png
        (folder / name).write_text("not a picture")
    return folder


def test_a_folder_of_images_as_json(run, trained, pictures):
    ran = run("predict", trained, pictures, "--top", 3, "--json")
    assert (ran.code, ran.err) == (0, "")
    found = json.loads(ran.out)
    files = sorted(pictures.glob("[0-9]*.png"))
    assert [image["image"] for image in found] == [str(file) for file in files]
    loaded = load_model(str(trained))
    images_NHWC = np.stack([loaded.view(file.read_bytes()) for file in files])
    wanted = predictions(loaded.model, images_NHWC, top=3, batch_size=32)
    seen = [image["predictions"] for image in found]
    assert [[p["class"] for p in image] for image in seen] == wanted.classes.tolist()
    assert [[p["probability"] for p in image] for image in seen] == wanted.probabilities.tolist()
    assert all(p["name"] == NAMES[p["class"]] for image in seen for p in image)


def test_bars_and_a_line_for_what_is_no_image(run, trained, pictures, tmp_path):
    text, none = pictures / "notes.txt", tmp_path / "none.png"
    ran = run("predict", trained, text, none, tmp_path, pictures, "--top", 3)
    assert (ran.code, ran.err) == (2, "")
    lines = ran.out.splitlines()
    assert lines[0].startswith(f"{text}  is no image of a known format")
    assert lines[1] == f"{none}  cannot be read: No such file or directory"
    assert lines[2] == f"{tmp_path}  holds no images"
    assert lines[3::4] == [str(pictures / f"{number:02}.png") for number in range(40)]
    for first in range(4, len(lines), 4):
        rows = lines[first : first + 3]
        shares = [float(row.split("%")[0]) / 100 for row in rows]
        assert shares == sorted(shares, reverse=True)
        assert all(row.split()[-1] in NAMES for row in rows)
        assert abs(rows[0].count("█") - 24 * shares[0]) <= 1


def test_what_is_no_image_as_json(run, trained, pictures):
    ran = run("predict", trained, pictures / "notes.txt", "--json")
    (image,) = json.loads(ran.out)
    assert (ran.code, ran.err) == (2, "")
    assert image["error"].startswith("is no image of a known format")


def test_a_network_that_is_not_there(run, pictures):
    ran = run("predict", "nowhere", pictures)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith(
        "error: 1 problem in the checkpoint\nnowhere\n    There is no such file"
    )
