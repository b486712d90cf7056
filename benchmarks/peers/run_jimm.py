"""jimm, timm's models in Flax NNX: a checkout of imgengineer/jimm. Its own networks of the name."""

import sys
from unittest.mock import MagicMock

from flax import nnx

from peers.harness import Program, serve
from peers.job import CLASSES, Job
from peers.with_jax import installed, program


def prepare(job: Job) -> Program:
    """The network as jimm has it, its step a pure function of its parameters."""
    sys.path.insert(0, job.source)
    sys.modules["cv2"] = MagicMock()  # it reads images with it, and here are none
    import jimm  # pyright: ignore[reportMissingImports]

    model = jimm.create_model(job.network, num_classes=CLASSES, rngs=nnx.Rngs(0))
    model.train() if job.what == "step" else model.eval()
    graph, params, others = nnx.split(model, nnx.Param, ...)
    return program(
        job,
        lambda params, x_NHWC: nnx.merge(graph, params, others)(x_NHWC),
        params,
        versions=installed("flax", "optax"),
    )


if __name__ == "__main__":
    serve(prepare)
