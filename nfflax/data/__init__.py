"""Images for training and evaluation: uint8 batches on the host, augmented on the device.

Names load on first use: neither Pillow nor grain is imported before it is needed.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nfflax.data import augment as augment
    from nfflax.data.errors import DataError as DataError
    from nfflax.data.errors import ImageError as ImageError
    from nfflax.data.feed import augmentation as augmentation
    from nfflax.data.feed import sized as sized
    from nfflax.data.feed import train_feed as train_feed
    from nfflax.data.generate import generate_folder as generate_folder
    from nfflax.data.pack import pack_split as pack_split
    from nfflax.data.pipeline import Batches as Batches
    from nfflax.data.pipeline import eval_batches as eval_batches
    from nfflax.data.pipeline import train_batches as train_batches
    from nfflax.data.sources import ArraySource as ArraySource
    from nfflax.data.sources import Record as Record
    from nfflax.data.sources import Source as Source
    from nfflax.data.sources import open_source as open_source
    from nfflax.data.views import EvalView as EvalView
    from nfflax.data.views import TrainView as TrainView
    from nfflax.spec.data import Data as Data

_MODULE_OF = {
    "ArraySource": "nfflax.data.sources",
    "Batches": "nfflax.data.pipeline",
    "Data": "nfflax.spec.data",
    "DataError": "nfflax.data.errors",
    "EvalView": "nfflax.data.views",
    "ImageError": "nfflax.data.errors",
    "Record": "nfflax.data.sources",
    "Source": "nfflax.data.sources",
    "TrainView": "nfflax.data.views",
    "augmentation": "nfflax.data.feed",
    "eval_batches": "nfflax.data.pipeline",
    "generate_folder": "nfflax.data.generate",
    "open_source": "nfflax.data.sources",
    "pack_split": "nfflax.data.pack",
    "sized": "nfflax.data.feed",
    "train_batches": "nfflax.data.pipeline",
    "train_feed": "nfflax.data.feed",
}

__all__ = sorted([*_MODULE_OF, "augment"])


def __getattr__(name: str) -> Any:
    if name == "augment":
        return importlib.import_module("nfflax.data.augment")
    if name in _MODULE_OF:
        value = getattr(importlib.import_module(_MODULE_OF[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'nfflax.data' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
