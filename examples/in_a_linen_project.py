"""A pretrained backbone in a Flax Linen project: one call wraps it, and its weights are variables.

    python examples/in_a_linen_project.py                      # trains a backbone on digits first
    python examples/in_a_linen_project.py --weights nfnet_f0   # or published weights

A `TrainState` loop, as a Linen project has it, learns the sum of two handwritten digits. The stem
and the first stage stay as they are: their weights are not among the "params". Needs the extra
"demo".

72.2% of 500 test images right after 200 steps, 23 CPU seconds once runs/low_digits is there
(2 shared CPU cores, 2026-11-21).
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from finetune import SUMS, low_digits, sums
from flax import linen, nnx
from flax.nnx import bridge
from flax.training.train_state import TrainState

import nfflax
from nfflax.data import EvalView
from nfflax.data.augment import normalize
from nfflax.nn import Frozen


class Classifier(linen.Module):
    """Logits from the highest map of a backbone."""

    spec: nfflax.Spec
    levels: tuple[int, ...]
    frozen: int
    classes: int

    @linen.compact
    def __call__(self, x_NHWC: jax.Array, train: bool = False) -> jax.Array:
        backbone = bridge.to_linen(
            nfflax.backbone,
            self.spec,
            self.levels,
            activated=True,
            frozen=self.frozen,
            metadata_fn=None,  # variables are plain arrays
            name="backbone",
        )
        maps = backbone(x_NHWC, train=train, rngs=self.make_rng("dropout") if train else None)
        pooled_NC = maps[max(self.levels)].mean((1, 2))
        return linen.Dense(self.classes, name="head")(pooled_NC)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--weights", help="a run, a file, an address, hf://owner/repo, a preset")
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    weights = args.weights or low_digits()

    spec = nfflax.load(weights, num_classes=0).spec
    top = nfflax.plan(spec).feature_info[-1].level
    pretrained = nfflax.backbone(spec, [top], weights=weights, activated=True, frozen=2)
    view = EvalView.of(spec)
    images, labels = sums("train", 1000, view)
    test_images, test_labels = sums("test", 500, view)

    model = Classifier(spec, (top,), frozen=2, classes=SUMS)
    variables = dict(
        jax.jit(model.init)(jax.random.key(0), normalize(jnp.asarray(images[:1]), spec.preprocess))
    )
    variables["params"]["backbone"] = nnx.to_pure_dict(nnx.state(pretrained, nnx.Param))
    variables["frozen"]["backbone"] = nnx.to_pure_dict(nnx.state(pretrained, Frozen))
    params = variables.pop("params")
    print(f"{count(params):,} weights train, {count(variables['frozen']):,} are frozen")

    # Linen's trees do not say what a unit is; the NNX module they are from does.
    clip = nfflax.agc(0.1, roles=nnx.Dict(backbone=pretrained), mask={"head": False})
    schedule = optax.cosine_decay_schedule(0.05, args.steps)
    tx = optax.chain(clip, optax.sgd(schedule, momentum=0.9, nesterov=True))
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    @jax.jit
    def step(state: TrainState, images: jax.Array, labels: jax.Array) -> TrainState:
        def loss(params: Any) -> jax.Array:
            x_NHWC = normalize(images, spec.preprocess)
            key = jax.random.fold_in(jax.random.key(0), state.step)
            all_variables = {"params": params, **variables}
            logits = state.apply_fn(all_variables, x_NHWC, train=True, rngs={"dropout": key})
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    @jax.jit
    def answers(params: Any, images: jax.Array) -> jax.Array:
        x_NHWC = normalize(images, spec.preprocess)
        logits = model.apply({"params": params, **variables}, x_NHWC)
        return jnp.argmax(jnp.asarray(logits), -1)

    rng = np.random.default_rng(0)
    for _ in range(args.steps):
        rows = rng.choice(len(labels), 32, replace=False)
        state = step(state, images[rows], labels[rows])
    found = np.asarray(answers(state.params, test_images))
    print(f"{np.mean(found == test_labels):.1%} of {len(found)} test images right")


def count(tree: Any) -> int:
    """Numbers in all arrays of a tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


if __name__ == "__main__":
    main()
