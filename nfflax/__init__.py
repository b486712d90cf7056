"""Normalizer-free convolutional networks in JAX, compiled from short spec files.

Names load on first use: importing nfflax costs next to nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nfflax import data as data
    from nfflax import nn as nn
    from nfflax import optim as optim
    from nfflax import train as train
    from nfflax import weights as weights
    from nfflax.insight.spp import signals as signals
    from nfflax.nn.activations import gamma_of as gamma_of
    from nfflax.nn.activations import register_activation as register_activation
    from nfflax.nn.builder import build as build
    from nfflax.nn.builder import create as create
    from nfflax.nn.net import NFNet as NFNet
    from nfflax.nn.roles import Role as Role
    from nfflax.nn.roles import role_of as role_of
    from nfflax.optim.agc import agc as agc
    from nfflax.pretrained import backbone as backbone
    from nfflax.pretrained import load as load
    from nfflax.spec.errors import SpecError as SpecError
    from nfflax.spec.load import load_run as load_run
    from nfflax.spec.load import load_spec as load_spec
    from nfflax.spec.parts import BlockPlan as BlockPlan
    from nfflax.spec.parts import FeatureInfo as FeatureInfo
    from nfflax.spec.plan import Plan as Plan
    from nfflax.spec.plan import plan as plan
    from nfflax.spec.presets import list_specs as list_specs
    from nfflax.spec.run import Run as Run
    from nfflax.spec.schema import Spec as Spec
    from nfflax.weights.errors import WeightsError as WeightsError
    from nfflax.weights.export import export as export
    from nfflax.weights.fold import fold as fold

_MODULE_OF = {
    "BlockPlan": "nfflax.spec.parts",
    "FeatureInfo": "nfflax.spec.parts",
    "NFNet": "nfflax.nn.net",
    "Plan": "nfflax.spec.plan",
    "Role": "nfflax.nn.roles",
    "Run": "nfflax.spec.run",
    "Spec": "nfflax.spec.schema",
    "SpecError": "nfflax.spec.errors",
    "WeightsError": "nfflax.weights.errors",
    "agc": "nfflax.optim.agc",
    "backbone": "nfflax.pretrained",
    "build": "nfflax.nn.builder",
    "create": "nfflax.nn.builder",
    "export": "nfflax.weights.export",
    "fold": "nfflax.weights.fold",
    "gamma_of": "nfflax.nn.activations",
    "list_specs": "nfflax.spec.presets",
    "load": "nfflax.pretrained",
    "load_run": "nfflax.spec.load",
    "load_spec": "nfflax.spec.load",
    "plan": "nfflax.spec.plan",
    "register_activation": "nfflax.nn.activations",
    "role_of": "nfflax.nn.roles",
    "signals": "nfflax.insight.spp",
}
_SUBPACKAGES = ("data", "insight", "nn", "optim", "spec", "train", "weights")

__version__ = "0.1.0"
__all__ = sorted([*_MODULE_OF, "data", "nn", "optim", "train", "weights"])


def __getattr__(name: str) -> Any:
    if name in _SUBPACKAGES:
        return importlib.import_module(f"nfflax.{name}")
    if name in _MODULE_OF:
        value = getattr(importlib.import_module(_MODULE_OF[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'nfflax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
