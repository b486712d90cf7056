"""What the network will see at a step of a run, as a picture."""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from PIL import Image

from nfflax.data.feed import augmentation, train_feed
from nfflax.data.sheet import Caption, Tile, contact_sheet
from nfflax.data.sources import open_source
from nfflax.spec.run import Run
from nfflax.spec.schema import Preprocess

# Pixels of a batch that is augmented whole; of a larger one only the rows that are shown.
_WHOLE = 1 << 22


def preview(
    run: Run, *, step: int = 0, count: int = 32, say: Callable[[str], None] = lambda _: None
) -> Image.Image:
    """The first `count` images of a training batch, after crop, mixing and RandAugment.

    A batch of up to 4 million pixels is the run's own. Of a larger one the images and their crops
    are, while mixing and RandAugment are drawn for the rows that are shown.
    """
    say(f"opening {run.data.source}")
    source = open_source(run.data, run.data.train)
    batch_size = run.train.batch_size
    count = min(count, batch_size)
    is_whole = batch_size * run.spec.resolution.train**2 <= _WHOLE
    least = batch_size if is_whole else max(count, 2)  # one image alone has no partner
    rows = next(n for n in range(least, batch_size + 1) if batch_size % n == 0)
    say("reading images")
    with train_feed(run, source, step=step, hosts=batch_size // rows) as batches:
        batch = next(batches)
    say("compiling the augmentation")
    seen = jax.jit(augmentation(run))(batch, step)
    title = f"{run.name} · step {step:,}"
    notes = [
        f"{run.data.in_words} · {run.augment.in_words}",
        f"images 1 to {count:,} of {batch_size:,} · {run.spec.resolution.train} px",
    ]
    shown = {key: np.asarray(values)[:count] for key, values in seen.items()}
    pixels_NHWC = visible(shown.pop("images"), run.spec.preprocess)
    lines = captions(**shown, class_names=source.class_names, is_mixed=run.augment.mixes)
    tiles = [Tile(*pair) for pair in zip(pixels_NHWC, lines, strict=True)]
    return contact_sheet(title, notes, tiles)


def visible(images: np.ndarray, preprocess: Preprocess) -> np.ndarray:
    """uint8 images from normalised ones, the inverse of `nfflax.data.augment.normalize`."""
    mean, std = (255 * np.asarray(x, np.float32) for x in (preprocess.mean, preprocess.std))
    return np.clip(np.round(images.astype(np.float32) * std + mean), 0, 255).astype(np.uint8)


def captions(
    labels: np.ndarray,
    mix_labels: np.ndarray,
    ratio: np.ndarray,
    *,
    class_names: Sequence[str],
    is_mixed: bool,
) -> list[list[Caption]]:
    """By image its class, and with mixing each of its two classes with its share."""
    if not is_mixed:
        return [[Caption(_name(class_names, label))] for label in labels]
    return [
        [
            Caption(_name(class_names, label), f"{share:.2f}"),
            Caption(_name(class_names, other), f"{1 - share:.2f}"),
        ]
        for label, other, share in zip(labels, mix_labels, ratio, strict=True)
    ]


def _name(class_names: Sequence[str], label: int) -> str:
    """What to call a class; Pillow's own font knows no letters but English ones."""
    name = class_names[label] if label < len(class_names) else ""
    return name if name.isascii() and name.isprintable() and name else f"class {label}"
