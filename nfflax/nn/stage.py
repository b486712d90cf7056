"""A stage: its transition block, then identical blocks with stacked parameters, run by `lax.scan`.

One parameter layout serves every depth and every way to run it: `unroll` and remat change the
program, never the parameters. Compile time does not grow with depth.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from nfflax.nn.block import Block, BlockSignals
from nfflax.nn.wsconv import CONV_OUTPUT, measured
from nfflax.spec.parts import BlockPlan
from nfflax.spec.schema import Spec

Remat = Literal["none", "block", "conv"]


class Stage(nnx.Module):
    """`first` is the transition block, `rest` the stack of the others (None without others)."""

    def __init__(
        self, plans: Sequence[BlockPlan], spec: Spec, *, unroll: int, remat: Remat, rngs: nnx.Rngs
    ):
        first, *rest = plans
        self.first = Block(first, spec, rngs=rngs)
        stack = nnx.vmap(lambda r: Block(rest[0], spec, rngs=r))
        self.rest = stack(rngs.split(len(rest))) if rest else None
        self.start = first.index
        self.betas = tuple(p.beta for p in plans)
        self.drop_rates = tuple(p.drop_rate for p in plans)
        self.unroll = unroll
        self.remat: Remat = remat

    def __call__(
        self,
        x_NHWC: jax.Array,
        *,
        key: jax.Array | None = None,
        train: bool = False,
        with_signals: bool = False,
    ) -> tuple[jax.Array, BlockSignals | None]:
        """The stage's output, and the signals of its blocks, stacked."""
        keys = None
        if key is not None and any(self.drop_rates):
            # By position in the network: the same draws however the blocks are run.
            positions = jnp.arange(self.start, self.start + len(self.betas))
            keys = jax.vmap(jax.random.fold_in, (None, 0))(key, positions)

        def run(x_NHWC: jax.Array, block: Block, beta, drop_rate, key):
            y_NHWC, signals = block(
                x_NHWC, beta, drop_rate=drop_rate, key=key, train=train, with_signals=with_signals
            )
            return y_NHWC, (signals, nnx.state(block, nnx.BatchStat))

        first_key = None if keys is None else keys[0]
        x_NHWC, (signals, statistics) = rematerialized(run, self.remat, in_loop=False)(
            x_NHWC, measured(self.first), self.betas[0], self.drop_rates[0], first_key
        )
        nnx.update(self.first, statistics)
        if self.rest is None:
            return x_NHWC, signals and jax.tree.map(lambda s: s[None], signals)

        varying = (
            jnp.asarray(self.betas[1:], jnp.float32),
            jnp.asarray(self.drop_rates[1:], jnp.float32),
            None if keys is None else keys[1:],
        )
        run = rematerialized(run, self.remat, in_loop=self.unroll < len(self.betas) - 1)
        x_NHWC, (stacked, statistics) = jax.lax.scan(
            lambda x, each: run(x, *each),
            x_NHWC,
            (measured(self.rest), *varying),
            unroll=self.unroll,
        )
        nnx.update(self.rest, statistics)
        if signals is None or stacked is None:
            return x_NHWC, None
        joined = jax.tree.map(lambda s, rest: jnp.concatenate([s[None], rest]), signals, stacked)
        return x_NHWC, joined


def rematerialized(run: Callable, remat: Remat, *, in_loop: bool) -> Callable:
    """`run`, keeping for the backward pass all, its inputs only, or convolution outputs.

    Outside a loop XLA would merge the recomputation with the original, and must be kept from it.
    """
    if remat == "none":
        return run
    policy = None
    if remat == "conv":
        policy = jax.checkpoint_policies.save_only_these_names(CONV_OUTPUT)
    return jax.checkpoint(run, prevent_cse=not in_loop, policy=policy)
