"""timm on PyTorch. Options: `prefix` of the model's name, `channels_last`, `compile`, `clip`.

bfloat16 is autocast, as timm's own scripts have it.
"""

import contextlib
import os
from collections.abc import Callable

import timm  # pyright: ignore[reportMissingImports]
import torch  # pyright: ignore[reportMissingImports]
from timm.utils.agc import adaptive_clip_grad  # pyright: ignore[reportMissingImports]
from torch.utils.flop_counter import FlopCounterMode  # pyright: ignore[reportMissingImports]

from peers.harness import Program, Run, serve
from peers.job import CLASSES, Job


def prepare(job: Job) -> Program:
    """A model of timm's with random weights."""
    torch.manual_seed(0)
    torch.set_num_threads(os.cpu_count() or 1)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    options = job.options
    layout = torch.channels_last if options.get("channels_last") else torch.contiguous_format
    model = timm.create_model(options.get("prefix", "") + job.network, num_classes=CLASSES)
    macs = _macs(model, job.pixels)
    model = model.to(job.device, memory_format=layout).train(job.what == "step")
    x_NCHW = torch.randn(job.batch, 3, job.pixels, job.pixels, device=job.device)
    x_NCHW = x_NCHW.to(memory_format=layout)
    called = torch.compile(model) if options.get("compile") else model
    step = (
        _train_step(job, model, called, x_NCHW)
        if job.what == "step"
        else _forward(job, called, x_NCHW)
    )

    def run(count: int) -> None:
        for _ in range(count):
            step()
        if job.device == "cuda":
            torch.cuda.synchronize()

    def compile() -> Run:
        if options.get("compile"):
            run(1)
        return run

    on_gpu = job.device == "cuda"
    return Program(
        compile=compile,
        params=sum(parameter.numel() for parameter in model.parameters()),
        macs=macs,
        device=torch.cuda.get_device_name() if on_gpu else "cpu",
        versions={"torch": torch.__version__, "timm": timm.__version__},
        device_memory=torch.cuda.max_memory_allocated if on_gpu else None,
        compiles=bool(options.get("compile")),
    )


def _macs(model: torch.nn.Module, pixels: int) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, 3, pixels, pixels))
    return counter.get_total_flops() / 2


def _autocast(job: Job) -> contextlib.AbstractContextManager:
    lower = job.dtype == "bfloat16"
    return torch.autocast(job.device, torch.bfloat16) if lower else contextlib.nullcontext()


def _train_step(job: Job, model, called, x_NCHW) -> Callable[[], None]:
    labels = torch.arange(job.batch, device=job.device) % CLASSES
    # The same rate as the others: so small that every number stays finite.
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9, nesterov=True)

    def step() -> None:
        with _autocast(job):
            loss = torch.nn.functional.cross_entropy(called(x_NCHW), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if job.options.get("clip"):
            adaptive_clip_grad(list(model.parameters())[:-2], 0.01)  # as timm leaves out the head
        optimizer.step()

    return step


def _forward(job: Job, called, x_NCHW) -> Callable[[], None]:
    def step() -> None:
        with torch.inference_mode(), _autocast(job):
            called(x_NCHW)

    return step


if __name__ == "__main__":
    serve(prepare)
