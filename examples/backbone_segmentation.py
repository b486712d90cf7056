"""Segmentation on a pretrained backbone: which digit does each pixel belong to?

    python examples/backbone_segmentation.py                      # on runs/digits, or trains it
    python examples/backbone_segmentation.py --weights nfnet_f0   # or on published weights

Scenes of real handwritten digits, at random places and in random sizes, are taken apart by the maps
of `nfflax.backbone` and a decoder that adds them up from the coarsest to the finest. Writes a
picture of scenes, truth and answers. Needs the extras "demo" and "plot".

Mean IoU 69.4% on 64 scenes of test digits after 400 steps, in 147 CPU seconds from runs/digits
(2 shared CPU cores, 2026-11-21). docs/images/segmentation.png is that picture.
"""

import argparse
import itertools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from finetune import digits
from flax import nnx
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from PIL import Image

import nfflax
from nfflax.data import ArraySource
from nfflax.data.augment import normalize
from nfflax.nn import WSConv, WSConvTranspose
from nfflax.train import train

SIDE = 32  # pixels of a scene
BACKGROUND = 10  # the class after the ten digits
COLORS = "#4e79a7 #f28e2b #e15759 #76b7b2 #59a14f #edc948 #b07aa1 #ff9da7 #9c755f #d7d2cf #16181d"
GAMMA = nfflax.gamma_of(nnx.gelu)  # keeps the variance, as in the backbone


class Segmenter(nnx.Module):
    """Scores of every pixel for every class, from a backbone's maps."""

    def __init__(self, backbone: nfflax.nn.Backbone, width: int, *, rngs: nnx.Rngs):
        infos = backbone.feature_info
        factors = [coarse.stride // fine.stride for fine, coarse in itertools.pairwise(infos)]
        self.backbone = backbone
        self.sides = nnx.List(WSConv(i.channels, width, (1, 1), rngs=rngs) for i in infos)
        self.ups = nnx.List(WSConvTranspose(width, width, (f, f), f, rngs=rngs) for f in factors)
        self.smooth = nnx.List(WSConv(width, width, (3, 3), rngs=rngs) for _ in range(2))
        last = (infos[0].stride, infos[0].stride)
        self.head = nnx.ConvTranspose(width, BACKGROUND + 1, last, last, rngs=rngs)

    def __call__(self, x_NHWC: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Scores in training, where there is a key, or else in evaluation."""
        maps = self.backbone(x_NHWC, train=key is not None, rngs=key)
        *finer, y_NHWC = (side(maps[level]) for level, side in zip(maps, self.sides, strict=True))
        for up, side_NHWC in zip(self.ups[::-1], finer[::-1], strict=True):
            y_NHWC = (up(active(y_NHWC)) + side_NHWC) * 0.5**0.5  # as large as either of them
        for conv in self.smooth:
            y_NHWC = conv(active(y_NHWC))
        return self.head(active(y_NHWC))


def active(x: jax.Array) -> jax.Array:
    return nnx.gelu(x) * GAMMA


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--weights", help="a run, a file, an address, hf://owner/repo, a preset")
    parser.add_argument("--levels", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", type=Path, default=Path("segmentation.png"), help="the picture")
    args = parser.parse_args()
    weights = args.weights or trained_digits()

    how = {"weights": weights, "in_channels": 1, "activated": True}
    backbone = nfflax.backbone(levels=args.levels, **how)
    model = Segmenter(backbone, 48, rngs=nnx.Rngs(0))
    fit(model, args.steps)

    images, truth = scenes(digits("test", range(10)), 64, np.random.default_rng(1))
    see = nnx.jit(lambda model, x: model(normalize(x, backbone.spec.preprocess)).argmax(-1))
    answers = np.concatenate([see(model, images[i : i + 8]) for i in range(0, len(images), 8)])
    print(f"mean IoU {mean_iou(truth, answers):.1%} on {len(images)} scenes of test digits")
    draw(images[:8], truth[:8], answers[:8], args.out)


def trained_digits() -> Path:
    """The folder that `nfflax train digits` leaves, which is carried out when it is not there."""
    workdir = Path("runs/digits")
    if not workdir.exists():
        train(nfflax.load_run("digits"), workdir, stream=sys.stderr)
    return workdir


def fit(model: Segmenter, steps: int) -> None:
    """Train in place on new scenes in every step."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, 0.005, steps // 10, steps)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, images, labels, key):
        def loss(model):
            scores = model(normalize(images, model.backbone.spec.preprocess), key)
            losses = optax.softmax_cross_entropy_with_integer_labels(scores, labels)
            return jnp.average(losses, weights=jnp.where(labels == BACKGROUND, 1.0, 2.0))

        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    source, rng = digits("train", range(10)), np.random.default_rng(0)
    for i in range(steps):
        value = step(model, optimizer, *scenes(source, 16, rng), jax.random.key(i))
        if (i + 1) % 50 == 0:
            print(f"step {i + 1}: loss {float(value):.3f}", flush=True)


def scenes(
    source: ArraySource, count: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """(images, labels): three digits each, 11 to 14 pixels high, later ones over earlier ones."""
    images = np.zeros((count, SIDE, SIDE, 1), np.uint8)
    labels = np.full((count, SIDE, SIDE), BACKGROUND)
    for image, label in zip(images, labels, strict=True):
        for record in (source[i] for i in rng.integers(len(source), size=3)):
            size = int(rng.integers(11, 15))
            digit = np.asarray(Image.fromarray(np.asarray(record.image)).resize((size, size)))
            top, left = rng.integers(SIDE - size + 1, size=2)
            window, inked = np.s_[top : top + size, left : left + size], digit > 64
            image[window][inked, 0] = digit[inked]
            label[window][inked] = record.label
    return images, labels


def mean_iou(truth: np.ndarray, answers: np.ndarray) -> float:
    """Intersection over union, averaged over the classes."""
    pairs = np.zeros((BACKGROUND + 1, BACKGROUND + 1))
    np.add.at(pairs, (truth, answers), 1)
    both = np.diag(pairs)
    return float(np.mean(both / (pairs.sum(0) + pairs.sum(1) - both)))


def draw(images: np.ndarray, truth: np.ndarray, answers: np.ndarray, path: Path) -> None:
    """Scenes, truth and answers in three rows, a color for every digit."""
    cmap = ListedColormap(COLORS.split())
    figure = Figure(figsize=(9.6, 4.2), dpi=100, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(3, len(images))
    for axes, pictures in zip(panels, (images, cmap(truth), cmap(answers)), strict=True):
        for axis, picture in zip(axes, pictures, strict=True):
            axis.imshow(picture, cmap="gray")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
    for axes, name in zip(panels, ("scene", "truth", "answer"), strict=True):
        axes[0].set_ylabel(name)
    for name, color in zip([*range(10), "background"], COLORS.split(), strict=True):
        axes[0].plot([], [], "s", color=color, label=name)
    figure.legend(loc="outside lower center", ncols=BACKGROUND + 1, frameon=False)
    figure.savefig(path, metadata={"Software": None})


if __name__ == "__main__":
    main()
