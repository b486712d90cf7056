"""The network: a body and a head. Built from a Plan, called like any NNX module.

model = nfflax.build("nfnet_f0", rngs=nnx.Rngs(0))
logits = model(x_NHWC)              # eval by default
maps = model.features(x_NHWC)       # {level: pre-activation map}, see model.feature_info
"""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from nfflax.nn.attention import Linear
from nfflax.nn.block import Activate
from nfflax.nn.body import Body
from nfflax.nn.init import ZEROS, Init
from nfflax.nn.stage import Remat
from nfflax.spec.plan import Plan

# Rows of key material that the network draws from, apart from the blocks' positions.
_DROPOUT_STREAM = 1 << 30


class NFNet(Body):
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
        super().__init__(plan, dtype=dtype, unroll=unroll, remat=remat, rngs=rngs)
        self.final_act = Activate(plan.spec, plan.num_features, rngs=rngs)
        self.classifier = _classifier(plan, rngs)

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

    @property
    def _randomness(self) -> dict[str, float]:
        dropout = self.spec.head.dropout
        return super()._randomness | ({"dropout": dropout} if dropout else {})


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
