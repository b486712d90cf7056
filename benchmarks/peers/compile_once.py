"""One compilation of a train step, in a process that does nothing else: JSON in, JSON out."""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import jax

import nfflax
from nfflax.insight.aot import abstract_batch, training_run
from nfflax.spec.load import load_run
from nfflax.train.mesh import make_mesh
from nfflax.train.program import make_program
from peers.harness import cpu_seconds


def main() -> None:
    """Trace, lower and compile what the first argument asks for; print the seconds of each."""
    asked = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print
    devices = _devices(asked["topology"])
    run = training_run(
        nfflax.load_spec(asked["network"]),
        batch=asked["batch"] * len(devices),
        resolution=asked["pixels"],
        dtype=asked["dtype"],
        remat="none",
    )
    run = load_run(run, {"model.unroll": asked["unroll"]})
    mesh = make_mesh(run.mesh, devices)
    program = make_program(run, mesh)
    step: Any = program.train_step
    with jax.set_mesh(mesh):
        arguments = program.abstract, abstract_batch(program)
        traced, trace = _timed(lambda: step.trace(*arguments))
        lowered, lower = _timed(traced.lower)
        _, compile = _timed(lowered.compile)
    print(json.dumps({"trace": trace, "lower": lower, "compile": compile}), file=answers)


def _devices(topology: str) -> list[Any]:
    if not topology:
        return jax.devices()[:1]
    from jax.experimental import topologies

    described = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    return list(described.devices)


def _timed(call: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    wall, cpu = time.perf_counter(), cpu_seconds()
    result = call()
    return result, {"wall": time.perf_counter() - wall, "cpu": cpu_seconds() - cpu}


if __name__ == "__main__":
    main()
