"""Trained networks in a line: from a run, a file, the hub, or a name with published weights.

    model = nfflax.load("timm_nfnet_l0", num_classes=10, rngs=nnx.Rngs(0))
    logits = model(x_NHWC)

Nothing is imported until it is called: the parts that find and read weights are needed only then.
"""

import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flax import nnx

    from nfflax.nn.backbone import Backbone
    from nfflax.nn.net import NFNet
    from nfflax.spec.load import Source


def load(
    place: str | os.PathLike[str],
    *,
    spec: "Source | None" = None,
    num_classes: int | None = None,
    in_channels: int | None = None,
    overrides: Mapping[str, Any] | None = None,
    rngs: "nnx.Rngs | None" = None,
    **how: Any,
) -> "NFNet":
    """The trained network at a place, ready to be called, in evaluation mode.

    A place is a run's folder or one of its checkpoints, a file of weights, an `https://` address,
    `hf://owner/repo[@revision][/file]`, or the name of a preset with published weights. The
    network is the one that the weights are of. `spec` says it where they do not.

    With another `num_classes` the classifier is drawn anew from `rngs`; with 0 there is none. With
    other `in_channels` the first convolution is adapted: an image that shows the same gets the same
    answer. `overrides` changes keys that leave the meaning of weights as it is:
    `{"resolution.test": 320, "head.dropout": 0.5}`. `how` goes to `nfflax.build`: `dtype`, `remat`,
    `unroll`, `output_stride`. Raises SpecError with every problem at once.
    """
    from nfflax.train.inference import load_model

    return load_model(
        place,
        spec=spec,
        num_classes=num_classes,
        in_channels=in_channels,
        overrides=overrides,
        rngs=rngs,
        **how,
    ).model


def backbone(
    spec: "Source | None" = None,
    levels: Iterable[int] = (2, 3, 4, 5),
    *,
    weights: str | os.PathLike[str] | None = None,
    activated: bool = False,
    frozen: int = 0,
    output_stride: int | None = None,
    in_channels: int | None = None,
    rngs: "nnx.Rngs | None" = None,
    **how: Any,
) -> "Backbone":
    """The part of a network that makes the maps of some feature levels: a call returns them.

    Level 1 is the stem, 2 and on are the stages, one more is the final convolution where there is
    one. `backbone.feature_info` has the channels and stride of each. Maps are pre-activation, or
    with `activated` of about unit variance, as `Backbone` says.

    Initial weights are drawn from `rngs`, or come from `weights`, a place as `load` has it, which
    holds the whole network. `spec` can be left out where the weights say it. What makes the maps up
    to level `frozen` does not train. `output_stride` 8 or 16 keeps later maps large, with the same
    parameters. Other `in_channels` adapt the first convolution as `load` does. `how` goes on:
    `dtype`, `remat`, `unroll`.
    """
    from flax import nnx

    from nfflax.nn.backbone import Backbone
    from nfflax.nn.builder import drawn
    from nfflax.spec.load import load_spec
    from nfflax.spec.plan import plan

    known, whole = None if spec is None else load_spec(spec), None
    if known is not None and in_channels is not None:
        known = load_spec(known, {"stem.in_channels": in_channels})
    if weights is not None:
        channels = in_channels if known is None else known.stem.in_channels
        whole = load(weights, spec=known, num_classes=0, in_channels=channels)
        known = whole.spec
    if known is None:
        raise ValueError("spec is missing: which network, or weights= that say it")
    compiled = plan(known, output_stride=output_stride)

    def make() -> Backbone:
        own = {"activated": activated, "frozen": frozen}
        return Backbone(compiled, levels, **own, **how, rngs=nnx.Rngs(0))

    if whole is not None:
        graph, state = nnx.split(nnx.eval_shape(make))
        found = dict(nnx.to_flat_state(nnx.state(whole)))
        kept = [(path, v.replace(found[path][...])) for path, v in nnx.to_flat_state(state)]
        return nnx.merge(graph, nnx.from_flat_state(kept))
    if rngs is None:
        raise ValueError("rngs is missing: rngs=nnx.Rngs(...) draws weights, weights= loads them")
    return drawn(make, rngs)
