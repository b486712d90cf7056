"""A network as the front of another one: it returns maps, and ends where the last of them is made.

backbone = nfflax.backbone("nfnet_f0", weights="nfnet_f0")
maps = backbone(x_NHWC)                 # {level: map}, see backbone.feature_info
"""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from nfflax.nn.activations import get_activation
from nfflax.nn.body import Body
from nfflax.nn.stage import Remat
from nfflax.spec.parts import FeatureInfo
from nfflax.spec.plan import Plan


class Backbone(Body):
    """A network up to the highest of some feature levels, made by `nfflax.backbone`.

    Nothing above that level exists; what is below has the parameters, betas and drop rates of the
    whole network.
    """

    def __init__(
        self,
        plan: Plan,
        levels: Iterable[int] = (2, 3, 4, 5),
        *,
        activated: bool = False,
        frozen: int = 0,
        dtype: jax.typing.DTypeLike = jnp.float32,
        unroll: int = 1,
        remat: Remat = "none",
        rngs: nnx.Rngs,
    ):
        self.levels = _checked(levels, plan)
        if activated and plan.spec.norm.kind == "batch":
            raise ValueError(
                f"activated = True: {plan.spec.name} normalises a map in the block that reads it, "
                "which a backbone may end before; only norm-free networks have activated maps"
            )
        self.activated = activated
        cut = plan.upto(self.levels[-1])
        super().__init__(cut, dtype=dtype, unroll=unroll, remat=remat, frozen=frozen, rngs=rngs)

    @property
    def feature_info(self) -> tuple[FeatureInfo, ...]:
        """Level, name, channels, stride and expected variance of every map that a call returns."""
        return tuple(info for info in self.plan.feature_info if info.level in self.levels)

    def __call__(
        self,
        x_NHWC: ArrayLike,
        *,
        train: bool | None = None,
        rngs: nnx.Rngs | jax.Array | None = None,
    ) -> dict[int, jax.Array]:
        """{level: map}, in the order of `feature_info`.

        By default maps are pre-activation: raw outputs of a convolution or of a residual sum, whose
        variance grows along a stage. With `activated` they are what the network makes of them
        before it reads on, of about unit variance: the activation times its gamma (whether the
        numerics have gamma there or in the next convolution) over the square root of the map's
        expected variance, which for a stage is the beta of the block that would follow. The final
        convolution's map gets the network's final activation and no such factor.

        `train` overrides the mode set by `train()` and `eval()`. Training with stochastic depth
        needs `rngs`: an `nnx.Rngs` (its `dropout` stream) or a key.
        """
        train, key = self._mode(train, rngs)
        maps = self._trace(x_NHWC, train, key).maps
        if not self.activated:
            return {info.level: maps[info.level] for info in self.feature_info}
        return {info.level: self._activated(maps[info.level], info) for info in self.feature_info}

    def _activated(self, map_NHWC: jax.Array, info: FeatureInfo) -> jax.Array:
        numerics = self.spec.numerics
        activation = get_activation(numerics.activation)
        scale = 1.0 if numerics.gamma == "none" else activation.gamma
        if info.name != "final_conv":
            scale *= info.variance**-0.5
        elif numerics.gamma == "conv":  # no convolution follows that would bring it
            scale = 1.0
        return activation.function(map_NHWC) * scale


def _checked(levels: Iterable[int], plan: Plan) -> tuple[int, ...]:
    """The levels in order; ValueError where there are none, or no such."""
    known, wanted = [info.level for info in plan.feature_info], set(levels)
    if unknown := sorted(wanted.difference(known)):
        raise ValueError(f"no feature level {unknown}: {plan.spec.name} has {known}")
    if not wanted:
        raise ValueError(f"levels is empty: {plan.spec.name} has {known}")
    return tuple(level for level in known if level in wanted)
