"""From a spec to features and logits: compile it, read its plan, build the network, look inside.

    python examples/quickstart.py              # nfnet_tiny
    python examples/quickstart.py nf_regnet_b0

About 10 seconds on two CPU cores, most of it compilation.
"""

import sys

import jax
from flax import nnx
from rich.console import Console
from rich.table import Table

import nfflax


def main(name: str = "nfnet_tiny") -> None:
    console = Console()
    spec = nfflax.load_spec(name, {"block.skip_gain": "ones"})  # zeros would silence every branch
    plan = nfflax.plan(spec)
    console.print(f"[bold]{name}[/]: {plan.params:,} parameters, {plan.macs():,} multiply-adds")

    with console.status("building and compiling"):
        model = nfflax.build(plan, rngs=nnx.Rngs(0))
        x_NHWC = jax.random.normal(jax.random.key(1), (8, *plan.input_size, 3))
        logits = nnx.jit(lambda model, x: model(x))(model, x_NHWC)
        maps = nnx.jit(lambda model, x: model.features(x))(model, x_NHWC)
        signals = nfflax.signals(model, x_NHWC)
    console.print(f"logits {logits.shape} on noise, std {float(logits.std()):.3f}\n")

    features = Table("level", "name", "stride", "map", title="features")
    for info in model.feature_info:
        shape = " x ".join(map(str, maps[info.level].shape[1:]))
        features.add_row(str(info.level), info.name, str(info.stride), shape)
    console.print(features)

    depth = Table("block", "planned variance in", "measured variance out", "branch variance")
    depth.title = "signal propagation at initialisation"
    for i, block in enumerate(plan.blocks):
        measured = float(signals["avg_var"][i + 1]), float(signals["res_avg_var"][i])
        depth.add_row(block.name, f"{block.expected_variance:.2f}", *(f"{m:.2f}" for m in measured))
    console.print(depth)
    console.print(
        "Measured on white noise. Average-pooled shortcuts divide its variance by four at each\n"
        "stride, which the plan leaves out: see docs/signal-propagation.md."
    )
    console.print(f"\nNext: [bold]nfflax spec show {name}[/], or write your own spec (README.md).")


if __name__ == "__main__":
    main(*sys.argv[1:2])
