"""One step of training and one of evaluation, as pure functions of a state and a batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import nfflax.optim as optim
from nfflax.data.feed import augmentation
from nfflax.nn.wsconv import measured
from nfflax.optim.factory import Recipe
from nfflax.pixels import normalize
from nfflax.spec.run import Run
from nfflax.train.mesh import image_sharding
from nfflax.train.state import State

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]

_NETWORK_STREAM = 1  # the network's random numbers, beside the augmentation's


def train_step(
    run: Run, recipe: Recipe, model: nnx.Module, mesh: jax.sharding.Mesh
) -> Callable[[State, Batch], tuple[State, Metrics]]:
    """The function that makes one update from a batch as `nfflax.data.train_feed` gives it.

    Of the network, which may be abstract, it takes the structure.
    """
    augmented = augmentation(run)
    graph, ready = nnx.graphdef(model), nnx.graphdef(nnx.eval_shape(measured, model))

    def prepare_with(stats: Any) -> Callable[[Any], Any]:
        def prepare(params: Any) -> Any:
            """Kernels measured once per step, not once per microbatch."""
            network = measured(nnx.merge(graph, params, stats))
            return nnx.to_pure_dict(nnx.state(network, nnx.Param))

        return prepare

    def loss_with(stats: Any) -> Callable[..., tuple[jax.Array, Any]]:
        def loss(params: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, Any]:
            network = nnx.merge(ready, params, stats)
            logits = network(batch["images"], train=True, rngs=key)
            labels, ratio = batch["labels"], batch.get("ratio")
            mixed = batch.get("mix_labels")
            each = optim.cross_entropy(
                logits, labels, mixed, ratio, label_smoothing=run.loss.label_smoothing
            )
            if mixed is not None and ratio is not None:
                labels = jnp.where(ratio < 0.5, mixed, labels)  # what most of the image shows
            after = nnx.to_pure_dict(nnx.state(network, nnx.BatchStat))
            return each.mean(), {"top1": jnp.mean(_hits(logits, labels, 1)), "stats": after}

        return loss

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        count, params = state["step"], state["params"]
        shown = augmented(dict(batch), count)
        images_NHWC = shown["images"]
        shown["images"] = jax.lax.with_sharding_constraint(images_NHWC, image_sharding(mesh))
        key = jax.random.fold_in(jax.random.key(run.train.seed), count)
        gradient = recipe.gradient(
            jax.value_and_grad(loss_with(state["stats"]), has_aux=True),
            prepare_with(state["stats"]),
        )
        found = gradient(params, shown, jax.random.fold_in(key, _NETWORK_STREAM))
        (loss, aux), gradients = found
        updates, opt = recipe.tx.update(gradients, state["opt"], params, value=loss)
        params = optax.apply_updates(params, updates)
        metrics = {
            "loss": loss,
            "top1": aux["top1"],
            "learning_rate": jnp.asarray(recipe.schedule(count), jnp.float32),
            **optim.metrics(opt),
        }
        skipped = metrics["guard/in_a_row"] > 0
        after = {
            "params": params,
            **({"ema": recipe.ema(state["ema"], params, count)} if recipe.ema else {}),
            "stats": jax.tree.map(
                lambda old, new: jnp.where(skipped, old, new), state["stats"], aux["stats"]
            ),
            "opt": opt,
            "step": count + 1,
        }
        return after, metrics

    return step


def eval_step(
    run: Run, graph: nnx.GraphDef, mesh: jax.sharding.Mesh
) -> Callable[[Any, Batch], Metrics]:
    """The function that adds up what a folded network gets right in a batch of `eval_batches`.

    Sums, and over valid rows only: so an uneven last batch counts for what it holds.
    """

    def evaluate(params: Any, batch: Batch) -> Metrics:
        dtype = jnp.dtype(run.model.dtype)
        images_NHWC = normalize(batch["images"], run.spec.preprocess, dtype=dtype)
        images_NHWC = jax.lax.with_sharding_constraint(images_NHWC, image_sharding(mesh))
        logits = nnx.merge(graph, params)(images_NHWC, train=False)
        labels, valid = batch["labels"], batch["valid"]
        losses = optim.cross_entropy(logits, labels)
        return {
            "loss": jnp.sum(jnp.where(valid, losses, 0.0)),
            "top1": jnp.sum(_hits(logits, labels, 1) & valid),
            "top5": jnp.sum(_hits(logits, labels, 5) & valid),
            "examples": jnp.sum(valid),
        }

    return evaluate


def _hits(logits: jax.Array, labels: jax.Array, k: int) -> jax.Array:
    """Whether each label is among the k classes with the highest scores.

    A tie counts against the label, as NaN does: a constant network must not look perfect.
    """
    own = jnp.take_along_axis(logits, labels[:, None], axis=-1)
    return jnp.sum(~(logits < own), axis=-1) <= k
