"""Checkpoints of a run of two processes: saved by both, and damage is decided on alike."""

import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

_PROCESS = """
    import sys
    from pathlib import Path
    import jax, jax.numpy as jnp, numpy as np
    jax.distributed.initialize(sys.argv[2], num_processes=2, process_id=int(sys.argv[3]))
    from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
    import nfflax
    from nfflax.train import checkpoint
    from nfflax.train.checkpoint import Checkpoints, load_weights
    from nfflax.train.errors import CheckpointError
    from nfflax.train.workdir import claim

    workdir = Path(sys.argv[1])
    mesh = Mesh(np.asarray(jax.devices()).reshape(2, -1), ("data", "fsdp"))
    split = NamedSharding(mesh, P("data", "fsdp"))
    everywhere = NamedSharding(mesh, P())
    shardings = {"params": {"w": split}, "stats": {}, "opt": (), "step": everywhere}

    def state(step):
        w = jax.random.normal(jax.random.key(step), (640, 640))  # large: hashed on the devices
        return {"params": {"w": w}, "stats": {}, "opt": (), "step": jnp.int32(step)}

    make = jax.jit(state, out_shardings=shardings, static_argnums=0)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), make(1)
    )

    def restores(checkpoints):
        found = checkpoints.restore(abstract)
        same = jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), found.state, make(found.step))
        assert all(jax.tree.leaves(same))
        return found

    run = nfflax.load_run("digits")
    claim(workdir, run, resume=True, overwrite=False)
    try:
        claim(workdir, run, resume=False, overwrite=False)
        raise SystemExit("a used folder was taken")
    except CheckpointError:
        pass
    with Checkpoints(workdir, keep=2, keep_best=0) as checkpoints:
        assert checkpoints.restore(abstract) is None
        for step in (1, 2, 3):
            checkpoints.save(step, make(step), {})
        assert (restores(checkpoints).step, checkpoints.steps()) == (3, [2, 3])

    if jax.process_index() == 1:  # what one process cannot read is damaged for both
        read = checkpoint.read_arrays

        def failing(folder, *rest):
            if folder.name == "3":
                raise checkpoint.DamagedError("unreadable here")
            return read(folder, *rest)

        checkpoint.read_arrays = failing
    with Checkpoints(workdir, keep=2, keep_best=0) as checkpoints:
        found = restores(checkpoints)
        assert (found.step, [step for step, _ in found.damaged]) == (2, [3])
        checkpoints.save(3, make(3), {})
        checkpoints.wait()
        assert checkpoints.steps() == [2, 3]
    print("weights of", load_weights(workdir).step)
    jax.distributed.shutdown()
"""


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-c", textwrap.dedent(_PROCESS), str(tmp_path / "run"), address]
    processes = [
        subprocess.Popen([*command, str(i)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for i in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (out, err) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, err.decode()[-3000:]
        assert b"weights of 2" in out
