"""The parts of a plan: plain data, one record per convolution, block and feature level."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ConvPlan:
    """One convolution and the classifier: shapes, parameters, cost."""

    name: str
    in_channels: int
    out_channels: int
    kernel: int = 1
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    params: int = 0
    macs: float = 0.0


@dataclass(frozen=True)
class BlockPlan:
    """One residual block: x + alpha * skip_gain * f(beta * activation(x)), and what it costs."""

    name: str
    index: int
    stage: int
    in_channels: int
    mid_channels: int
    out_channels: int
    kernel: int
    groups: int
    spatial_convs: int
    stride: int
    dilation: int
    first_dilation: int
    projection: bool
    attention_width: int
    attention_hidden: int
    expected_variance: float
    alpha: float
    beta: float
    drop_rate: float
    resolution: tuple[int, int]
    params: int
    macs: float


@dataclass(frozen=True)
class FeatureInfo:
    """One feature level: the pre-activation map that `features()` returns under this level.

    `variance` is the expected one at initialisation, by the recursion that gives blocks their
    betas: 1 for the stem and under batch normalisation.
    """

    level: int
    name: str
    channels: int
    stride: int
    variance: float
