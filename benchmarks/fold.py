"""How much less an NFNet-F0 costs when it is folded, and whether its loops should be unrolled.

    python benchmarks/fold.py [--network nfnet_f0] [--pixels 192 256] [--batches 1 8 32]

Each line: a form of the network at one size, the seconds that one batch takes, by the clock and of
CPU time, the latter in parts of the plain network's, and the CPU seconds that compiling took. The
forms take turns, so that other work on the machine meets all of them; numbers are medians.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

import nfflax

ROUNDS = {1: 15, 8: 9}  # by batch size; 5 for larger ones


def main() -> None:
    """Print what each form costs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", default="nfnet_f0")
    parser.add_argument("--pixels", type=int, nargs="+", default=[192, 256])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    args = parser.parse_args()
    plain = nfflax.build(args.network, rngs=nnx.Rngs(0))
    for turn in ("first", "again"):
        (_, folded), clock, cpu = timed(lambda: nnx.split(nfflax.fold(plain)))
        print(f"folding {args.network} {turn}: {clock:.2f} s, {cpu:.2f} CPU s")
    folded = nfflax.fold(plain)
    forms = {"plain": plain, "folded": folded, "folded, unrolled": unrolled(folded)}
    print(f"{'px':>4} {'batch':>5}  {'form':18} {'s':>7} {'CPU s':>7} {'ratio':>6} {'compile':>8}")
    for pixels in args.pixels:
        for batch in args.batches:
            compare(forms, pixels, batch)


def unrolled(model: nfflax.NFNet) -> nfflax.NFNet:
    """The same with every block of a stage written out in the program."""
    model = nnx.clone(model)
    for stage in model.stages:
        stage.unroll = max(1, len(stage.betas) - 1)
    return model


def compare(forms: dict[str, nfflax.NFNet], pixels: int, batch: int) -> None:
    """Print a line per form."""
    channels = next(iter(forms.values())).spec.stem.in_channels
    x_NHWC = jax.random.normal(jax.random.key(0), (batch, pixels, pixels, channels))
    calls: dict[str, Callable[[], Any]] = {}
    compiling: dict[str, float] = {}
    for name, model in forms.items():
        graph, state = nnx.split(model)
        lowered = jax.jit(lambda s, x, g=graph: nnx.merge(g, s)(x)).lower(state, x_NHWC)
        program, _, compiling[name] = timed(lowered.compile)
        calls[name] = lambda program=program, state=state: program(state, x_NHWC)
        calls[name]()
    spent = {name: ([], []) for name in forms}
    for _ in range(ROUNDS.get(batch, 5)):
        for name, call in calls.items():
            _, clock, cpu = timed(call)
            spent[name][0].append(clock)
            spent[name][1].append(cpu)
    of_plain = np.median(spent["plain"][1])
    for name, (clocks, cpus) in spent.items():
        clock, cpu = np.median(clocks), np.median(cpus)
        numbers = f"{clock:7.3f} {cpu:7.3f} {cpu / of_plain:6.2f} {compiling[name]:8.1f}"
        print(f"{pixels:4} {batch:5}  {name:18} {numbers}", flush=True)


def timed(call: Callable[[], Any]) -> tuple[Any, float, float]:
    """What a call returns, once it is there; seconds by the clock and of CPU time."""
    clock, cpu = time.perf_counter(), time.process_time()
    result = jax.block_until_ready(call())
    return result, time.perf_counter() - clock, time.process_time() - cpu


if __name__ == "__main__":
    main()
