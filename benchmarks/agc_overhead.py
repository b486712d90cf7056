"""What clipping costs beside the update it stands in: python benchmarks/agc_overhead.py

Time of one jitted, donated update of NFNet-F0's parameters, all in float32, without and with
clipping, weight decay and the divergence guard, of optax and of nfflax. Rounds of all variants
alternate; the least time of each counts. Plain SGD moves five times the parameters' bytes;
clipping reads two of them once more.
"""

import argparse
import functools
import time

import jax
import numpy as np
import optax
from flax import nnx
from rich.console import Console
from rich.table import Table

import nfflax
from nfflax.optim.guard import guard

ROUNDS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description="What clipping costs beside the update.")
    parser.add_argument("--spec", default="nfnet_f0", help="a preset or spec file")
    args = parser.parse_args()

    model = nnx.eval_shape(lambda: nfflax.build(args.spec, rngs=nnx.Rngs(0)))
    shapes = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    rng = np.random.default_rng(0)

    def draw(scale: float):
        normals = lambda leaf: rng.standard_normal(leaf.shape, np.float32) * np.float32(scale)  # noqa: E731
        return jax.device_put(jax.tree.map(normals, shapes))

    weights, grads = draw(0.05), draw(0.01)
    sgd = optax.sgd(0.1, momentum=0.9, nesterov=True)
    decay = optax.add_decayed_weights(2e-5)
    official = functools.partial(nfflax.optim.sgd, 0.1, roles=model)
    variants = {
        "optax.sgd": sgd,
        "agc, optax.sgd": optax.chain(nfflax.agc(0.01, roles=model), sgd),
        "agc with statistics, optax.sgd": optax.chain(
            nfflax.agc(0.01, roles=model, statistics=True), sgd
        ),
        "optax.adaptive_grad_clip, optax.sgd": optax.chain(optax.adaptive_grad_clip(0.01), sgd),
        "optax.add_decayed_weights, optax.sgd": optax.chain(decay, sgd),
        "nfflax.optim.sgd: agc, decay, momentum": official(),
        "guard(nfflax.optim.sgd)": guard(official()),
    }
    running = {name: start(tx, weights, grads) for name, tx in variants.items()}
    best = dict.fromkeys(variants, float("inf"))
    for _ in range(ROUNDS):
        for name, (step, params, state) in running.items():
            begin = time.perf_counter()
            params, state = jax.block_until_ready(step(params, state, grads))
            best[name] = min(best[name], time.perf_counter() - begin)
            running[name] = step, params, state

    size = sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
    table = Table(title=f"{args.spec}: {size / 4e6:.1f} M parameters on {jax.devices()[0]}")
    table.add_column("update")
    for header in ("ms", "x optax.sgd"):
        table.add_column(header, justify="right")
    for name, seconds in best.items():
        table.add_row(name, f"{seconds * 1e3:.1f}", f"{seconds / best['optax.sgd']:.2f}")
    Console().print(table)


def start(tx: optax.GradientTransformation, weights, grads):
    """A variant, compiled and run once."""

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(lambda leaf: leaf.copy(), weights)
    return step, *step(params, tx.init(weights), grads)


if __name__ == "__main__":
    main()
