"""What sharpness-aware minimisation costs: time per gradient, plain and with two sizes of climb.

    python benchmarks/sam_cost.py [preset] [batch]

Prints milliseconds (best of several, all forms in turn), and ratios to the plain step: of times,
and of the operations that XLA counts, which other programs on the machine do not disturb.
"""

import sys
import time

import jax
import jax.numpy as jnp
from flax import nnx
from rich.console import Console
from rich.table import Table

import nfflax
from nfflax.optim.loss import cross_entropy
from nfflax.optim.sam import with_sam

REPEATS = 15


def case(preset, rows):
    """The plain gradient function of a network, and what to call it with."""
    model = nfflax.build(preset, rngs=nnx.Rngs(0))
    graph, params = nnx.split(model, nnx.Param)

    def loss(params, batch, key):
        images_NHWC, labels = batch
        logits = nnx.merge(graph, params)(images_NHWC, train=True, rngs=key)
        return jnp.mean(cross_entropy(logits, labels, label_smoothing=0.1)), ()

    size = model.spec.resolution.train
    images_NHWC = jax.random.normal(jax.random.key(1), (rows, size, size, 3))
    batch = images_NHWC, jnp.zeros(rows, jnp.int32)
    gradient = jax.value_and_grad(loss, has_aux=True)
    return gradient, (nnx.to_pure_dict(params), batch, jax.random.key(2))


def main(preset: str = "nfnet_tiny", batch: str = "32") -> None:
    gradient, arguments = case(preset, int(batch))
    forms = {
        "plain": gradient,
        "SAM, climb on 20%": with_sam(gradient, fraction=0.2),
        "SAM, climb on 100%": with_sam(gradient, fraction=1.0),
    }
    compiled = {name: jax.jit(f).lower(*arguments).compile() for name, f in forms.items()}
    best = dict.fromkeys(forms, float("inf"))
    for _ in range(REPEATS):
        for name, run in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(run(*arguments))
            best[name] = min(best[name], time.perf_counter() - start)
    table = Table(f"{preset}, batch {batch}", "ms", "time ratio", "operations ratio")
    operations = {name: (run.cost_analysis() or {})["flops"] for name, run in compiled.items()}
    for name, seconds in best.items():
        ratios = seconds / best["plain"], operations[name] / operations["plain"]
        table.add_row(name, f"{1000 * seconds:.1f}", *(f"{ratio:.2f}" for ratio in ratios))
    Console().print(table)


if __name__ == "__main__":
    main(*sys.argv[1:])
