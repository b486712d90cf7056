"""Test-wide setup: eight CPU devices, quick compilation, no cache of it, a hypothesis profile.

pytest imports this file before any test module, so the environment is in place
before JAX is first imported. Subprocesses that a test starts inherit it.
"""

import os
import sys

if "jax" in sys.modules:
    raise RuntimeError("JAX was imported before tests/conftest.py could set its devices")

DEVICES = "--xla_force_host_platform_device_count=8"
# Most of the tests' time is LLVM's. Less of it changes no pass of XLA's own: results differ from
# the usual in rounding at most.
QUICKLY = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"

# The last flag wins: the count holds whatever was set before, a given level of optimisation stays.
os.environ["XLA_FLAGS"] = f"{QUICKLY} {os.environ.get('XLA_FLAGS', '')} {DEVICES}"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"

from hypothesis import settings  # noqa: E402

settings.register_profile(
    "ci",
    deadline=None,  # the first example of a shape pays for its compilation
    derandomize=os.environ.get("CI", "").lower() not in ("", "0", "false"),
)
settings.load_profile("ci")
