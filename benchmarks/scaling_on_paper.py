"""What the published recipes should cost on pods from 8 to 4096 chips, by arithmetic.

    python benchmarks/scaling_on_paper.py

Prints the tables of docs/scaling.md. Nothing is compiled or run: for each network and pod the best
way that `nfflax plan RUN --topology POD --search` finds, by its time to expect.
"""

from nfflax.insight.chips import pod
from nfflax.insight.estimate import estimate
from nfflax.insight.search import Candidate, mesh_on, search
from nfflax.spec.load import load_run
from nfflax.spec.run import Run

IMAGES = 1_281_167
PER_CHIP = 32  # images, where the batch grows with the pod
NETWORKS = ["nfnet", *(f"nfnet_f{i}" for i in range(1, 7))]  # F0's recipe is the family's
PODS = {
    "v5p": ["v5p:2x2x2", "v5p:4x4x4", "v5p:8x8x8", "v5p:8x16x16", "v5p:16x16x16"],
    "H100": ["h100:8", "h100:64", "h100:512", "h100:2048", "h100:4096"],
}


def main() -> None:
    for chip, names in PODS.items():
        counts = [f"{pod(name).count:,}" for name in names]
        print(f"\nStrong scaling on {chip}, batch 4096: time of an epoch, share of the peak, how\n")
        header("network", counts)
        for recipe in NETWORKS:
            run = load_run(recipe)
            cells = [epoch(search(run, pod(name))[0]) for name in names]
            row(run.spec.name, cells)
        print(f"\nWeak scaling on {chip}, {PER_CHIP} images per chip: images/s and chip\n")
        header("network", counts)
        for recipe in NETWORKS:
            row(load_run(recipe).spec.name, [rate(load_run(recipe), name) for name in names])


def epoch(way: Candidate) -> str:
    found, settings = way.estimate, way.settings
    if not found.fits:
        return "does not fit"
    minutes = found.hours(IMAGES) * 60
    time = f"{minutes:.1f} min" if minutes >= 1 else f"{minutes * 60:.1f} s"
    notes = [f"fsdp {settings['mesh.fsdp']}"] * (settings["mesh.fsdp"] > 1)
    notes += [f"tensor {settings['mesh.tensor']}"] * (settings["mesh.tensor"] > 1)
    notes += [f"remat {settings['model.remat']}"] * (settings["model.remat"] != "none")
    notes += [f"{settings['train.accumulate']} microbatches"] * (settings["train.accumulate"] > 1)
    return ", ".join([f"{time}, {found.utilization:.0%}", *notes])


def rate(run: Run, name: str) -> str:
    place = pod(name)
    grown = load_run(run, {"train.batch_size": PER_CHIP * place.count, "model.remat": "conv"})
    found = estimate(grown, place, mesh_on(grown, place))
    return f"{found.images_per_second / place.count:,.0f}"


def header(first: str, others: list[str]) -> None:
    row(first, others)
    row("---", ["---:"] * len(others))


def row(first: str, others: list[str]) -> None:
    print(f"| {' | '.join([first, *others])} |", flush=True)


if __name__ == "__main__":
    main()
