"""Fine-tuning in a loop of your own: trained weights, other classes, grey images, few labels.

    python examples/finetune.py                      # from a network that it trains first
    python examples/finetune.py --weights nfnet_f0   # from published weights, or any other place

By default a small network learns the handwritten digits 0 to 4 and is left in runs/low_digits. Then
it learns to add: an image shows two of them, and the class is their sum. The same network learns it
from scratch, in as many steps. Needs the extra "demo".

From trained weights 73.0% of 500 test images are right, from scratch 64.6%; one seed, 49 CPU
seconds once runs/low_digits is there (2 shared CPU cores, 2026-11-21).
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

import nfflax
from nfflax.data import ArraySource, Data, EvalView, open_source, pack_split
from nfflax.data.augment import normalize
from nfflax.train import predictions, train

LOW = range(5)
SUMS = 9  # of two of them: 0 to 8
NETWORK = {
    "extends": "nfnet_nano",
    "name": "low_digits",
    "stages": {"depth": [1, 1, 1], "width": [32, 64, 128], "stride": [1, 2, 2], "group_width": 16},
    "head": {"num_classes": len(LOW)},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--weights", help="a run, a file, an address, hf://owner/repo, a preset")
    parser.add_argument("--images", type=int, default=500, help="labelled images to learn from")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=24, help="of the training on single digits")
    args = parser.parse_args()
    weights = args.weights or low_digits(args.epochs)

    tuned = nfflax.load(weights, num_classes=SUMS, in_channels=1, rngs=nnx.Rngs(0))
    fresh = nfflax.build(tuned.spec, rngs=nnx.Rngs(0))
    view = EvalView.of(tuned.spec)
    images, labels = sums("train", args.images, view)
    test_images, test_labels = sums("test", 500, view)
    for start, model, layer_decay in (("trained weights", tuned, 0.7), ("scratch", fresh, 1.0)):
        fit(model, images, labels, steps=args.steps, layer_decay=layer_decay)
        found = predictions(model, test_images, top=1, batch_size=100).classes[:, 0]
        right = np.mean(found == test_labels)
        print(f"from {start}: {right:.1%} of {len(found)} test images right", flush=True)


def fit(
    model: nfflax.NFNet, images: np.ndarray, labels: np.ndarray, *, steps: int, layer_decay: float
) -> None:
    """Train a network in place: SGD with clipping, and lower layers learn more slowly."""
    schedule = nfflax.optim.warmup_cosine(0.1, steps, steps // 10)
    tx = optax.chain(nfflax.optim.sgd(schedule, clipping=0.1), slower_below(model, layer_decay))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, images, labels, key):
        def loss(model):
            x_NHWC = normalize(images, model.spec.preprocess)
            logits = model(x_NHWC, train=True, rngs=key)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        optimizer.update(model, nnx.grad(loss)(model))

    rng = np.random.default_rng(0)
    for i in range(steps):
        rows = rng.choice(len(labels), 32, replace=False)
        step(model, optimizer, images[rows], labels[rows], jax.random.key(i))


def slower_below(model: nfflax.NFNet, decay: float) -> optax.GradientTransformation:
    """Every stage learns `decay` times as fast as what follows it, the stem slowest."""
    top = len(model.stages) + 1

    def scaled(path: Any, update: jax.Array) -> jax.Array:
        part = path[0].key
        height = 0 if part == "stem" else 1 + path[1].key if part == "stages" else top
        return update * decay ** (top - height)

    return optax.stateless(lambda updates, _: jax.tree.map_with_path(scaled, updates))


def digits(split: str, classes: range) -> ArraySource:
    """Those of scikit-learn's handwritten digits, 8 x 8 pixels each."""
    source = open_source(Data(source="digits"), split)
    records = [record for i in range(len(source)) if (record := source[i]).label in classes]
    labels = np.array([record.label - classes.start for record in records])
    return ArraySource(np.stack([r.image for r in records]), labels, [str(n) for n in classes])


def sums(split: str, count: int, view: EvalView) -> tuple[np.ndarray, np.ndarray]:
    """(images, labels): two digits side by side, each as large as the network wants an image."""
    source, rng = digits(split, LOW), np.random.default_rng(len(split))
    pairs = [[source[i] for i in rng.integers(len(source), size=2)] for _ in range(count)]
    images = [np.concatenate([view(digit.image) for digit in pair], axis=1) for pair in pairs]
    return np.stack(images), np.array([sum(digit.label for digit in pair) for pair in pairs])


def low_digits(epochs: int = 24) -> Path:
    """The folder of a run that has learnt 0 to 4; carried out when it is not there."""
    workdir, images = Path("runs/low_digits"), Path("runs/low_digits_images")
    if not workdir.exists():
        for split in ("train", "test"):
            pack_split(digits(split, LOW), images, split)
        changes = {"model.spec": NETWORK, "data.source": str(images), "train.epochs": epochs}
        run = nfflax.load_run("digits", changes | {"schedule.warmup_epochs": epochs / 12})
        train(run, workdir, stream=sys.stderr)
    return workdir


if __name__ == "__main__":
    main()
