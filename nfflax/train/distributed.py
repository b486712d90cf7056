"""Several processes of one run: how they find each other, and how they end together.

A cluster that JAX knows tells every process its place: Slurm, Open MPI, Kubernetes, Cloud TPU.
Elsewhere three arguments do. Without either there is one process, and nothing is waited for.

JAX aborts a process that waits too long for another, with a stack trace. So all waiting is done
here, for less time than JAX allows itself, and ends with a sentence.
"""

import importlib.util
import os
import re
import socket
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from nfflax.spec.errors import Problem
from nfflax.train.errors import MeshError

if TYPE_CHECKING:
    import jax

T = TypeVar("T")

JOIN_SECONDS = 300.0  # for all processes to start; JAX's own default
_LEAVE_SECONDS = 240.0  # for all to finish: JAX allows 300
_FAIL_SECONDS = 10.0  # for the others to fail in the same way
_FAILED = (1, 2)  # exit codes of failures
_gave_up = False  # on joining; JAX still tries, in a thread

_ADDRESS = re.compile(r"(?P<host>\[[0-9a-fA-F:.]+\]|[^\s:/\[\]]+):(?P<port>[0-9]{1,5})")
_ALLOWED = {
    "--coordinator": "HOST:PORT of process 0, the same for all",
    "--processes": "how many there are, the same for all",
    "--process": "which of them this one is, from 0",
}


def start(coordinator: str = "", processes: int = 0, process: int | None = None) -> None:
    """Join the other processes of this run, if it has any. Call it before JAX's devices are used.

    With arguments, this is process number `process` of `processes`, and number 0 is reached at
    `coordinator` (HOST:PORT, or else JAX_COORDINATOR_ADDRESS); `processes=1` keeps to one process
    on any cluster. Without arguments the cluster says it, if there is one. Does nothing where JAX
    has been told already. Raises MeshError if the arguments make no sense or others do not join.
    """
    address = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS", "")
    cluster = None
    if not (coordinator or processes or process is not None):
        cluster = _cluster()
    if cluster:
        how: dict[str, Any] = {"local_device_ids": cluster.devices}
        if cluster.processes:
            how["num_processes"] = cluster.processes
    elif address or processes or process is not None:
        if processes == 1 and not coordinator and not process:
            return
        _check(address, processes, process)
        how = {
            "coordinator_address": address,
            "num_processes": processes,
            "process_id": process,
            "cluster_detection_method": "deactivate",
        }
    else:
        return
    if not has_joined():
        _join(how, cluster)


def has_joined() -> bool:
    """Whether this process has been told of the others, here or by its own program."""
    if "jax" not in sys.modules or _gave_up:
        return False
    import jax

    return jax.distributed.is_initialized()


def leave(code: int) -> None:
    """Take leave of the others before the program ends with this exit code.

    All that end alike meet here. Where nobody comes, because this one has failed alone or has never
    met the others, it ends the program itself.
    """
    if not (has_joined() or _gave_up):
        return
    import jax

    patience = _FAIL_SECONDS if code in _FAILED else _LEAVE_SECONDS
    if _gave_up or not _done_within(patience, jax.distributed.shutdown):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # a normal exit would wait for the others once more, and be aborted


def one_at_a_time(program: Callable[..., T], mesh: "jax.sharding.Mesh") -> Callable[..., T]:
    """A jitted program; on CPUs of several processes, one that is done when it returns.

    A process's CPU devices share a few threads. Where two programs that exchange data overlap, each
    process may have its threads in another one of them, and all wait for ever.
    """
    devices = list(mesh.devices.flat)
    if len({device.process_index for device in devices}) == 1 or devices[0].platform != "cpu":
        return program
    import jax

    return lambda *arguments: jax.block_until_ready(program(*arguments))


# --- joining ----------------------------------------------------------------------------------


class _Cluster(NamedTuple):
    """Where JAX finds out by itself who the processes are."""

    name: str
    processes: int
    """How many there are; 0 where only JAX knows."""
    devices: list[int] | None = None
    """Numbers of the devices for this process; []: all it sees; None: as JAX has it."""


def _cluster() -> _Cluster | None:
    """The cluster this process was started by, if it started several."""
    env = os.environ
    if "OMPI_MCA_orte_hnp_uri" in env and (count := _number("OMPI_COMM_WORLD_SIZE")) > 1:
        return _Cluster("Open MPI", count, _devices(_number("OMPI_COMM_WORLD_LOCAL_SIZE")))
    # What `srun` started, not the job: a shell inside a job sees the job's number of tasks.
    if "SLURM_STEP_NODELIST" in env and (count := _number("SLURM_STEP_NUM_TASKS")) > 1:
        by_node = re.findall(r"(?<!x)\b\d+", env.get("SLURM_STEP_TASKS_PER_NODE", ""))
        return _Cluster("Slurm", count, _devices(max(map(int, by_node), default=0)))
    if _is_tpu_vm():
        return _Cluster("Cloud TPU", 0)
    if "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env and _has("kubernetes"):
        return _Cluster("Kubernetes", 0)
    return None


def _devices(neighbours: int) -> list[int] | None:
    """Which GPUs a process takes that shares its machine with others.

    JAX would give it one, by its number on the machine, also where it is alone there or was
    given its own one by the scheduler already.
    """
    if "JAX_LOCAL_DEVICE_IDS" in os.environ:
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    has_its_own = bool(visible) and "," not in visible
    return [] if neighbours == 1 or has_its_own else None


def _is_tpu_vm() -> bool:
    """Whether this machine has TPUs and a way to learn about others: JAX finds out on import."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if (platforms and "tpu" not in platforms) or not _has("libtpu"):
        return False
    import jax  # noqa: F401 - it leaves what it found in the environment

    env = os.environ
    told = "TPU_WORKER_HOSTNAMES" in env or "TPU_PROCESS_ADDRESSES" in env  # on GKE
    return env.get("TPU_ML_PLATFORM") == "JAX" and (told or "TPU_SKIP_MDS_QUERY" not in env)


def _check(address: str, processes: int, process: int | None) -> None:
    """That the three arguments are there and fit; raises MeshError."""
    values = {
        "--coordinator": address or None,
        "--processes": processes or None,
        "--process": process,
    }
    problems = [
        Problem(name, "", "is missing: the three go together", allowed=_ALLOWED[name])
        for name, value in values.items()
        if value is None
    ]
    if address and _endpoint(address) is None:
        message, allowed = "is no address", _ALLOWED["--coordinator"]
        problems.append(Problem("--coordinator", "", message, address, allowed))
    if processes and process is not None and not 0 <= process < processes:
        message = f"is none of {processes} processes"
        problems.append(Problem("--process", "", message, process, f"0 to {processes - 1}"))
    if problems:
        raise MeshError(problems)


def _endpoint(address: str) -> tuple[str, int] | None:
    """Host and port; None where it is no address."""
    found = _ADDRESS.fullmatch(address)
    if not found or not 0 < int(found["port"]) < 1 << 16:
        return None
    return found["host"].strip("[]"), int(found["port"])


def _join(how: dict[str, Any], cluster: _Cluster | None) -> None:
    import jax

    failures: list[Exception] = []

    def initialize() -> None:
        try:
            jax.distributed.initialize(**how, initialization_timeout=round(2 * JOIN_SECONDS))
            jax.devices()  # here they tell each other of theirs
        except Exception as error:
            failures.append(error)

    global _gave_up
    _gave_up = not _done_within(JOIN_SECONDS, initialize)
    if _gave_up:
        raise MeshError([_missing(how, cluster)])
    if failures:
        where = f"of {cluster.name} " if cluster else ""
        what = (str(failures[0]).strip().splitlines() or [type(failures[0]).__name__])[0]
        message = f"cannot join the other processes {where}of this run: {what}"
        raise MeshError([Problem("processes", "", message)]) from failures[0]


def _missing(how: dict[str, Any], cluster: _Cluster | None) -> Problem:
    """What to say when the others have not come."""
    count = how.get("num_processes", 0)
    some = f"some of the {count} processes" if count else "some processes"
    late = f"have not joined within {JOIN_SECONDS:g} s"
    if cluster:
        message = f"{some} that {cluster.name} should have started {late}"
        return Problem("processes", "", message, allowed="see what the others said")
    address = how["coordinator_address"]
    if how["process_id"] and not _answers(address):
        message = f"process 0 does not answer there: tried for {JOIN_SECONDS:g} s"
        allowed = "where process 0 runs, and a port that this machine may reach"
        return Problem("--coordinator", "", message, address, allowed)
    allowed = f"each with its own --process, 0 to {count - 1}, the rest alike"
    return Problem("--processes", "", f"{some} {late}", count, allowed)


def _answers(address: str) -> bool:
    """Whether anything accepts connections at an address."""
    endpoint = _endpoint(address)
    assert endpoint is not None
    try:
        socket.create_connection(endpoint, timeout=5).close()
    except OSError:
        return False
    return True


def _done_within(seconds: float, action: Any) -> bool:
    """Run something that cannot be interrupted; whether it came back in time."""
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


def _number(name: str) -> int:
    """A whole number in the environment, 0 without."""
    text = os.environ.get(name, "")
    return int(text) if text.isascii() and text.isdigit() else 0


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
