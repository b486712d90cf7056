"""All of a network below its head: stem, stages, final convolution, and one pass through them.

NFNet puts a head on it, Backbone returns its maps. Which parts there are is in the Plan: one that
`Plan.upto` has cut makes a body that ends there.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import ArrayLike

from nfflax.nn.block import Activate, BlockSignals, make_conv, map_signals
from nfflax.nn.conv import Padding, resolve_padding
from nfflax.nn.frozen import Part, freeze, stopped
from nfflax.nn.stage import Remat, Stage
from nfflax.nn.wsconv import Conv
from nfflax.spec.parts import FeatureInfo
from nfflax.spec.plan import Plan
from nfflax.spec.schema import Spec


class Trace(NamedTuple):
    """One pass through stem and stages."""

    final_NHWC: jax.Array
    maps: dict[int, jax.Array]
    signals: dict[str, jax.Array] | None


class Stem(nnx.Module):
    """Convolutions with activations between them, then an optional max-pool."""

    def __init__(self, plan: Plan, *, rngs: nnx.Rngs):
        spec = plan.spec
        self.convs = nnx.List(
            make_conv(spec, c.in_channels, c.out_channels, c.kernel, c.stride, rngs=rngs)
            for c in plan.stem
        )
        self.acts = nnx.List(Activate(spec, c.out_channels, rngs=rngs) for c in plan.stem[:-1])
        self.pool = spec.stem.pool if plan.blocks else "none"
        self.padding: Padding = spec.numerics.padding
        self.tapped = int(plan.feature_info[0].name.rsplit(".", 1)[1])

    def __call__(self, x_NHWC: jax.Array, train: bool) -> tuple[jax.Array, jax.Array]:
        """(output, the map of feature level 1)."""
        tap_NHWC = x_NHWC
        for i, conv in enumerate(self.convs):
            if i > 0:
                x_NHWC = self.acts[i - 1](x_NHWC, train)
            x_NHWC = conv(x_NHWC)
            tap_NHWC = x_NHWC if i == self.tapped else tap_NHWC
        if self.pool == "max":
            pads = resolve_padding(self.padding, x_NHWC.shape[1:3], (3, 3), (2, 2), (1, 1))
            window, stride = (1, 3, 3, 1), (1, 2, 2, 1)
            padding = ((0, 0), *pads, (0, 0))
            x_NHWC = lax.reduce_window(x_NHWC, -jnp.inf, lax.max, window, stride, padding)
        return x_NHWC, tap_NHWC


class Body(nnx.Module):
    """Stem, stages and final convolution of a plan; `train()` and `eval()` switch modes.

    What makes the maps up to level `frozen` does not train: its parameters are Frozen, it draws
    nothing, and BatchNorm keeps its statistics. 0 freezes nothing.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        dtype: jax.typing.DTypeLike = jnp.float32,
        unroll: int = 1,
        remat: Remat = "none",
        frozen: int = 0,
        rngs: nnx.Rngs,
    ):
        if unroll < 1:
            raise ValueError(f"unroll = {unroll}: must be 1 or more")
        if remat not in ("none", "block", "conv"):
            raise ValueError(f'remat = {remat!r}: allowed are "none", "block" and "conv"')
        highest = len(plan.feature_info)
        if frozen not in range(highest + 1):
            raise ValueError(f"frozen = {frozen!r}: allowed are 0 to {highest}, the highest level")
        self.plan, self.dtype, self.frozen = plan, jnp.dtype(dtype), frozen
        self.folded = False  # what `nfflax.fold` sets
        self.deterministic = True  # what NNX's train() and eval() set
        self.stem = Stem(plan, rngs=rngs)
        self.stages = nnx.List(
            Stage(blocks, plan.spec, unroll=unroll, remat=remat, rngs=rngs)
            for blocks in plan.stages()
        )
        self.final_conv = _final_conv(plan, rngs)
        for part in (self.stem, *self.stages, self.final_conv)[:frozen]:
            if part is not None:
                freeze(part)

    @property
    def spec(self) -> Spec:
        """The spec this network was built from."""
        return self.plan.spec

    @property
    def feature_info(self) -> tuple[FeatureInfo, ...]:
        """Level, name, channels, stride and expected variance of every map there is."""
        return self.plan.feature_info

    def trace(self, x_NHWC: ArrayLike) -> Trace:
        """One eval pass with every feature map and the signal statistics of every block."""
        if self.folded:
            raise ValueError(
                f"this {self.spec.name} is folded: only what it was made from tells "
                "the signals of its branches"
            )
        return self._trace(x_NHWC, train=False, key=None, with_signals=True)

    def _trace(
        self, images_NHWC: ArrayLike, train: bool, key: jax.Array | None, with_signals: bool = False
    ) -> Trace:
        x_NHWC = jnp.asarray(images_NHWC, self.dtype)
        chex.assert_rank(x_NHWC, 4)
        chex.assert_axis_dimension(x_NHWC, -1, self.spec.stem.in_channels)
        x_NHWC, tap_NHWC = self._trainable(self.stem, 1)(x_NHWC, train and self.frozen < 1)
        maps, collected = {1: tap_NHWC}, []
        stem_signals = map_signals(x_NHWC) if with_signals else ()
        for level, stage in enumerate(self.stages, start=2):
            trains = train and self.frozen < level
            x_NHWC, signals = self._trainable(stage, level)(
                x_NHWC, key=key if trains else None, train=trains, with_signals=with_signals
            )
            maps[level] = x_NHWC
            collected.append(signals)
        if self.final_conv is not None:
            level = len(maps) + 1
            x_NHWC = self._trainable(self.final_conv, level)(x_NHWC)
            maps[level] = x_NHWC
        return Trace(x_NHWC, maps, _joined(stem_signals, collected) if with_signals else None)

    def _trainable(self, part: Part, level: int) -> Part:
        """The part that makes a level's map, as this pass uses it."""
        return stopped(part) if level <= self.frozen else part

    @property
    def _randomness(self) -> dict[str, float]:
        """What training draws for, with its rate."""
        rates = [
            rate for stage in self.stages[max(0, self.frozen - 1) :] for rate in stage.drop_rates
        ]
        depth = self.spec.regularization.stochastic_depth
        return {"stochastic depth": depth} if any(rates) else {}

    def _mode(
        self, train: bool | None, rngs: nnx.Rngs | jax.Array | None
    ) -> tuple[bool, jax.Array | None]:
        """(training?, the key to draw from or None)."""
        train = not self.deterministic if train is None else train
        if train and self.folded:
            raise ValueError(f"this {self.spec.name} is folded: only what it was made from trains")
        draws = self._randomness if train else {}
        if not draws:
            return train, None
        if rngs is None:
            what = " and ".join(f"{name} {rate}" for name, rate in draws.items())
            raise ValueError(
                f"{self.spec.name} trains with {what}: call it with rngs=nnx.Rngs(...) or a key"
            )
        return train, rngs.dropout() if isinstance(rngs, nnx.Rngs) else rngs


def _final_conv(plan: Plan, rngs: nnx.Rngs) -> Conv | None:
    if (conv := plan.final_conv) is None:
        return None
    return make_conv(plan.spec, conv.in_channels, conv.out_channels, rngs=rngs)


def _joined(stem: tuple[jax.Array, ...], blocks: list[BlockSignals]) -> dict[str, jax.Array]:
    """Curves over depth: entry 0 of the map statistics is the stem."""
    avg_sq_mean, avg_var = stem
    return {
        "avg_sq_mean": jnp.concatenate([avg_sq_mean[None], *(b.avg_sq_mean for b in blocks)]),
        "avg_var": jnp.concatenate([avg_var[None], *(b.avg_var for b in blocks)]),
        "res_avg_var": jnp.concatenate([jnp.zeros(0), *(b.res_avg_var for b in blocks)]),
    }
