"""`nfflax spp`: measure how the signal passes through networks, and say what is wrong with them."""

import argparse
import importlib.util
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from nfflax.cli import Parser, add_overrides, console, display, new_table, print_json
from nfflax.cli.data_parts import positive, reference, status, whole
from nfflax.spec.errors import Problem, SpecError

if TYPE_CHECKING:
    import numpy as np

    from nfflax.insight.diagnosis import Report
    from nfflax.spec.run import Run
    from nfflax.spec.schema import Spec

_EXAMPLES = """examples:
  nfflax spp nfnet_f0
  nfflax spp my_net.toml --check
  nfflax spp nf_resnet50 resnet50_bn --plot spp.png
  nfflax spp nf_resnet50 --vary numerics.activation=relu,silu,tanh --plot activations.png
  nfflax spp nfnet_nano --data digits
"""
_MOST_PIXELS = 2048  # a side: far beyond what tells more
_BARS = "▁▂▃▄▅▆▇█"


class _ArgumentError(SpecError):
    """An argument that cannot be used."""

    subject: ClassVar[str] = "command line"


def add_arguments(parser: Parser) -> None:
    """Declare the arguments."""
    parser.description = (
        "Measure the signal in freshly built networks, block by block, against what their specs\n"
        "plan: a network whose signal fades or explodes will not train. Gains that start at zero\n"
        "count as one. Curves: arXiv:2101.08692, section 3; faults: docs/signal-propagation.md."
    )
    parser.epilog = _EXAMPLES
    parser.set_defaults(run=_spp)
    parser.add_argument(
        "specs", nargs="+", type=reference, metavar="SPEC", help="a preset's name, or a spec file"
    )
    add_overrides(parser, "numerics.activation=mish")
    parser.add_argument(
        "--vary",
        type=_variation,
        metavar="KEY=A,B,...",
        help="measure every SPEC once with each of these values, e.g. block.alpha=0.1,0.2",
    )
    parser.add_argument(
        "--batch", type=positive, metavar="N", help="how many images (as many as take seconds, 1-8)"
    )
    parser.add_argument(
        "--resolution",
        type=_pixels,
        metavar="R",
        help="their side in pixels (the spec's in training, halved while that takes long)",
    )
    parser.add_argument(
        "--data",
        type=reference,
        metavar="RUN",
        help="images that a run trains on, not N(0, 1) noise",
    )
    parser.add_argument("--seed", type=whole, default=0, metavar="N", help="of weights, images (0)")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE.png", help='draw the curves (needs the extra "plot")'
    )
    parser.add_argument(
        "--check", action="store_true", help="exit with code 1 if anything is wrong, for scripts"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")


def _spp(args: argparse.Namespace) -> int:
    if args.plot:
        _check_plot(args.plot)
    specs = _load(args)
    run = _load_run(args.data) if args.data else None
    with status() as say:
        measured = {
            label: _measured(spec, run, args, lambda text, at=label: say(f"{at}: {text}"))
            for label, spec in specs.items()
        }
    reports = {label: report for label, (report, _) in measured.items()}
    if args.plot:
        from nfflax.insight.spp_plot import draw

        try:
            several = not args.vary or len(args.specs) > 1
            title = "" if several else args.specs[0]
            draw({k.removeprefix(f"{title} "): r for k, r in reports.items()}, args.plot, title)
        except OSError as error:
            raise _refused(args.plot, f"cannot be written: {error.strerror or error}") from None
    if args.json:
        networks = [_data(label, *found) for label, found in measured.items()]
        print_json({"networks": networks, "plot": str(args.plot) if args.plot else None})
    else:
        for label, (report, images) in measured.items():
            _show(label, report, images)
        if args.plot:
            console().print(f"plot  {args.plot}", soft_wrap=True)
    return int(args.check and not all(report.healthy for report in reports.values()))


def _load(args: argparse.Namespace) -> dict[str, "Spec"]:
    """What is measured, by its label: all mistakes in it are told before anything is."""
    from nfflax.spec.load import load_spec, parse_override

    fixed = dict(map(parse_override, args.overrides))
    key, values = args.vary or ("", [""])
    specs: dict[str, Spec] = {}
    for source in args.specs:
        for value in values:
            varied = dict([parse_override(f"{key}={value}")]) if key else {}
            label = f"{source} {key.rpartition('.')[2]}={value}" if key else source
            specs[label] = load_spec(source, fixed | varied)
    return specs


def _load_run(source: str) -> "Run":
    from nfflax.spec.load import load_run

    return load_run(source, {"data.workers": 0})  # a few images are read sooner without


def _measured(
    spec: "Spec", run: "Run | None", args: argparse.Namespace, say: Any
) -> tuple["Report", str]:
    """What was found in a network, and on which images."""
    import numpy as np
    from flax import nnx

    from nfflax.insight import diagnose
    from nfflax.insight.spp import input_of
    from nfflax.nn.builder import build

    batch, size = input_of(spec)
    batch, size = args.batch or batch, args.resolution or size
    if run:
        say(f"reading images of {run.data.source}")
        images, what = _photographs(spec, run, batch, size, args.seed), run.data.source
    else:
        shape = batch, size, size, spec.stem.in_channels
        images = np.random.default_rng(args.seed).standard_normal(shape, np.float32)
        what = "N(0, 1) noise"
    say("building")
    model = build(spec, rngs=nnx.Rngs(args.seed))
    say("compiling and measuring")
    counted = f"{batch} image{'s' * (batch > 1)} of {what}, {size} px"
    return diagnose(model, images), counted


def _photographs(spec: "Spec", run: "Run", batch: int, size: int, seed: int) -> "np.ndarray":
    """Images as a run's training would show them to this network."""
    import jax.numpy as jnp
    import numpy as np

    from nfflax.data import TrainView, open_source, train_batches
    from nfflax.data.augment import normalize
    from nfflax.data.feed import check_source
    from nfflax.spec.load import load_spec

    sides = {"resolution.train": size, "resolution.test": size, "head.num_classes": 0}
    shown = load_spec(spec, sides)
    source = open_source(run.data, "train")
    check_source(
        run.model_copy(update={"model": run.model.model_copy(update={"spec": shown})}), source
    )
    view = TrainView.of(shown, run.data)
    with train_batches(source, view, batch_size=batch, seed=seed, data=run.data) as batches:
        images = next(batches)["images"]
    return np.asarray(normalize(jnp.asarray(images), shown.preprocess))


def _show(label: str, report: "Report", images: str) -> None:
    """The curves, stage by stage, and what is wrong."""
    from rich.text import Text

    curves, blocks = report.curves, report.flow.blocks
    lines = console()
    lines.print(Text.assemble((label, "bold"), f"  {images}"), soft_wrap=True)
    table = new_table()
    table.add_column("stage", no_wrap=True)
    for header in ("blocks", "variance", "planned", "squared mean", "branch"):
        table.add_column(header, justify="right", no_wrap=True)
    planned = report.expected
    first = "" if planned is None else _number(planned[0])
    stem = curves["avg_var"][0], curves["avg_sq_mean"][0]
    table.add_row("stem", "", _number(stem[0]), first, _number(stem[1]), "")
    for stage in range(len(report.flow.blocks) and blocks[-1].plan.stage + 1):
        at = [i for i, block in enumerate(blocks, start=1) if block.plan.stage == stage]
        ends = "" if planned is None else _span(planned[at[0]], planned[at[-1]])
        variance = _span(*(curves["avg_var"][i] for i in (at[0], at[-1])))
        mean = max(curves["avg_sq_mean"][i] for i in at)
        branch = [curves["res_avg_var"][i - 1] for i in at]
        cells = str(len(at)), variance, ends, _number(mean), _span(min(branch), max(branch))
        table.add_row(str(stage), *cells)
    display(table)
    titles = {"avg_var": "variance", "avg_sq_mean": "squared mean", "res_avg_var": "branch"}
    for name, title in titles.items():
        lines.print(f"{title:<13} {_sparkline(curves[name])}", soft_wrap=True)
    for note in report.notes:
        lines.print(Text(f"note: {note}", style="dim"), soft_wrap=True)
    for fault in report.faults:
        lines.print(Text.assemble(("fault", "bold red"), f": {fault}"), soft_wrap=True)
    if report.healthy:
        said = "every part does as planned"
        if planned is None:
            said = "all is finite, and there is no plan to hold it to"
        lines.print(Text.assemble(("ok", "bold green"), f": {said}"), soft_wrap=True)
    lines.print()


def _data(label: str, report: "Report", images: str) -> dict[str, Any]:
    """The same for programs."""
    from nfflax.train.history import json_number

    def numbers(values: Any) -> list[float | None]:
        return [json_number(float(value)) for value in values]

    return {
        "label": label,
        "network": report.name,
        "images": images,
        "blocks": [block.plan.name for block in report.flow.blocks],
        "curves": {name: numbers(curve) for name, curve in report.curves.items()},
        "planned": None if report.expected is None else numbers(report.expected),
        "healthy": report.healthy,
        "faults": [vars(fault) for fault in report.faults],
        "notes": list(report.notes),
    }


def _number(value: float) -> str:
    return f"{value:.3g}"


def _span(first: float, last: float) -> str:
    a, b = _number(first), _number(last)
    return a if a == b else f"{a} - {b}"


def _sparkline(values: "np.ndarray") -> str:
    """Bars from 0 to the largest value, `!` where there is no finite one."""
    import numpy as np

    finite = np.isfinite(values)
    top = max(values[finite], default=0) or 1
    steps = np.where(finite, values, 0) / top * (len(_BARS) - 1)
    return "".join(
        _BARS[round(step)] if ok else "!" for step, ok in zip(steps, finite, strict=True)
    )


def _check_plot(path: Path) -> None:
    """Find out before the work what would be in the way of the plot."""
    if importlib.util.find_spec("matplotlib") is None:
        raise _refused(path, 'needs matplotlib; the extra "plot" brings it')
    if path.suffix.lower() != ".png":
        raise _refused(path, "is not called .png")
    if not path.parent.is_dir():
        raise _refused(path, "is in a folder that is not there")


def _refused(path: Path, message: str) -> _ArgumentError:
    return _ArgumentError([Problem("--plot", "", message, str(path), "a file called .png")])


def _variation(text: str) -> tuple[str, list[str]]:
    """`KEY=A,B,...`; commas in brackets part no values."""
    key, _, values = text.partition("=")
    parts = [part.strip() for part in re.split(r",(?![^\[]*\])", values)]
    if not key.strip() or not all(parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=A,B,...")
    return key.strip(), parts


def _pixels(text: str) -> int:
    number = positive(text)
    if number > _MOST_PIXELS:
        raise argparse.ArgumentTypeError(f"{text} is more than {_MOST_PIXELS} pixels")
    return number
