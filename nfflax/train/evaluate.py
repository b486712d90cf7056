"""Exact loss and accuracy over a whole source, of the raw weights and of their average."""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from nfflax.data.errors import DataError
from nfflax.data.sources import Source
from nfflax.spec.errors import Problem
from nfflax.train.program import Program


def evaluate(
    program: Program,
    weights: dict[str, Any],
    stats: Any,
    source: Source,
    advance: Callable[[int], None] = lambda _: None,
) -> dict[str, float]:
    """Mean loss, top-1 and top-5 accuracy of every set of parameters, over all valid images.

    Each is folded first: the batches then cost less.
    `weights` maps the beginning of the results' names to parameters: {"": raw, "ema/": average}.
    `advance` is told of every batch that is done. Sums are added up in whole numbers and float64:
    the same for any batch size and number of hosts, but for the rounding of single losses.
    """
    start, size = time.perf_counter(), program.eval_batch_size
    zeros = {"loss": 0.0, "top1": 0.0, "top5": 0.0, "examples": 0.0}
    totals = dict.fromkeys(weights, zeros)
    networks = {name: program.fold(params, stats) for name, params in weights.items()}
    pending: dict[str, Any] = {}

    def collect() -> None:
        for name, sums in jax.device_get(pending).items():
            totals[name] = {key: totals[name][key] + np.float64(sums[key]) for key in sums}

    with program.eval_feed(source) as batches:
        for batch in batches:
            placed = program.put(batch, size)
            found = {name: program.eval_step(each, placed) for name, each in networks.items()}
            collect()  # of the batch before: the device is busy with this one meanwhile
            pending = found
            advance(1)
    collect()
    results: dict[str, float] = {}
    for name, sums in totals.items():
        count = float(sums["examples"])
        if not count:
            problem = Problem(program.run.data.source, "", "holds no image that can be decoded")
            raise DataError([problem])
        results |= {f"{name}{key}": float(sums[key]) / count for key in ("loss", "top1", "top5")}
        results["examples"] = count
    return results | {"seconds": time.perf_counter() - start}
