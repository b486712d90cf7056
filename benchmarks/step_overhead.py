"""What Python costs per training step at NFNet-F0's number of arrays.

    python benchmarks/step_overhead.py

The loop's own host work is timed, with the devices' part replaced by a program that does next to
nothing to as many arrays in the same nested dicts: placing the batch, dispatch, reading metrics,
the progress display and the metrics file. It is CPU time of the main thread, so that other work on
the machine does not count.
"""

import io
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import nfflax
from nfflax import optim
from nfflax.train.history import History
from nfflax.train.mesh import make_mesh
from nfflax.train.meter import Meter
from nfflax.train.program import make_program
from nfflax.train.progress import Progress

STEPS = 200


def main() -> None:
    """Print the median of the host's milliseconds per step, whole and by part."""
    run = nfflax.load_run("nfnet", {"train.batch_size": 8 * jax.device_count()})
    mesh = make_mesh(run.mesh)
    program = make_program(run, mesh)
    whole = NamedSharding(mesh, PartitionSpec())
    make = lambda leaf: jax.device_put(jnp.zeros((), leaf.dtype), whole)  # noqa: E731
    state = jax.tree.map(make, program.abstract)
    names = jax.eval_shape(optim.metrics, program.abstract["opt"])
    names = [*names, "loss", "top1", "learning_rate"]

    def nothing(state, batch):
        value = jnp.float32(batch["labels"].sum())
        return jax.tree.map(lambda x: x + 1, state), dict.fromkeys(names, value)

    step = jax.jit(nothing, donate_argnums=0)
    size = run.train.batch_size
    rows = {"images": np.zeros((size, 8, 8, 3), np.uint8), "labels": np.zeros(size, np.int32)}
    rows |= {"mix_images": rows["images"], "mix_labels": rows["labels"]}
    with (
        tempfile.TemporaryDirectory() as folder,
        Progress(STEPS, stream=io.StringIO()) as progress,
        History(Path(folder), run) as history,
        jax.set_mesh(mesh),
    ):
        spent = _timed(state, program, step, rows, size, progress, history)
    leaves = len(jax.tree.leaves(state))
    parts = ", ".join(f"{name} {1e3 * np.median(s):.2f}" for name, s in spent.items())
    total = 1e3 * np.median(np.sum([*spent.values()], axis=0))
    print(f"{leaves} arrays, {len(names)} metrics: {total:.2f} ms of Python per step ({parts})")


def _timed(state, program, step, rows, size, progress, history) -> dict[str, list[float]]:
    meter, under_way = Meter(size), None
    spent: dict[str, list[float]] = {"batch": [], "dispatch": [], "report": []}
    for count in range(STEPS):
        marks = [time.thread_time()]
        batch = program.put(rows, size)
        marks.append(time.thread_time())
        state, metrics = step(state, batch)
        marks.append(time.thread_time())
        if under_way:
            values = {key: value.item() for key, value in jax.device_get(under_way).items()}
            values |= meter.stepped()
            progress.step(count, values)
            history.train(count, values)
        under_way = metrics
        marks.append(time.thread_time())
        if count >= 20:  # past compilation and the first use of everything
            for part, seconds in zip(spent.values(), np.diff(marks), strict=True):
                part.append(float(seconds))
    return spent


if __name__ == "__main__":
    main()
