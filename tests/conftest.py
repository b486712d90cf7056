"""Test-wide setup: eight CPU devices, no compilation cache, one hypothesis profile.

pytest imports this file before any test module, so the environment is in place
before JAX is first imported. Subprocesses that a test starts inherit it.
"""

import os
import sys

if "jax" in sys.modules:
    raise RuntimeError("JAX was imported before tests/conftest.py could set its devices")

DEVICES = "--xla_force_host_platform_device_count=8"

# The last flag wins, so this holds whatever count was set before.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}".strip()
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"

from hypothesis import settings  # noqa: E402

settings.register_profile(
    "ci",
    deadline=None,  # the first example of a shape pays for its compilation
    derandomize=os.environ.get("CI", "").lower() not in ("", "0", "false"),
)
settings.load_profile("ci")
