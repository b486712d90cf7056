"""`nfflax plan`: what a run needs and how long it takes on devices that are not here."""

import argparse
import re
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from nfflax.cli import Parser, add_overrides, display, print_json
from nfflax.cli.data_parts import status
from nfflax.spec.errors import Problem
from nfflax.spec.presets import shipped

if TYPE_CHECKING:
    from nfflax.insight.chips import Pod
    from nfflax.insight.rehearsal import Rehearsal
    from nfflax.spec.run import Run

_EXAMPLES = """examples:
  nfflax plan nfnet --devices cpu:8 --set mesh.fsdp=4 --set train.batch_size=64
  nfflax plan nfnet --topology v5e:4x4 --set train.batch_size=512
  nfflax plan nfnet_f6 --topology v5p:8x8x16 --on-paper
  nfflax plan nfnet_f6 --topology v5e:16x16 --search
  nfflax plan nfnet --topology h100:64 --search --on-paper

pods:
  v4, v5p   3 dimensions, e.g. v5p:4x4x8
  v5e, v6e  2 dimensions, e.g. v5e:16x16
  h100, h200  their number, e.g. h100:64; on paper only
"""
_CODES = """exit codes:
    0  it fits
    1  it does not fit
    2  the run, the pod or the compiler cannot be used as asked
"""
_DEVICES = re.compile(r"cpu:(?P<count>[0-9]{1,4})")


def add_arguments(parser: Parser) -> None:
    """Declare the arguments."""
    parser.description = (
        "Plan a run for devices that are not here. Its real train step is compiled for them: does\n"
        "it fit, what do devices exchange. How long a step takes is estimated; nothing is run."
    )
    parser.epilog = f"{_EXAMPLES}\n{_CODES}\npresets: {', '.join(shipped('runs'))}"
    parser.set_defaults(run=_plan)
    parser.add_argument("source", metavar="RUN", help="a run preset's name, or a run file")
    add_overrides(parser, "train.batch_size=1024")
    places = parser.add_mutually_exclusive_group(required=True)
    places.add_argument("--topology", metavar="POD", help="a pod, e.g. v5e:16x16")
    places.add_argument("--devices", type=_cpus, metavar="cpu:N", help="so many CPU devices")
    parser.add_argument(
        "--on-paper", action="store_true", help="compile nothing: estimates only, at once"
    )
    parser.add_argument(
        "--optimize",
        action="store_true",
        help="compile as a run on the pod does: several times slower, memory more exact",
    )
    parser.add_argument(
        "--search",
        action="store_true",
        help="rank meshes, remat and microbatches, then compile from the best on until one fits",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")


def _cpus(text: str) -> int:
    """A number of CPU devices, as an argument."""
    match = _DEVICES.fullmatch(text)
    if not match or not 1 <= int(match["count"]) <= 1024:
        raise argparse.ArgumentTypeError(f"{text!r} is not cpu:N, with N from 1 to 1024")
    return int(match["count"])


def _plan(args: argparse.Namespace) -> int:
    from nfflax.insight.chips import PodError, pod
    from nfflax.spec.load import load_run, parse_override

    run = load_run(args.source, dict(map(parse_override, args.overrides)))
    for option, is_given in (("--search", args.search), ("--on-paper", args.on_paper)):
        if is_given and args.devices:
            message = "needs a pod: CPU devices have no published rates"
            raise PodError([Problem("plan", option, message, allowed="with --topology")])
    if args.devices:
        return _one(run, None, _rehearsed(run, args.devices, args), args)
    place = pod(args.topology)
    if args.search:
        return _search(run, place, args)
    if args.on_paper:
        return _one(run, place, None, args)
    from nfflax.insight.search import mesh_on

    mesh_on(run, place)  # what does not divide is said at once
    return _one(run, place, _rehearsed(run, place, args), args)


def _rehearsed(run: "Run", place: "Pod | int", args: argparse.Namespace) -> "Rehearsal":
    from nfflax.cli.train_plan import timed
    from nfflax.insight.rehearsal import rehearse

    run = timed(run)  # the schedule is part of the step
    with status() as say:
        say(f"compiling the train step of {run.name}: this takes minutes")
        return rehearse(run, place, optimize=args.optimize)


def _one(
    run: "Run", place: "Pod | None", rehearsal: "Rehearsal | None", args: argparse.Namespace
) -> int:
    """Show one way to carry out a run."""
    from nfflax.cli.plan_page import estimate_data, page

    estimated = None
    if place:
        from nfflax.insight.estimate import estimate
        from nfflax.insight.search import mesh_on

        exchanges = rehearsal.exchanges if rehearsal and rehearsal.is_compiled else None
        estimated = estimate(run, place, mesh_on(run, place), exchanges=exchanges)
    if args.json:
        data = {
            "run": run.name,
            "compiled": rehearsal and _compiled_data(rehearsal),
            "estimated": estimated and estimate_data(estimated, run),
        }
        print_json(data)
    else:
        display(page(run, rehearsal, estimated))
    fits = rehearsal.fits if rehearsal else bool(estimated and estimated.fits)
    return 0 if fits else 1


def _search(run: "Run", place: "Pod", args: argparse.Namespace) -> int:
    """Show the best ways that were found, and what the compiler says of the first that fits."""
    from nfflax.cli.plan_page import estimate_data, ranking
    from nfflax.insight.rehearsal import check_compiler
    from nfflax.insight.search import checked, search

    if not args.on_paper:
        check_compiler(place)  # what is missing is said at once
    found = search(run, place)
    if not found:
        from nfflax.insight.chips import PodError

        message = f"no batch of {run.train.batch_size:,} images divides among {place.count} chips"
        raise PodError([Problem(f"run {run.name}", "train.batch_size", message)])
    compiled: dict[int, Rehearsal] = {}
    if not args.on_paper:
        tried = checked(found, lambda way: _rehearsed(way, place, args))
        compiled = {found.index(way): rehearsal for way, rehearsal in tried}
    if args.json:
        data = [
            {"settings": way.settings, "estimated": estimate_data(way.estimate, way.run)}
            | ({"compiled": _compiled_data(compiled[i])} if i in compiled else {})
            for i, way in enumerate(found)
        ]
        print_json({"run": run.name, "pod": place.name, "ways": data})
    else:
        display(ranking(run, place, found, compiled))
    fits = [rehearsal.fits for rehearsal in compiled.values()]
    return 0 if any(fits) or (args.on_paper and found[0].estimate.fits) else 1


def _compiled_data(rehearsal: "Rehearsal") -> dict[str, Any]:
    exchanges = [asdict(each) | {"sent": round(each.sent)} for each in rehearsal.exchanges]
    return asdict(rehearsal) | {"exchanges": exchanges}
