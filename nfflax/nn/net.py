"""The network: stem, stages, head. Built from a Plan, called like any NNX module.

model = nfflax.build("nfnet_f0", rngs=nnx.Rngs(0))
logits = model(x_NHWC)              # eval by default
maps = model.features(x_NHWC)       # {level: pre-activation map}, see model.feature_info
"""

from collections.abc import Iterable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import ArrayLike

from nfflax.nn.attention import Linear
from nfflax.nn.block import Activate, BlockSignals, make_conv, map_signals
from nfflax.nn.conv import Padding, resolve_padding
from nfflax.nn.init import ZEROS, Init
from nfflax.nn.stage import Remat, Stage
from nfflax.nn.wsconv import Conv
from nfflax.spec.parts import FeatureInfo
from nfflax.spec.plan import Plan
from nfflax.spec.schema import Spec

# Rows of key material that the network draws from, apart from the blocks' positions.
_DROPOUT_STREAM = 1 << 30


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
        self.pool = spec.stem.pool
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


class NFNet(nnx.Module):
    """Any network a spec describes, made by `nfflax.build`; `train()` and `eval()` switch modes."""

    def __init__(
        self,
        plan: Plan,
        *,
        dtype: jax.typing.DTypeLike = jnp.float32,
        unroll: int = 1,
        remat: Remat = "none",
        rngs: nnx.Rngs,
    ):
        spec = plan.spec
        self.plan, self.dtype = plan, jnp.dtype(dtype)
        self.deterministic = True  # what NNX's train() and eval() set
        self.stem = Stem(plan, rngs=rngs)
        self.stages = nnx.List(
            Stage(blocks, spec, unroll=unroll, remat=remat, rngs=rngs) for blocks in plan.stages()
        )
        self.final_conv = _final_conv(plan, rngs)
        self.final_act = Activate(spec, plan.num_features, rngs=rngs)
        self.classifier = _classifier(plan, rngs)

    @property
    def spec(self) -> Spec:
        """The spec this network was built from."""
        return self.plan.spec

    @property
    def feature_info(self) -> tuple[FeatureInfo, ...]:
        """Level, name, channels and stride of every map that `features` can return."""
        return self.plan.feature_info

    @property
    def num_features(self) -> int:
        """Channels of the pooled features."""
        return self.plan.num_features

    def __call__(
        self,
        x_NHWC: ArrayLike,
        *,
        train: bool | None = None,
        rngs: nnx.Rngs | jax.Array | None = None,
    ) -> jax.Array:
        """Float32 logits, or pooled features without a classifier.

        `train` overrides the mode set by `train()` and `eval()`. Training with dropout or
        stochastic depth needs `rngs`: an `nnx.Rngs` (its `dropout` stream) or a key.
        """
        train, key = self._mode(train, rngs)
        map_NHWC = self.forward_features(x_NHWC, train=train, rngs=key)
        return self.forward_head(map_NHWC, train=train, rngs=key)

    def forward_features(
        self,
        x_NHWC: ArrayLike,
        *,
        train: bool | None = None,
        rngs: nnx.Rngs | jax.Array | None = None,
    ) -> jax.Array:
        """The final activated map, before pooling."""
        train, key = self._mode(train, rngs)
        return self.final_act(self._trace(x_NHWC, train, key).final_NHWC, train)

    def forward_head(
        self,
        map_NHWC: jax.Array,
        *,
        train: bool | None = None,
        rngs: nnx.Rngs | jax.Array | None = None,
    ) -> jax.Array:
        """Pool, dropout and classifier, in float32."""
        train, key = self._mode(train, rngs)
        pool = jnp.mean if self.spec.head.pool == "avg" else jnp.max
        x_NC = pool(map_NHWC.astype(jnp.float32), axis=(1, 2))
        rate = self.spec.head.dropout
        if key is not None and rate > 0:
            keep = jax.random.bernoulli(
                jax.random.fold_in(key, _DROPOUT_STREAM), 1 - rate, x_NC.shape
            )
            x_NC = jnp.where(keep, x_NC / (1 - rate), 0.0)
        return x_NC if self.classifier is None else self.classifier(x_NC)

    def features(
        self,
        x_NHWC: ArrayLike,
        levels: Iterable[int] | None = None,
        *,
        train: bool | None = None,
        rngs: nnx.Rngs | jax.Array | None = None,
    ) -> dict[int, jax.Array]:
        """Maps by level, all or the chosen ones; what they are is in `feature_info`.

        Maps are pre-activation: raw outputs of a convolution or of the residual sum, whose scale
        grows along a stage.
        """
        known = [info.level for info in self.feature_info]
        wanted = known if levels is None else list(levels)
        if unknown := sorted(set(wanted) - set(known)):
            raise ValueError(f"no feature level {unknown}: this network has {known}")
        train, key = self._mode(train, rngs)
        maps = self._trace(x_NHWC, train, key).maps
        return {level: maps[level] for level in wanted}

    def trace(self, x_NHWC: ArrayLike) -> Trace:
        """One eval pass with every feature map and the signal statistics of every block."""
        return self._trace(x_NHWC, train=False, key=None, with_signals=True)

    def _trace(
        self, images_NHWC: ArrayLike, train: bool, key: jax.Array | None, with_signals: bool = False
    ) -> Trace:
        x_NHWC = jnp.asarray(images_NHWC, self.dtype)
        chex.assert_rank(x_NHWC, 4)
        chex.assert_axis_dimension(x_NHWC, -1, self.spec.stem.in_channels)
        x_NHWC, tap_NHWC = self.stem(x_NHWC, train)
        maps, collected = {1: tap_NHWC}, []
        stem_signals = map_signals(x_NHWC) if with_signals else ()
        for level, stage in enumerate(self.stages, start=2):
            x_NHWC, signals = stage(x_NHWC, key=key, train=train, with_signals=with_signals)
            maps[level] = x_NHWC
            collected.append(signals)
        if self.final_conv is not None:
            x_NHWC = self.final_conv(x_NHWC)
            maps[len(maps) + 1] = x_NHWC
        return Trace(x_NHWC, maps, _joined(stem_signals, collected) if with_signals else None)

    def _mode(
        self, train: bool | None, rngs: nnx.Rngs | jax.Array | None
    ) -> tuple[bool, jax.Array | None]:
        """(training?, the key to draw from or None)."""
        train = not self.deterministic if train is None else train
        regularization, head = self.spec.regularization, self.spec.head
        if not train or not (regularization.stochastic_depth or head.dropout):
            return train, None
        if rngs is None:
            raise ValueError(
                f"{self.spec.name} trains with stochastic depth {regularization.stochastic_depth} "
                f"and dropout {head.dropout}: call it with rngs=nnx.Rngs(...) or a key"
            )
        return train, rngs.dropout() if isinstance(rngs, nnx.Rngs) else rngs


def _final_conv(plan: Plan, rngs: nnx.Rngs) -> Conv | None:
    if (conv := plan.final_conv) is None:
        return None
    return make_conv(plan.spec, conv.in_channels, conv.out_channels, rngs=rngs)


def _classifier(plan: Plan, rngs: nnx.Rngs) -> Linear | None:
    if (classifier := plan.classifier) is None:
        return None
    # N(0, 0.01) by default: zeros are unstable with many classes (arXiv:2102.06171, appendix).
    return Linear(
        classifier.in_channels,
        classifier.out_channels,
        in_axis="in",
        out_axis="classes",
        clip=False,
        kernel_init=Init("normal", 0.01) if plan.spec.head.init == "normal" else ZEROS,
        rngs=rngs,
    )


def _joined(stem: tuple[jax.Array, ...], blocks: list[BlockSignals]) -> dict[str, jax.Array]:
    """Curves over depth: entry 0 of the map statistics is the stem."""
    avg_sq_mean, avg_var = stem
    return {
        "avg_sq_mean": jnp.concatenate([avg_sq_mean[None], *(b.avg_sq_mean for b in blocks)]),
        "avg_var": jnp.concatenate([avg_var[None], *(b.avg_var for b in blocks)]),
        "res_avg_var": jnp.concatenate([b.res_avg_var for b in blocks]),
    }
