"""nfflax's contestants: a plain step or forward pass, and the train step of the whole recipe.

Options: `unroll` and `remat` as `nfflax.build` has them, `fold`, `clip` (adaptive gradient
clipping), `recipe` (the step that `nfflax train` runs: augmentation on the device, label smoothing,
dropout, stochastic depth, clipping, weight decay, average, guard).
"""

import jax
import numpy as np
import optax
from flax import nnx

import nfflax
from nfflax.insight.aot import abstract_batch, training_run
from nfflax.spec.load import load_run
from nfflax.train.mesh import make_mesh
from nfflax.train.program import make_program
from peers.harness import Program, Run, serve
from peers.job import Job
from peers.with_jax import described, installed, program, repeated, sgd

# Peers have other random numbers, or none: all do without.
PLAIN = {"head.dropout": 0.0, "regularization.stochastic_depth": 0.0}
VERSIONS = {"nfflax": nfflax.__version__, **installed("flax", "optax")}


def prepare(job: Job) -> Program:
    """The contestant that the options name."""
    options = dict(job.options)
    if options.pop("recipe", False):
        return _recipe(job)
    clip, fold = options.pop("clip", False), options.pop("fold", False)
    spec = nfflax.load_spec(job.network, PLAIN)
    plan = nfflax.plan(spec)
    options["unroll"] = options.get("unroll") or 1
    model = nfflax.build(plan, rngs=nnx.Rngs(0), dtype=job.dtype, **options)
    update = optax.chain(nfflax.agc(0.01, roles=model), sgd()) if clip else None
    graph, params = nnx.split(nfflax.fold(model) if fold else model)
    return program(
        job,
        lambda params, x_NHWC: nnx.merge(graph, params)(x_NHWC, train=job.what == "step"),
        nnx.to_pure_dict(params),
        macs=plan.macs(job.pixels),
        update=update,
        versions=VERSIONS,
    )


def _recipe(job: Job) -> Program:
    spec = nfflax.load_spec(job.network)
    run = training_run(spec, batch=job.batch, resolution=job.pixels, dtype=job.dtype, remat="none")
    trainer = make_program(load_run(run, {"train.steps": 1000}), make_mesh(run.mesh))
    jax.set_mesh(trainer.mesh)
    rng = np.random.default_rng(0)
    shapes = abstract_batch(trainer)
    batch = {
        name: jax.device_put(rng.integers(0, 255, leaf.shape).astype(leaf.dtype))
        for name, leaf in shapes.items()
    }
    state = trainer.init()

    def compile() -> Run:
        step = trainer.train_step.lower(state, batch).compile()
        return repeated(lambda state: step(state, batch), state)

    macs = nfflax.plan(spec).macs(job.pixels)
    return described(compile, state["params"], macs=macs, versions=VERSIONS)


if __name__ == "__main__":
    serve(prepare)
