"""How close the host pipeline comes to Pillow alone, and how it grows with workers.

    python benchmarks/host_pipeline.py

Both decode, crop at random, resize to 192 px and flip the same made-up JPEG files (375 px along the
short side, as most of ImageNet). "Pillow" is a bare loop, in one process or in several. Rates are
images per second of wall time, the best of several turns, taken in alternation because other work
comes and goes. CPU time per image does not depend on that; it is measured in this process.
"""

import argparse
import io
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from nfflax.data import Data, TrainView, generate_folder, train_batches
from nfflax.data.folder import FolderSource

IMAGES, SIZE, RESOLUTION, BATCH = 1024, 375, 192, 64


def bare_loop(paths: list[str], images: int, resolution: int = RESOLUTION) -> None:
    """What anyone would write by hand, with the same geometry and nothing around it."""
    rng = np.random.default_rng(0)
    view = TrainView(resolution)
    for number in range(images):
        with open(paths[number % len(paths)], "rb") as file:
            image = Image.open(io.BytesIO(file.read()))
        left, top, right, bottom = view.box(image.height, image.width, rng)
        scale = next((s for s in (8, 4, 2) if min(right - left, bottom - top) >= s * resolution), 1)
        image.draft("RGB", (image.width // scale, image.height // scale))
        box = (left / scale, top / scale, right / scale, bottom / scale)
        small = image.convert("RGB").resize(
            (resolution, resolution), Image.Resampling.BICUBIC, box=box
        )
        if rng.random() < 0.5:
            small = small.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        np.asarray(small)


def _in_process(paths: list[str], images: int, barrier) -> None:
    bare_loop(paths, BATCH)
    barrier.wait()
    bare_loop(paths, images)
    barrier.wait()


def bare_rate(paths: list[str], images: int, processes: int) -> float:
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(processes + 1)
    share = images // processes
    workers = [
        context.Process(target=_in_process, args=(paths, share, barrier)) for _ in range(processes)
    ]
    for worker in workers:
        worker.start()
    barrier.wait()
    start = time.perf_counter()
    barrier.wait()
    seconds = time.perf_counter() - start
    for worker in workers:
        worker.join()
    return share * processes / seconds


def pipeline_rate(source: FolderSource, images: int, data: Data) -> float:
    with train_batches(source, TrainView(RESOLUTION), batch_size=BATCH, data=data) as batches:
        for _ in range(1 + data.prefetch):  # so that what was ready at the start does not count
            next(batches)
        start = time.perf_counter()
        steps = images // BATCH
        for _ in range(steps):
            next(batches)
        return steps * BATCH / (time.perf_counter() - start)


def take(source: FolderSource, steps: int, data: Data) -> None:
    with train_batches(source, TrainView(RESOLUTION), batch_size=BATCH, data=data) as batches:
        for _ in range(steps):
            next(batches)


def cpu_ms(run: Callable[[], object], images: int) -> float:
    """CPU time per image, over all threads of this process."""
    start = time.process_time()
    run()
    return 1000 * (time.process_time() - start) / images


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=960, help="images per turn")
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        toy = Path(folder) / "toy"
        generate_folder(toy, train=IMAGES, test=1, size=SIZE)
        source = FolderSource(toy, "train")
        paths = [source[index].name for index in range(len(source))]
        runs: dict[str, Callable[[], float]] = {}
        for count in (1, 2):
            runs[f"Pillow, {count} processes"] = lambda n=count: bare_rate(paths, args.images, n)
            for kind in ("thread", "process"):
                data = Data(workers=count, worker_kind=kind)
                runs[f"nfflax, {count} {kind}"] = lambda d=data: pipeline_rate(
                    source, args.images, d
                )
        turns = [{name: run() for name, run in runs.items()} for _ in range(args.turns)]
        steps = args.images // BATCH
        costs = {"Pillow": lambda: bare_loop(paths, steps * BATCH)} | {
            f"nfflax, workers = {count}": lambda n=count: take(source, steps, Data(workers=n))
            for count in (0, 1, 2)
        }
        spent = [{k: cpu_ms(run, steps * BATCH) for k, run in costs.items()} for _ in turns]
    table = Table("run", "images/s", "of Pillow", "of one worker")
    best = {name: max(turn[name] for turn in turns) for name in runs}
    for name, rate in best.items():
        bare, one = best[f"Pillow, {name[8]} processes"], best[name.replace(" 2 ", " 1 ")]
        table.add_row(name, f"{rate:.0f}", f"{rate / bare:.2f}", f"{rate / one:.2f}")
    console = Console()
    console.print(table)
    table = Table("run", "CPU ms per image", "Pillow's rate")
    least = {name: min(turn[name] for turn in spent) for name in costs}
    for name, cost in least.items():
        table.add_row(name, f"{cost:.2f}", f"{least['Pillow'] / cost:.2f}")
    console.print(table)


if __name__ == "__main__":
    main()
