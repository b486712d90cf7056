"""One compilation of a train step, in a process that does nothing else: JSON in, JSON out."""

import json
import os
import sys
from typing import Any

import jax

import nfflax
from nfflax.insight.aot import abstract_batch, training_run
from nfflax.insight.rehearsal import devices_of
from nfflax.spec.load import load_run
from nfflax.train.mesh import make_mesh
from nfflax.train.program import make_program
from peers.harness import timed


def main() -> None:
    """Trace, lower and compile what the first argument asks for; print the seconds of each."""
    asked = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print
    devices = devices_of(asked["topology"] or 1)
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
        traced, *trace = timed(lambda: step.trace(*arguments))
        lowered, *lower = timed(traced.lower)
        _, *compile = timed(lowered.compile)
    spent = {"trace": trace, "lower": lower, "compile": compile}
    print(json.dumps({part: {"wall": w, "cpu": c} for part, (w, c) in spent.items()}), file=answers)


if __name__ == "__main__":
    main()
