"""Weights in and out of other formats."""

from nfflax.weights.deepmind import load_deepmind as load_deepmind
from nfflax.weights.deepmind import to_deepmind as to_deepmind
from nfflax.weights.errors import WeightsError as WeightsError
from nfflax.weights.timm import load_timm as load_timm
from nfflax.weights.timm import to_timm as to_timm
