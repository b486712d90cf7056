"""Instruments: what goes on in a network and in a run."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nfflax.insight.diagnosis import Fault as Fault
    from nfflax.insight.diagnosis import Report as Report
    from nfflax.insight.diagnosis import diagnose as diagnose
    from nfflax.insight.spp import signals as signals

_MODULE_OF = {
    "Fault": "nfflax.insight.diagnosis",
    "Report": "nfflax.insight.diagnosis",
    "diagnose": "nfflax.insight.diagnosis",
    "signals": "nfflax.insight.spp",
}

__all__ = ["Fault", "Report", "diagnose", "signals"]


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(importlib.import_module(_MODULE_OF[name]), name)
    raise AttributeError(f"module 'nfflax.insight' has no attribute {name!r}")
