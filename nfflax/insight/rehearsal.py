"""A run's real train step compiled for devices that are not here, and what its program then says.

TPUs are described by libtpu (extra "tpu"), CPU devices are pretended. Either must be settled before
JAX starts, and a compiler that gives up may take its process along: so this is done in a process of
its own, `python -m nfflax.insight.rehearsal`, which reads JSON and writes JSON.
"""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

from nfflax.insight.chips import Pod, PodError
from nfflax.insight.collectives import Collective, collectives
from nfflax.spec.errors import NOT_GIVEN, Problem, SpecError
from nfflax.spec.load import load_run
from nfflax.spec.run import Run

# XLA searches long for the fastest form of every convolution. With the least effort it takes a
# quarter of the time for a network and 1/50 for one 3x3 convolution; flops and exchanges stay the
# same, memory differs by a tenth at most (docs/scaling.md).
_QUICKLY = {"exec_time_optimization_effort": -1.0}
# A process that compiles for TPUs asks no metadata server.
TPU_ENVIRONMENT = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
_CPU = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
# What XLA says when a program does not fit: of everything, or early on of temporary arrays alone.
_TOO_LARGE = re.compile(
    r"(?:Used|temporaries \()\s*(?P<used>[\d.]+[KMGT]?)\)?"
    r" (?:of|exceeds available HBM \()\s*(?P<there>[\d.]+[KMGT]?)"
)
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


class RehearsalError(SpecError):
    """A compiler that is missing, or gave up."""

    subject = "rehearsal"


@dataclass(frozen=True)
class Rehearsal:
    """What the compiler says of a train step. Bytes are those of one device."""

    devices: int
    mesh: dict[str, int]
    state: dict[str, int]
    """Bytes of the parts of the training state: "params", "ema", "stats", "opt"."""
    fits: bool
    """Whether the compiler finds room in a chip's memory; True on CPUs, which share theirs."""
    memory: int
    """What it needs: arguments, outputs in places of their own, what lives between, the program.
    Where the compiler finds no room, what it names: sometimes only part of that."""
    capacity: int
    """What there is on a chip; 0: of CPUs."""
    seconds: float
    """To trace and compile it."""
    optimized: bool
    """Compiled as for a run, and not with the least effort."""
    arguments: int = 0
    outputs: int = 0
    temporary: int = 0
    code: int = 0
    flops: float = 0.0
    """Of one device, by the compiler's count: it counts the body of a loop once."""
    accessed: float = 0.0
    """Bytes that go between memory and chip, by the same count."""
    exchanges: tuple[Collective, ...] = ()

    @property
    def is_compiled(self) -> bool:
        """Whether there is a program: the compiler gives up early where far too little room is."""
        return self.arguments > 0


def rehearse(run: Run, place: Pod | int, *, optimize: bool = False) -> Rehearsal:
    """Compile a run's train step for a TPU pod, or for a number of CPU devices, in a process.

    `optimize` compiles as a run on TPUs does, in place of as quickly as possible.
    Raises MeshError where run and devices do not fit, RehearsalError where the compiler gives up.
    """
    env = dict(os.environ, JAX_PLATFORMS="cpu", JAX_ENABLE_COMPILATION_CACHE="false")
    if isinstance(place, Pod):
        check_compiler(place)
        env |= TPU_ENVIRONMENT
    else:
        flags = "" if optimize else _CPU
        count = f"--xla_force_host_platform_device_count={place}"  # the last one wins
        env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} {flags} {count}"
    asked = {
        "run": run.model_dump(mode="json"),
        "place": place.name if isinstance(place, Pod) else place,
        "optimize": optimize,
    }
    command = [sys.executable, "-m", "nfflax.insight.rehearsal"]
    done = subprocess.run(
        command, input=json.dumps(asked), env=env, capture_output=True, text=True, check=False
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        said = [line for line in done.stderr.splitlines() if line.strip()][-5:]
        message = f"the compiler ended with code {done.returncode}: {' / '.join(said)}"
        raise RehearsalError([Problem(f"run {run.name}", "", message)])
    answer = json.loads(lines[-1])
    if problems := answer.get("problems"):
        raise RehearsalError([Problem(**problem) for problem in problems])
    exchanges = tuple(Collective(**each) for each in answer.pop("exchanges"))
    found = Rehearsal(**answer, exchanges=exchanges)
    if not isinstance(place, Pod) or not found.fits:
        return found
    return dataclasses.replace(found, capacity=place.chip.usable)


def check_compiler(pod: Pod) -> None:
    """That there is a compiler for a pod; raises PodError."""
    if not pod.chip.is_tpu:
        message = "there is no compiler for this chip without the chip"
        allowed = "TPUs; others on paper (--on-paper)"
        raise PodError([Problem("plan", "--topology", message, pod.name, allowed)])
    if importlib.util.find_spec("libtpu") is None:
        message = "compiling for TPUs needs libtpu, which is not installed: pip install nfflax[tpu]"
        allowed = "or an estimate without it: --on-paper"
        raise PodError([Problem("plan", "--topology", message, pod.name, allowed)])


# --- in the process ---------------------------------------------------------------------------


def compile_for(run: Run, devices: list[Any], *, optimize: bool) -> Rehearsal:
    """Compile a run's train step for devices, real ones or described, in this process."""
    import jax

    from nfflax.insight.aot import abstract_batch, temporary_bytes
    from nfflax.train.layout import layout
    from nfflax.train.mesh import make_mesh
    from nfflax.train.program import make_program

    begun = time.monotonic()
    mesh = make_mesh(run.mesh, devices)
    program = make_program(run, mesh)
    known: dict[str, Any] = {
        "devices": len(devices),
        "mesh": dict(mesh.shape),
        "state": {name: s.per_device for name, s in layout(program.abstract).totals.items()},
        "optimized": optimize,
    }
    options = None if optimize or devices[0].platform != "tpu" else _QUICKLY
    step: Any = program.train_step
    with jax.set_mesh(mesh):
        lowered = step.lower(program.abstract, abstract_batch(program))
        try:
            compiled = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            full = _TOO_LARGE.search(str(error))
            if not full:
                raise
            known |= {"memory": _bytes(full["used"]), "capacity": _bytes(full["there"])}
            return Rehearsal(**known, fits=False, seconds=time.monotonic() - begun)
    sizes, costs = compiled.memory_analysis(), compiled.cost_analysis()
    outputs = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    temporary = temporary_bytes(sizes, devices[0].platform)
    parts = sizes.argument_size_in_bytes, outputs, temporary
    return Rehearsal(
        **known,
        fits=True,
        memory=sum(parts) + sizes.generated_code_size_in_bytes,
        capacity=0,
        seconds=time.monotonic() - begun,
        arguments=parts[0],
        outputs=parts[1],
        temporary=parts[2],
        code=sizes.generated_code_size_in_bytes,
        flops=costs.get("flops", 0.0),
        accessed=costs.get("bytes accessed", 0.0),
        exchanges=collectives(compiled.as_text(), len(devices)),
    )


def _bytes(text: str) -> int:
    """ "33.21G" in bytes."""
    unit = text[-1] if text[-1].isalpha() else ""
    return round(float(text.removesuffix(unit)) * _UNITS[unit])


def devices_of(place: str | int) -> list[Any]:
    """Devices of a TPU pod that is described, or the first pretended ones."""
    import jax

    if isinstance(place, int):
        return jax.devices()[:place]
    from jax.experimental import topologies

    return list(topologies.get_topology_desc(platform="tpu", topology_name=place).devices)


def _answer(asked: dict[str, Any]) -> dict[str, Any]:
    place = asked["place"]
    try:
        run, devices = load_run(asked["run"]), devices_of(place)
        found = compile_for(run, devices, optimize=asked["optimize"])
    except SpecError as error:
        said = [vars(problem).items() for problem in error.problems]
        return {"problems": [{k: v for k, v in each if v is not NOT_GIVEN} for each in said]}
    return dataclasses.asdict(found)


if __name__ == "__main__":
    print(json.dumps(_answer(json.load(sys.stdin)), default=str))
