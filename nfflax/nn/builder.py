"""From a spec to a network in one call."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from nfflax.nn.init import draw_all
from nfflax.nn.net import NFNet
from nfflax.nn.stage import Remat
from nfflax.spec.load import Source, load_spec
from nfflax.spec.plan import Plan, plan

Made = TypeVar("Made", bound=nnx.Module)


def build(
    spec: Source | Plan,
    *,
    rngs: nnx.Rngs,
    dtype: jax.typing.DTypeLike = jnp.float32,
    unroll: int = 1,
    remat: Remat = "none",
    output_stride: int | None = None,
) -> NFNet:
    """The network of a spec (a preset name, path, dict, Spec) or of a ready Plan.

    `dtype` is the compute dtype; parameters are float32. `unroll` is how many of a stage's
    identical blocks the compiler sees at once: 1 compiles fastest, a stage's depth unrolls it.
    `remat` saves memory in training: "block" keeps only block inputs for the backward pass, "conv"
    only convolution outputs. `output_stride` 8 or 16 keeps later maps large, with the same
    parameters. Initial weights are made by one compiled program.
    """
    compiled = spec if isinstance(spec, Plan) else plan(spec, output_stride=output_stride)

    def make() -> NFNet:
        return NFNet(compiled, dtype=dtype, unroll=unroll, remat=remat, rngs=nnx.Rngs(0))

    return drawn(make, rngs)


def drawn(make: Callable[[], Made], rngs: nnx.Rngs) -> Made:
    """The module that `make` describes, its initial weights made by one compiled program."""
    graph, abstract = nnx.split(nnx.eval_shape(make))
    return nnx.merge(graph, jax.jit(draw_all)(rngs.params(), abstract))


def create(
    name: Source,
    *,
    num_classes: int | None = None,
    in_channels: int | None = None,
    overrides: Mapping[str, Any] | None = None,
    rngs: nnx.Rngs,
    **how: Any,
) -> NFNet:
    """`build` with the two most common changes by name; `how` goes to `build`."""
    changes = {"head.num_classes": num_classes, "stem.in_channels": in_channels}
    given = {key: value for key, value in changes.items() if value is not None}
    return build(load_spec(name, given | dict(overrides or {})), rngs=rngs, **how)
