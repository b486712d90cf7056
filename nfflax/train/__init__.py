"""Training at any scale: mesh, state, steps, the loop, checkpoints; and models from what it left.

Names load on first use: what only loads a model imports neither grain nor the loop.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nfflax.train.checkpoint import Checkpoints as Checkpoints
    from nfflax.train.checkpoint import load_weights as load_weights
    from nfflax.train.errors import CheckpointError as CheckpointError
    from nfflax.train.errors import MeshError as MeshError
    from nfflax.train.errors import TrainError as TrainError
    from nfflax.train.history import read_history as read_history
    from nfflax.train.inference import Loaded as Loaded
    from nfflax.train.inference import load_model as load_model
    from nfflax.train.inference import predictions as predictions
    from nfflax.train.loop import train as train
    from nfflax.train.mesh import make_mesh as make_mesh
    from nfflax.train.mesh import param_shardings as param_shardings
    from nfflax.train.outcome import Result as Result
    from nfflax.train.program import Program as Program
    from nfflax.train.program import make_program as make_program

_MODULE_OF = {
    "CheckpointError": "nfflax.train.errors",
    "Checkpoints": "nfflax.train.checkpoint",
    "Loaded": "nfflax.train.inference",
    "MeshError": "nfflax.train.errors",
    "Program": "nfflax.train.program",
    "Result": "nfflax.train.outcome",
    "TrainError": "nfflax.train.errors",
    "load_model": "nfflax.train.inference",
    "load_weights": "nfflax.train.checkpoint",
    "make_mesh": "nfflax.train.mesh",
    "make_program": "nfflax.train.program",
    "param_shardings": "nfflax.train.mesh",
    "predictions": "nfflax.train.inference",
    "read_history": "nfflax.train.history",
    "train": "nfflax.train.loop",
}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(importlib.import_module(_MODULE_OF[name]), name)
    raise AttributeError(f"module 'nfflax.train' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
