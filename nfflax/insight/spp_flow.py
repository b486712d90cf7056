"""One pass that measures the signal at every part of a network: after each activation, convolution.

`nfflax.signals` tells what leaves a block; this tells what each part of it did, so that
`nfflax.insight.diagnose` can say which of them is at fault.
"""

import functools
import statistics
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from nfflax.nn.block import Activate, Block, average_variance, map_signals
from nfflax.nn.body import Body
from nfflax.nn.wsconv import Conv, WSConv
from nfflax.spec.parts import BlockPlan
from nfflax.spec.plan import plan

_PROBE = 4096  # points of N(0, 1) that an activation is asked about: their variance is 0.999

Measured = dict[str, dict[str, jax.Array]]


@dataclass(frozen=True)
class PartFlow:
    """What one activation or convolution did. Variances are averages over channels."""

    var_in: float
    var_out: float
    gain: float
    """What it makes of unit variance: an activation of N(0, 1), a kernel of white noise. NaN under
    batch normalisation, which does not say."""
    common: float = 0.0
    """Of a kernel: (sum of weights)^2 / sum of squares, averaged over output units. Weight
    standardisation makes it 0, independent random weights have 1."""


@dataclass(frozen=True)
class BlockFlow:
    """What one block did."""

    plan: BlockPlan
    avg_sq_mean: float
    avg_var: float
    res_avg_var: float
    alpha: float
    """What the end of the branch was multiplied by, skip gain apart."""
    beta: float
    """What lies between the first activation and the convolution after it."""
    attention: float
    """What attention multiplied the variance by, 1 without."""
    parts: dict[str, PartFlow]


@dataclass(frozen=True)
class Flow:
    """What every part of a network did with one batch of images."""

    stem_sq_mean: float
    stem_var: float
    stem: dict[str, PartFlow]
    blocks: tuple[BlockFlow, ...]
    head: dict[str, PartFlow]
    revived: bool
    """Whether gains that start at zero, and silence their branches, were taken as ones."""
    trained: bool
    """Whether gains of convolutions are neither zeros nor ones any more."""
    sizes: tuple[tuple[int, int], ...]
    """Height and width of the map that each block returns."""

    def curves(self) -> dict[str, np.ndarray]:
        """The curves that `nfflax.signals` gives."""
        blocks = self.blocks
        return {
            "avg_sq_mean": np.array([self.stem_sq_mean, *(b.avg_sq_mean for b in blocks)]),
            "avg_var": np.array([self.stem_var, *(b.avg_var for b in blocks)]),
            "res_avg_var": np.array([b.res_avg_var for b in blocks]),
        }


def flow(model: Body, x_NHWC: ArrayLike) -> Flow:
    """Send images through stem, stages and final convolution, and measure on the way.

    Gains that are exactly zero, of branches or of their last convolutions, count as one: else
    nothing would pass. Batch normalisation uses the batch's statistics, as in training. The model
    does not change.
    """
    if model.folded:
        raise ValueError(
            f"this {model.spec.name} is folded: only what it was made from tells what its parts do"
        )
    graph, state = nnx.split(model)

    # Compiled anew for every call, so that what is measured is the code as it is now; and run once,
    # which is not worth all the effort of LLVM.
    quickly = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

    @functools.partial(
        jax.jit, compiler_options=quickly if jax.default_backend() == "cpu" else None
    )
    def measured(state: nnx.State, x_NHWC: jax.Array) -> dict[str, Any]:
        return _passed(nnx.merge(graph, state), x_NHWC)

    found = jax.device_get(measured(state, jnp.asarray(x_NHWC, model.dtype)))
    blocks = [
        jax.tree.map(lambda leaf, i=i: leaf[i], stack)
        for stack in found["blocks"]
        for i in range(len(stack["beta"]))
    ]
    height, width = jnp.shape(x_NHWC)[1:3]
    sized = plan(model.spec, resolution=(height, width), output_stride=model.plan.output_stride)
    gains = [np.asarray(p.gain[...]) for _, p in nnx.iter_graph(model) if isinstance(p, WSConv)]
    return Flow(
        stem_sq_mean=float(found["map"][0]),
        stem_var=float(found["map"][1]),
        stem=_parts(found["stem"]),
        blocks=tuple(map(_block_flow, model.plan.blocks, blocks)),
        head=_parts(found["head"]),
        revived=any(bool(block["revived"]) for block in blocks),
        trained=not all(np.isin(gain, (0, 1)).all() for gain in gains),
        sizes=tuple(block.resolution for block in sized.blocks[: len(blocks)]),
    )


def _passed(model: Body, x_NHWC: jax.Array) -> dict[str, Any]:
    """The pass of `flow`, as arrays."""
    train = model.spec.norm.kind == "batch"
    stem, head, blocks = {}, {}, []
    for name in ("convs", "acts"):
        listed = getattr(model.stem, name)
        for i, part in enumerate(listed):
            listed[i] = _Watched(part, f"{name}.{i}", stem)
    x_NHWC, _ = model.stem(x_NHWC, train)
    stem_map = map_signals(x_NHWC)
    for stage in model.stages:
        x_NHWC, found = _through(stage.first, x_NHWC, stage.betas[0], train)
        blocks.append(jax.tree.map(lambda leaf: leaf[None], found))
        if stage.rest is not None:
            betas = jnp.asarray(stage.betas[1:], jnp.float32)
            x_NHWC, found = jax.lax.scan(
                lambda x, each: _through(each[0], x, each[1], train), x_NHWC, (stage.rest, betas)
            )
            blocks.append(found)
    for name in ("final_conv", "final_act"):
        if (part := getattr(model, name, None)) is not None:
            x_NHWC = _Watched(part, name, head)(x_NHWC, *([train] if name == "final_act" else []))
    return {"map": stem_map, "stem": stem, "blocks": blocks, "head": head}


def _through(
    block: Block, x_NHWC: jax.Array, beta: float | jax.Array, train: bool
) -> tuple[jax.Array, dict[str, Any]]:
    """One block's output, and what was measured in it."""
    revived = _revive(block)
    parts: Measured = {}
    watched = {
        name: _Watched(part, name, parts)
        for name, part in list(vars(block).items())
        if isinstance(part, Activate | Conv)
    }
    for name, part in watched.items():
        setattr(block, name, part)
    y_NHWC, signals = block(x_NHWC, beta, train=train, with_signals=True)
    assert signals is not None
    shortcut_NHWC = watched["conv_shortcut"].output if "conv_shortcut" in watched else x_NHWC
    gain = jnp.abs(block.skip_gain[...]) if block.has_skip_gain else 1.0
    added = average_variance(y_NHWC.astype(jnp.float32) - shortcut_NHWC.astype(jnp.float32))
    conv = "conv1b" if block.has_second_conv else "conv1"
    around = {  # the variances before and after attention
        "none": (1.0, 1.0),
        "inside": (parts[conv]["var_out"], parts["act2"]["var_in"]),
        "after": (parts["conv2"]["var_out"], signals.res_avg_var),
    }[block.attention_place]
    return y_NHWC, {
        "signals": signals._asdict(),
        "alpha": jnp.sqrt(added / signals.res_avg_var) / gain,
        "beta": jnp.sqrt(parts["conv0"]["var_in"] / parts["act0"]["var_out"]),
        "attention": jnp.asarray(around[1] / around[0], jnp.float32),
        "revived": revived,
        "parts": parts,
    }


def _revive(block: Block) -> jax.Array:
    """Make gains of zero ones; returns whether there were any."""
    revived = jnp.asarray(False)
    silent = [block.skip_gain] if block.has_skip_gain else []
    silent += [block.conv2.gain] if isinstance(block.conv2, WSConv) else []
    for variable in silent:
        is_zero = jnp.all(variable[...] == 0)
        variable[...] = jnp.where(is_zero, 1.0, variable[...])
        revived |= is_zero
    return revived


class _Watched:
    """Stands in for an activation or convolution and notes what it does."""

    def __init__(self, part: Activate | Conv, name: str, notes: Measured):
        self.part, self.name, self.notes = part, name, notes
        self.output = jnp.zeros(())

    def __call__(self, x_NHWC: jax.Array, *args: Any) -> jax.Array:
        self.output = y_NHWC = self.part(x_NHWC, *args)
        about = (
            _of_kernel(self.part)
            if isinstance(self.part, Conv)
            else _of_activation(self.part, x_NHWC.shape[-1])
        )
        flows = {"var_in": average_variance(x_NHWC), "var_out": average_variance(y_NHWC)}
        self.notes[self.name] = flows | about
        return y_NHWC


def _of_kernel(conv: Conv) -> dict[str, jax.Array]:
    """Sum of squared weights per unit of gain, and their common mode."""
    learned_O: Any = 1.0
    w_HWIO = conv.kernel[...]
    if isinstance(conv, WSConv):
        w_HWIO, learned_O = conv.standardized(), conv.gain[...]
    axes = tuple(range(w_HWIO.ndim - 1))
    squares_O, sum_O = jnp.sum(w_HWIO**2, axes), jnp.sum(w_HWIO, axes)
    unit_O = learned_O**2 * jnp.ones_like(squares_O)
    return {
        "gain": jnp.sum(squares_O) / jnp.sum(unit_O),
        "common": jnp.sum(sum_O**2) / jnp.sum(squares_O),
    }


def _of_activation(act: Activate, channels: int) -> dict[str, jax.Array]:
    """The variance it makes of N(0, 1)."""
    if act.norm is not None:
        return {"gain": jnp.asarray(jnp.nan)}
    # Behind a barrier, or XLA would spend seconds on what it takes for constants.
    z_NHWC = jax.lax.optimization_barrier(jnp.asarray(_probe(channels)))
    return {"gain": jnp.var(act(z_NHWC, False))}


@functools.lru_cache(maxsize=64)
def _probe(channels: int) -> np.ndarray:
    """Quantiles of N(0, 1) in random order, as a map of one row."""
    rows = -(-_PROBE // channels)
    ranks = np.random.default_rng(0).permutation(rows * channels) + 0.5
    normal = statistics.NormalDist()
    z = np.array([normal.inv_cdf(rank / ranks.size) for rank in ranks], np.float32)
    return z.reshape(1, rows, 1, channels)


def _block_flow(block: BlockPlan, found: dict[str, Any]) -> BlockFlow:
    numbers = {name: float(found[name]) for name in ("alpha", "beta", "attention")}
    signals = {name: float(value) for name, value in found["signals"].items()}
    return BlockFlow(block, **signals, **numbers, parts=_parts(found["parts"]))


def _parts(found: Measured) -> dict[str, PartFlow]:
    return {
        name: PartFlow(**{key: float(value) for key, value in part.items()})
        for name, part in found.items()
    }
