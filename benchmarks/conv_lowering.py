"""What nn/conv.py gains: gradient times of its CPU form against XLA's own, alone and in a scan.

    python benchmarks/conv_lowering.py

Prints milliseconds (best of several) and the ratio native / nfflax, for the kxk convolutions of
NFNet-F0 and NF-RegNet-B0 at batch 8. Both forms run in the same process, in turn.
"""

import time

import jax
import jax.numpy as jnp
from jax import lax
from rich.console import Console
from rich.table import Table

from nfflax.nn.conv import conv

# name, map size, channels, groups: stage 2 and 3 of F0 at 192 px, stage 3 of B0 at 192 px.
CASES = [("F0 stage 1", 24, 256, 2), ("F0 stage 2", 12, 768, 6), ("B0 stage 2", 12, 344, 43)]
DEPTH, BATCH, REPEATS = 3, 8, 3


def native(x, w, groups):
    layout = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=layout, feature_group_count=groups
    )


def ours(x, w, groups):
    return conv(x, w, groups=groups)


def gradient(form, groups, scanned):
    def network(x, ws):
        if scanned:
            return lax.scan(lambda y, w: (y + jnp.tanh(form(y, w, groups)), None), x, ws)[0]
        for w in ws:
            x = x + jnp.tanh(form(x, w, groups))
        return x

    return jax.jit(jax.grad(lambda x, ws: jnp.mean(network(x, ws) ** 2), argnums=(0, 1)))


def best_ms(f, *arguments):
    jax.block_until_ready(f(*arguments))
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(f(*arguments))
        times.append(time.perf_counter() - start)
    return 1000 * min(times)


def main() -> None:
    table = Table("convolutions", "groups", "run", "native ms", "nfflax ms", "ratio")
    for name, size, channels, groups in CASES:
        x = jax.random.normal(jax.random.key(0), (BATCH, size, size, channels))
        ws = jax.random.normal(jax.random.key(1), (DEPTH, 3, 3, channels // groups, channels)) / 50
        for scanned in (False, True):
            slow, fast = (best_ms(gradient(f, groups, scanned), x, ws) for f in (native, ours))
            run = "scanned" if scanned else "unrolled"
            cells = (f"{slow:.1f}", f"{fast:.1f}", f"{slow / fast:.1f}")
            table.add_row(f"{DEPTH} x {name}", str(groups), run, *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
