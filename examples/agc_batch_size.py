"""Why gradients are clipped: accuracy at growing batch sizes with and without, and with BatchNorm.

    python examples/agc_batch_size.py
    python examples/agc_batch_size.py --seeds 1 --epochs 5 --batches 32 256   # a quick look

Figure 2 of arXiv:2102.06171 at the scale of handwritten digits: the learning rate grows with the
batch, as large batches need it, and everything else stays. Writes a plot and, beside it, all
numbers as JSON. What came of it is in docs/why-clipping.md. Needs the extras "demo" and "plot".
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress

import nfflax
from nfflax.train import Program, make_mesh, make_program

# The three networks, as changes of the paper's recipe for NF-ResNets (specs/runs/nf_resnet.toml).
NETWORKS: dict[str, dict[str, Any]] = {
    "NF with AGC": {"model.spec": "nf_resnet50", "agc.clipping": 0.04},
    "BatchNorm": {"model.spec": "resnet50_bn", "agc.clipping": 0},
    "NF, no clipping": {"model.spec": "nf_resnet50", "agc.clipping": 0},
}
COLORS = dict(zip(NETWORKS, ("#d9480f", "#3b82c4", "#6b7280"), strict=True))

# What makes a ResNet-50 for ImageNet one for images of 8 x 8 pixels, and all three train alike.
SMALL: dict[str, Any] = {
    "model.set.stem": {"width": 16, "kernel": 3, "stride": 1, "pool": "none"},
    "model.set.stages.depth": [2, 2],
    "model.set.stages.width": [16, 32],
    "model.set.stages.stride": [1, 2],
    "model.set.stages.expansion": 0.5,
    "model.set.block.skip_gain": "none",  # clipped ones need more steps than this to leave zero
    "model.set.head.num_classes": 10,
    "model.set.regularization.stochastic_depth": 0,
    "model.set.resolution": {"train": 8, "test": 8},
    "model.set.preprocess.crop_margin": 0,
    "data.source": "digits",
    "data.eval": "test",
    "schedule.learning_rate": 0.2,  # per 256 images
    "guard.spike": 0,  # do not rescue who explodes
}
CHANCE = 0.1

Images = dict[str, np.ndarray]


class Outcome(NamedTuple):
    """What came of one training run."""

    network: str
    batch_size: int
    seed: int
    learning_rate: float
    top1: float  # of the test images, between 0 and 1
    diverged: bool


Cells = dict[tuple[str, int], list[Outcome]]  # by network and batch size, one outcome per seed


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, help="runs per point")
    parser.add_argument("--epochs", type=float, default=30, help="passes over the images")
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 64, 128, 256, 512, 1024])
    parser.add_argument("--out", type=Path, default=Path("agc_batch_size.png"), help="the plot")
    args = parser.parse_args()
    start, console, cells = time.perf_counter(), Console(), Cells()
    with Progress(console=console) as progress:
        bar = progress.add_task("", total=len(NETWORKS) * len(args.batches) * args.seeds)
        for network in NETWORKS:
            for outcome in outcomes_of(network, args.batches, args.epochs, args.seeds):
                name = f"{network}, batch size {outcome.batch_size}"
                cell = cells.setdefault((network, outcome.batch_size), [])
                cell.append(outcome)
                progress.update(bar, advance=1, description=name)
                if len(cell) == args.seeds:
                    console.print(f"{name}: {summary(cell)}")
    seconds = time.perf_counter() - start

    draw(cells, args.batches, args.out)
    record = {"seconds": round(seconds, 1), "epochs": args.epochs, "small": SMALL}
    runs = [outcome._asdict() for outcomes in cells.values() for outcome in outcomes]
    numbers = args.out.with_suffix(".json")
    numbers.write_text(json.dumps(record | {"networks": NETWORKS, "runs": runs}, indent=1), "utf-8")
    console.print(f"{seconds:.0f} s; wrote {args.out} and {numbers}")


def outcomes_of(
    network: str, batch_sizes: list[int], epochs: float, seeds: int
) -> Iterator[Outcome]:
    """Train a network at every batch size. All seeds share what was compiled."""
    length = {"train.epochs": epochs, "schedule.warmup_epochs": epochs / 6}
    changes = SMALL | NETWORKS[network] | length
    run = nfflax.load_run("nf_resnet", changes)
    train, test = whole(run, "train"), whole(run, "test")
    run = nfflax.load_run(run, {"train.examples": len(train["labels"])})
    mesh = make_mesh(run.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        first = [
            make_program(nfflax.load_run(run, {"train.seed": seed}), mesh) for seed in range(seeds)
        ]
        states = [jax.device_get(program.init()) for program in first]
        for batch_size in batch_sizes:
            sized = nfflax.load_run(run, {"train.batch_size": batch_size})
            program = make_program(sized, mesh)
            for seed, state in enumerate(states):
                trained, rate = carry_out(program, state, train, seed), sized.peak_learning_rate
                top1 = accuracy(first[0], trained, test) if trained else CHANCE
                yield Outcome(network, batch_size, seed, rate, top1, diverged=trained is None)


def whole(run: nfflax.Run, split: str) -> Images:
    """All images of a split as one batch: for a data set this small, a pipeline is not worth it."""
    source = nfflax.data.open_source(run.data, split)
    view = nfflax.data.EvalView.of(run.spec)
    with nfflax.data.eval_batches(source, view, batch_size=len(source), data=run.data) as batches:
        return next(batches)


def carry_out(program: Program, state: Any, images: Images, seed: int) -> Any:
    """The trained state, or None where a gradient was no longer finite.

    `seed` orders the images; with nothing else left to chance, it need not be compiled in.
    """
    state = jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, program.abstract))
    rng, size = np.random.default_rng(seed), program.run.train.batch_size
    waiting = np.zeros(0, int)
    for _ in range(program.run.steps):
        while len(waiting) < size:
            waiting = np.concatenate([waiting, rng.permutation(len(images["labels"]))])
        rows, waiting = waiting[:size], waiting[size:]
        batch = {key: images[key][rows] for key in ("images", "labels")}
        state, metrics = program.train_step(state, program.put(batch, size))
        if metrics["guard/skipped"] > 0:
            return None
    return state


def accuracy(program: Program, state: Any, images: Images) -> float:
    """Share of the images whose label gets the highest score."""
    batch = program.put(images, len(images["labels"]))
    folded = program.fold(state["params"], state["stats"])
    sums = program.eval_step(folded, batch)
    return float(sums["top1"]) / float(sums["examples"])


def summary(outcomes: list[Outcome]) -> str:
    """Mean and standard deviation over the seeds, and how many of them diverged."""
    top1, diverged = in_percent(outcomes), sum(outcome.diverged for outcome in outcomes)
    return f"{top1.mean():.1f} ± {top1.std():.1f}" + f", {diverged} diverged" * (diverged > 0)


def in_percent(outcomes: list[Outcome]) -> np.ndarray:
    return 100 * np.array([outcome.top1 for outcome in outcomes])


def draw(cells: Cells, batch_sizes: list[int], path: Path) -> None:
    """Lines through the means, every run a dot or, diverged, a cross; twice, once from near."""
    figure = Figure(figsize=(9.6, 4.0), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    rates = {run.batch_size: run.learning_rate for runs in cells.values() for run in runs}
    panels = figure.subplots(1, 2)
    for axes, floor, title in zip(panels, (0, 90), ("test top-1 in %", "from 90%"), strict=True):
        axes.scatter([], [], s=60, color="#222222", marker="x", label="diverged: counts as chance")
        axes.axhline(100 * CHANCE, color="#c4c8ce", linewidth=1, linestyle=":", label="chance")
        for i, (network, color) in enumerate(reversed(COLORS.items())):
            aside = 2 ** (0.08 * (i - 1)) * np.array(batch_sizes)  # so that none hides another
            means = [in_percent(cells[network, size]).mean() for size in batch_sizes]
            axes.plot(aside, means, color=color, linewidth=2, label=network)
            for x, size in zip(aside, batch_sizes, strict=True):
                for run in cells[network, size]:
                    marker, area = ("x", 60) if run.diverged else ("o", 14)
                    axes.scatter(x, 100 * run.top1, s=area, color=color, marker=marker, zorder=3)
        axes.set_xscale("log", base=2)
        axes.set_xticks(batch_sizes, [f"{size}\n{rates[size]:.3g}" for size in batch_sizes])
        axes.set_ylim(floor, 100 + 0.01 * (100 - floor))
        axes.set_xlabel("batch size, and below it the peak learning rate")
        axes.set_title(title, loc="left", fontsize=11)
        axes.grid(axis="y", color="#e9eaec")
        axes.spines[["top", "right", "left"]].set_visible(False)
    panels[0].legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 0.12), reverse=True)
    figure.savefig(path, metadata={"Software": None})


if __name__ == "__main__":
    main()
