"""What spoils the signal of a normalizer-free network, drawn: four networks, three of them faulty.

    python examples/signal_faults.py
    python examples/signal_faults.py --network nfnet_micro --resolution 64   # a quick look

Faults that no spec can say are made in the built network: weights that are not standardised, betas
that are not reset where a stage begins, betas that are left out. `nfflax.insight.diagnose` names
each. What the picture shows is in docs/signal-propagation.md. Needs the extra "plot".
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from flax import nnx

import nfflax
from nfflax.insight import diagnose
from nfflax.insight.spp_plot import draw
from nfflax.nn import NFNet, WSConv


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--network", default="nf_resnet50", help="a preset's name, or a spec file")
    parser.add_argument("--resolution", type=int, default=128, help="of the images, in pixels")
    parser.add_argument("--out", type=Path, default=Path("signal_faults.png"), help="the plot")
    args = parser.parse_args()
    noise_NHWC = np.random.default_rng(0).standard_normal(
        (2, args.resolution, args.resolution, 3), np.float32
    )
    reports = {}
    for label, spoil in SPOILED.items():
        model = nfflax.build(args.network, rngs=nnx.Rngs(0))
        spoil(model)
        reports[label] = diagnose(model, noise_NHWC)
        print(f"{label}: {reports[label]}", flush=True)
    draw(reports, args.out)
    print(f"wrote {args.out}")


def as_planned(_: NFNet) -> None:
    """Nothing is changed."""


class Unstandardized(WSConv):
    """Convolves with the kernel as it is, of variance 1 / fan-in."""

    def standardized(self) -> jax.Array:
        return self.kernel[...]


def no_standardization(model: NFNet) -> None:
    """Kernels have whatever mean they were drawn with."""
    for _, part in nnx.iter_graph(model):
        if isinstance(part, WSConv):
            part.__class__ = Unstandardized


def no_reset(model: NFNet) -> None:
    """Betas for a variance that grows from the first block to the last."""
    variance = 1.0
    for stage in model.stages:
        betas = []
        for _ in stage.betas:
            betas.append(variance**-0.5)
            variance += model.spec.block.alpha**2
        stage.betas = tuple(betas)


def no_beta(model: NFNet) -> None:
    """Branches see the signal as it is."""
    for stage in model.stages:
        stage.betas = (1.0,) * len(stage.betas)


SPOILED: dict[str, Callable[[NFNet], None]] = {
    "as planned": as_planned,
    "no weight standardisation": no_standardization,
    "beta is not reset": no_reset,
    "no beta": no_beta,
}


if __name__ == "__main__":
    main()
