"""What a process is told of the others, and what it says when they are not there.

JAX's own joining is replaced here; processes that really join are in test_processes.py.
"""

import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from nfflax.train import distributed
from nfflax.train.errors import MeshError
from nfflax.train.stopping import PREEMPTED

LAUNCH = Path(__file__).parents[2] / "examples" / "launch"
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[1-4]",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "2(x4)",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
KUBERNETES = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "2"}


@pytest.fixture
def told(monkeypatch):
    """What JAX would be told, in place of telling it; on a machine without a cluster."""
    given: dict[str, object] = {}
    for name in (*SLURM, *OPEN_MPI, *KUBERNETES, "JAX_COORDINATOR_ADDRESS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **how: given.update(how))
    monkeypatch.setattr(distributed, "_gave_up", False)
    return given


@pytest.fixture
def environment(monkeypatch):
    def define(**values: str) -> None:
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return define


def complaint(*arguments: object) -> str:
    with pytest.raises(MeshError) as caught:
        distributed.start(*arguments)  # pyright: ignore[reportArgumentType]
    return str(caught.value)


def test_without_a_cluster_there_is_one_process_and_jax_stays_unloaded(told):
    distributed.start()
    distributed.start(processes=1)
    assert told == {}
    script = "import sys, nfflax.train.distributed as d; d.start(); assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_three_arguments_say_it_all(told):
    distributed.start("host0:8476", 4, 3)
    assert told["coordinator_address"] == "host0:8476"
    assert (told["num_processes"], told["process_id"]) == (4, 3)


def test_the_coordinator_may_stand_in_the_environment(told, environment):
    environment(JAX_COORDINATOR_ADDRESS="[fd00::1]:8476")
    distributed.start(processes=2, process=0)
    assert told["coordinator_address"] == "[fd00::1]:8476"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("host0:8476",), ("--processes\n", "--process\n", "is missing")),
        (("", 4, 1), ("--coordinator\n", "is missing", "HOST:PORT")),
        (("", 0, 0), ("--coordinator\n", "--processes\n", "is missing")),
        (("", 1, 3), ("--coordinator\n", "none of 1 processes")),
        (("host0", 4, 1), ('--coordinator: "host0"', "no address", "HOST:PORT")),
        (("host0:99999", 4, 1), ("no address",)),
        (("http://host0:8476", 4, 1), ("no address",)),
        (("host0:8476", 4, 4), ("--process: 4", "none of 4 processes", "0 to 3")),
        (("host0", 4, 7), ("no address", "none of 4 processes")),
    ],
)
def test_arguments_that_make_no_sense(told, arguments, said):
    text = complaint(*arguments)
    assert all(part in text for part in said), text
    assert told == {}


@pytest.mark.parametrize("cluster", [SLURM, OPEN_MPI], ids=["slurm", "open_mpi"])
def test_a_cluster_tells_who_is_who(told, environment, cluster):
    environment(**cluster)
    distributed.start()
    assert told["num_processes"] == 8
    assert told["local_device_ids"] is None  # JAX gives each process on a node one GPU


def test_a_process_alone_on_its_node_has_all_devices(told, environment):
    environment(**SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x4)", "SLURM_STEP_NUM_TASKS": "4"})
    distributed.start()
    assert (told["num_processes"], told["local_device_ids"]) == (4, [])


def test_a_process_keeps_the_gpu_that_the_scheduler_gave_it(told, environment):
    environment(**SLURM, CUDA_VISIBLE_DEVICES="3")
    distributed.start()
    assert told["local_device_ids"] == []


@pytest.mark.parametrize(
    "environ",
    [
        SLURM | {"SLURM_STEP_NUM_TASKS": "1"},  # a shell inside a job of 8 tasks
        {name: value for name, value in SLURM.items() if "STEP" not in name},  # a batch script
        OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},  # a pod of no indexed job
    ],
    ids=["slurm_shell", "slurm_script", "open_mpi_one", "pod"],
)
def test_a_cluster_that_started_one_process_does_not_count(told, environment, environ):
    environment(**environ)
    distributed.start()
    assert told == {}


def test_one_process_may_be_asked_for_on_a_cluster(told, environment):
    environment(**SLURM)
    distributed.start(processes=1)
    assert told == {}


def test_jax_that_was_told_already_is_left_alone(told, monkeypatch):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    distributed.start("host0:8476", 4, 3)
    assert told == {}


def test_processes_that_do_not_come(told, environment, monkeypatch):
    monkeypatch.setattr(distributed, "JOIN_SECONDS", 0.05)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: time.sleep(0.5))
    nobody = "127.0.0.1:1"
    text = complaint(nobody, 4, 0)
    assert "some of the 4 processes have not joined within 0.05 s" in text
    assert "process 0 does not answer" in complaint(nobody, 4, 1)
    environment(**SLURM)
    assert "some of the 8 processes that Slurm should have started" in complaint()


def test_what_jax_cannot_do_is_one_problem(told, monkeypatch):
    def fail(**_: object) -> None:
        raise RuntimeError("Address already in use\nand a page more")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    text = complaint("host0:8476", 2, 0)
    assert "cannot join the other processes of this run: Address already in use" in text
    assert "page" not in text


@pytest.mark.parametrize("script", ["local.sh", "plain_ssh.sh", "slurm.sbatch"])
def test_launch_scripts_are_bash(script):
    subprocess.run(["bash", "-n", str(LAUNCH / script)], check=True)


def test_the_jobset_starts_again_after_the_exit_code_that_says_so():
    yaml = pytest.importorskip("yaml")
    spec = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())["spec"]
    (rule,) = spec["failurePolicy"]["rules"]
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    (codes,) = (rule["onExitCodes"] for rule in job["podFailurePolicy"]["rules"])
    assert codes["values"] == [PREEMPTED]
    (container,) = job["template"]["spec"]["containers"]
    assert codes["containerName"] == container["name"]
    assert "--resume" in container["command"]
