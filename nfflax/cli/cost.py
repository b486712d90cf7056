"""`nfflax cost`: what a network costs on one device, counted, and checked by the compiler."""
# ruff: noqa: RUF001 - the multiplication sign is meant

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from nfflax.cli import Parser, add_overrides, display, new_table, print_json
from nfflax.cli.data_parts import positive, status

if TYPE_CHECKING:
    from rich.console import RenderableType

    from nfflax.insight.aot import Compiled
    from nfflax.insight.cost import Cost
    from nfflax.insight.segments import Remat
    from nfflax.spec.plan import Plan

_EXAMPLES = """examples:
  nfflax cost nfnet_f0
  nfflax cost nfnet_f1 --batch 64 --dtype bfloat16 --remat conv
  nfflax cost my_net.toml --set stages.depth=[1,1,2,1] --resolution 128 --json
  nfflax cost nfnet_f0 --check
"""
_LEGEND = (
    "kept: what the backward pass needs of the forward pass. peak: the most that lives at once\n"
    "besides the state. Counted from the plan; --check compiles the real programs and compares."
)
_CLOSE = 0.2  # a count further off than this is explained
_MORE_COMPILED = (
    "Compiled takes more than counted: maps in float32 where the compute type is bfloat16, copies "
    "and zeros that this compiler makes, gaps between buffers (docs/cost.md)."
)
_LESS_COMPILED = (
    "Compiled takes less than counted: the compiler shares or recomputes maps (docs/cost.md)."
)


def add_arguments(parser: Parser) -> None:
    """Declare the arguments."""
    from nfflax.insight.cost import BATCH, REMATS

    parser.description = (
        "Show what a network costs on one device: parameters, multiply-adds, and the memory of a\n"
        "train step under each remat policy. Counted from the plan; nothing is compiled or run."
    )
    parser.epilog = _EXAMPLES
    parser.set_defaults(run=_cost)
    parser.add_argument("source", metavar="NAME|FILE", help="a preset's name, or a spec file")
    add_overrides(parser, "stages.depth=[1,1,2,1]")
    parser.add_argument(
        "--batch",
        type=positive,
        default=BATCH,
        metavar="N",
        help=f"images on the device ({BATCH})",
    )
    parser.add_argument(
        "--resolution",
        type=_side,
        metavar="N",
        help="input size in pixels (the spec's own: one to train at, one to test at)",
    )
    parser.add_argument(
        "--remat",
        choices=(*REMATS, "all"),
        default="all",
        help="what the backward pass recomputes (default: show all three)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="bfloat16",
        help="compute type (default: bfloat16, as runs have it)",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="compile the real programs for the device here, and compare; takes minutes",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")


def _side(text: str) -> int:
    """A side of an image, as an argument."""
    side = positive(text)
    if side > 99999:
        raise argparse.ArgumentTypeError(f"{text!r} is no size up to 99999")
    return side


def _cost(args: argparse.Namespace) -> None:
    from nfflax.insight.cost import REMATS, cost, inference_bytes
    from nfflax.spec.load import load_spec, parse_override
    from nfflax.spec.plan import plan

    spec = load_spec(args.source, dict(map(parse_override, args.overrides)))
    trained = plan(spec, resolution=args.resolution or spec.resolution.train)
    tested = plan(spec, resolution=args.resolution or spec.resolution.test)
    how = {"batch": args.batch, "dtype": args.dtype}
    policies: tuple[Remat, ...] = REMATS if args.remat == "all" else (args.remat,)
    costs = [cost(trained, remat=remat, **how) for remat in policies]
    compiled: list[Compiled] = _compile(tested, costs) if args.check else []
    here = []
    if compiled:
        on_cpu = compiled[0].platform == "cpu"
        here = [cost(trained, remat=c.remat, on_cpu=on_cpu, **how).peak for c in costs]
    forward = inference_bytes(tested, **how)
    pairs = list(zip([*here, forward], compiled, strict=True)) if compiled else []
    if args.json:
        print_json(_data(tested, costs, forward, pairs))
    else:
        display(_page(tested, costs, forward, pairs))


def _compile(tested: "Plan", costs: "list[Cost]") -> "list[Compiled]":
    """The train steps, then the forward pass."""
    from nfflax.insight.aot import compile_inference, compile_train_step, training_run

    found = []
    with status() as say:
        for cost in costs:
            say(f"compiling a train step, remat {cost.remat}")
            run = training_run(
                tested.spec,
                batch=cost.batch,
                resolution=cost.plan.input_size[0],
                dtype=cost.dtype,
                remat=cost.remat,
            )
            found.append(compile_train_step(run))
        say("compiling the forward pass")
        found.append(compile_inference(tested, batch=costs[0].batch, dtype=costs[0].dtype))
    return found


Pairs = list[tuple[float, "Compiled"]]


def _data(tested: "Plan", costs: "list[Cost]", forward: float, pairs: Pairs) -> dict[str, Any]:
    """All of it for programs: bytes, parameters, multiply-adds of one image."""
    from nfflax.insight.cost import weight_bytes

    first = costs[0]

    def checked(place: int) -> dict[str, Any]:
        if not pairs:
            return {}
        counted, compiled = pairs[place]
        ratio = counted / compiled.temporary if compiled.temporary else None
        return {"compiled": asdict(compiled) | {"counted": round(counted), "ratio": ratio}}

    def policy(place: int, cost: "Cost") -> dict[str, Any]:
        segments = [asdict(segment) | {"gradients": segment.gradients} for segment in cost.segments]
        return {
            "kept": round(cost.kept),
            "peak": round(cost.peak),
            "memory": round(cost.memory),
            "macs": round(cost.macs),
            "segments": segments,
            **checked(place),
        }

    return {
        "name": tested.spec.name,
        "params": tested.params,
        "batch": first.batch,
        "dtype": first.dtype,
        "resolution": {"train": first.plan.input_size[0], "test": tested.input_size[0]},
        "state": asdict(first.state) | {"total": first.state.total},
        "train": {cost.remat: policy(i, cost) for i, cost in enumerate(costs)},
        "inference": {
            "weights": weight_bytes(tested, first.dtype),
            "peak": round(forward),
            "macs": tested.macs(),
            **checked(-1),
        },
    }


def _page(tested: "Plan", costs: "list[Cost]", forward: float, pairs: Pairs) -> "RenderableType":
    """The same for people."""
    from rich.console import Group
    from rich.text import Text

    from nfflax.spec.table import human

    first = costs[0]
    side = first.plan.input_size[0]
    title = Text.assemble(
        (first.plan.spec.name, "bold cyan"),
        f"  {first.batch} images on one device, {first.dtype}: "
        f"training at {side}×{side}, inference at {tested.input_size[0]}×{tested.input_size[1]}",
    )
    state = first.state
    held = (
        f"held from step to step: params {human(state.params)}B, momentum {human(state.momentum)}B,"
        f" running average {human(state.average)}B; gradients of a step {human(state.params)}B"
    )
    parts = [title, "", _stage_table(costs), "", held, ""]
    parts += [_memory_table(tested, costs, forward), "", _LEGEND]
    if pairs:
        parts += ["", _check_table(costs, pairs), *_reasons(pairs)]
    return Group(*parts)


def _stage_table(costs: "list[Cost]") -> "RenderableType":
    """What each stage has, computes and keeps."""
    from nfflax.spec.table import human

    table = new_table()
    table.show_footer = True
    first = costs[0]
    table.add_column("part", "total", style="bold", footer_style="bold", no_wrap=True)
    total = human(first.plan.params), human(first.plan.macs(), 2)
    table.add_column("params", total[0], justify="right", style="green")
    table.add_column("MACs", total[1], justify="right", style="magenta")
    for cost in costs:
        kept = f"{human(cost.kept)}B"
        table.add_column(f"kept, {cost.remat}", kept, justify="right")
    for place, segment in enumerate(first.segments):
        kept = [f"{human(cost.segments[place].kept)}B" for cost in costs]
        table.add_row(segment.name, human(segment.params), human(segment.macs, 2), *kept)
    return table


def _memory_table(tested: "Plan", costs: "list[Cost]", forward: float) -> "RenderableType":
    """What the device must have, by policy."""
    from nfflax.insight.cost import weight_bytes
    from nfflax.spec.table import human

    table = new_table()
    table.add_column("remat", style="bold", no_wrap=True)
    for header in ("kept", "peak", "at", "with the state", "MACs per image"):
        table.add_column(header, justify="right")
    for cost in costs:
        fullest = max(cost.timeline(), key=lambda moment: moment[1])[0]
        bytes = (f"{human(b)}B" for b in (cost.kept, cost.peak))
        table.add_row(cost.remat, *bytes, fullest, f"{human(cost.memory)}B", human(cost.macs, 2))
    table.add_section()
    both = f"{human(weight_bytes(tested, costs[0].dtype) + forward)}B"
    table.add_row("inference", "", f"{human(forward)}B", "", both, human(tested.macs(), 2))
    return table


def _check_table(costs: "list[Cost]", pairs: Pairs) -> "RenderableType":
    """Counted against compiled."""
    from nfflax.spec.table import human

    table = new_table()
    table.add_column(f"compiled ({pairs[0][1].platform})", style="bold", no_wrap=True)
    for header in ("counted", "compiled", "ratio", "arguments", "seconds"):
        table.add_column(header, justify="right")
    names = [f"train, {cost.remat}" for cost in costs]
    for name, (counted, compiled) in zip([*names, "inference"], pairs, strict=True):
        ratio = f"{counted / compiled.temporary:.2f}" if compiled.temporary else "–"
        bytes = (f"{human(b)}B" for b in (counted, compiled.temporary))
        seconds = f"{compiled.seconds:.0f}"
        table.add_row(name, *bytes, ratio, f"{human(compiled.arguments)}B", seconds)
    return table


def _reasons(pairs: Pairs) -> list[str]:
    """Why the two differ, where they do."""
    reasons = []
    if pairs[0][1].platform == "cpu":
        reasons.append(
            "Counted as XLA schedules on CPUs: it recomputes all transition blocks before it needs "
            "the first, so remat saves less here than above."
        )
    ratios = [counted / compiled.temporary for counted, compiled in pairs if compiled.temporary]
    if min(ratios, default=1) < 1 - _CLOSE:
        reasons.append(_MORE_COMPILED)
    if max(ratios, default=1) > 1 + _CLOSE:
        reasons.append(_LESS_COMPILED)
    return ["", *reasons] if reasons else []
