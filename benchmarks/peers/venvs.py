"""The environment of each peer: made once with pip in the user's cache, or given.

JAX is of the same release in all. Nothing but names and releases is asked for: where packages come
from, and which build of torch, is pip's configuration (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL).
"""

import hashlib
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from nfflax.folders import cache_folder

HERE = ("nfflax", "matmul")  # in the environment that this runs in


class VenvError(Exception):
    """An environment that cannot be made or is not there."""


def python_of(peer: str, device: str, given: Mapping[str, Path]) -> Path:
    """The interpreter of a peer's environment, which is made if it must be."""
    if peer in HERE:
        return Path(sys.executable)
    if peer in given:
        python = given[peer] / "bin" / "python"
        if not python.exists():
            raise VenvError(f"no {python}")
        return python
    wanted = requirements(peer, device)
    mark = hashlib.sha256("\n".join([sys.version, *wanted]).encode()).hexdigest()[:8]
    folder = cache_folder("benchmarks") / f"{peer}-{mark}"
    python, done = folder / "bin" / "python", folder / "complete"
    if not done.exists():
        _call([sys.executable, "-m", "venv", "--clear", str(folder)])
        _call([str(python), "-m", "pip", "install", "--quiet", *wanted])
        done.touch()
    return python


def requirements(peer: str, device: str) -> list[str]:
    """What a peer's environment holds."""
    jax = f"jax{_plugin() if device == 'cuda' else ''}=={version('jax')}"
    ours = [f"{name}=={version(name)}" for name in ("flax", "optax", "orbax-checkpoint", "grain")]
    return {
        "official": [jax, f"optax=={version('optax')}", "dm-haiku", "dm-tree", "dill"],
        "jimm": [jax, *ours, "chex"],
        "timm": ["torch", "torchvision", "timm"],
    }[peer]


def _plugin() -> str:
    for name in ("cuda13", "cuda12"):
        try:
            version(f"jax-{name}-plugin")
        except PackageNotFoundError:
            continue
        return f"[{name}]"
    raise VenvError("JAX has no plugin for CUDA here: pip install 'nfflax[cuda13]'")


def _call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise VenvError(f"{' '.join(command[-4:])}: {''.join(said)}")
