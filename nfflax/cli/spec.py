"""`nfflax spec`: list the shipped specs, show one as a table, check files, compare two."""

import argparse
import json
import re
from typing import TYPE_CHECKING, Any

from nfflax.cli import Parser, add_command, add_overrides, console, display, new_table, print_json
from nfflax.spec.errors import Problem, SpecError, nearest

if TYPE_CHECKING:
    from nfflax.spec.plan import Plan

_EXAMPLES = """examples:
  nfflax spec list "nfnet_f*"
  nfflax spec show nfnet_f0 --resolution 320
  nfflax spec show my_net.toml --set stages.depth=[1,1,2,1] --blocks
  nfflax spec diff nfnet_f0 nfnet_f1
"""


def add_arguments(parser: Parser) -> None:
    """Declare the subcommands."""
    parser.description = "Look at the specs of networks: shipped presets and your own files."
    parser.epilog = _EXAMPLES
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    def command(name: str, run: Any, summary: str, *, has_json: bool = False) -> Parser:
        return add_command(commands, name, run, summary, has_json=has_json)

    listing = command("list", _list, "list the shipped specs with their costs", has_json=True)
    listing.add_argument(
        "pattern",
        nargs="?",
        default="*",
        metavar="PATTERN",
        help='part of a name, or a pattern such as "nfnet_f*" (default: all)',
    )

    show = command("show", _show, "show a network layer by layer", has_json=True)
    show.add_argument("source", metavar="NAME|FILE", help="a preset's name, or a spec file")
    add_overrides(show, "stages.depth=[1,1,2,1]")
    show.add_argument(
        "--resolution",
        type=_resolution,
        metavar="N|HxW",
        help="input size in pixels (default: the spec's test resolution)",
    )
    show.add_argument(
        "--output-stride",
        type=int,
        choices=(8, 16, 32),
        help="keep later maps large with dilated convolutions (default: the spec's own strides)",
    )
    show.add_argument("--blocks", action="store_true", help="one row for every block")

    check = command("check", _check, "find every mistake in spec files")
    check.add_argument("files", nargs="+", metavar="FILE", help="a spec file")

    diff = command("diff", _diff, "compare two networks key by key, and their costs", has_json=True)
    diff.add_argument("a", metavar="A", help="a preset's name, or a spec file")
    diff.add_argument("b", metavar="B", help="another one")

    schema = command("schema", _schema, "print the JSON Schema of spec files, for editors")
    schema.add_argument("--run", action="store_true", dest="of_runs", help="of run files instead")


def _list(args: argparse.Namespace) -> None:
    from rich.text import Text

    from nfflax.spec.plan import plan
    from nfflax.spec.presets import list_specs

    part = args.pattern
    names = list_specs(part if re.search(r"[*?[]", part) else f"*{part}*")
    if not names:
        near = nearest(part, list_specs())
        raise SpecError([Problem("spec list", "PATTERN", "no preset matches", part, nearest=near)])
    costs = [_costs(plan(name)) for name in names]
    if args.json:
        print_json(costs)
        return
    table = new_table()
    table.add_column("name", style="bold", no_wrap=True)
    for header, style in (("params", "green"), ("MACs", "magenta"), ("at", "")):
        table.add_column(header, style=style, justify="right", no_wrap=True)
    table.add_column("summary")  # the one that gives way, with an ellipsis
    families = [re.sub(r"(?<=net|ext).*", "", name) for name in names]
    for cost, family, below in zip(costs, families, [*families[1:], ""], strict=True):
        summary = Text(cost["summary"], no_wrap=True, overflow="ellipsis")
        cells = cost["name"], *_human(cost), str(cost["resolution"])
        table.add_row(*cells, summary, end_section=family != below)
    display(table)


def _show(args: argparse.Namespace) -> None:
    from nfflax.spec.load import load_spec, parse_override
    from nfflax.spec.plan import plan

    spec = load_spec(args.source, dict(map(parse_override, args.overrides)))
    network = plan(spec, resolution=args.resolution, output_stride=args.output_stride)
    if args.json:
        print_json(network.to_dict() | {"spec": spec.model_dump(mode="json")})
        return
    from nfflax.spec.table import plan_renderable

    display(plan_renderable(network, every_block=args.blocks))


def _check(args: argparse.Namespace) -> None:
    from rich.text import Text

    from nfflax.spec.plan import plan

    problems = {}
    for file in args.files:
        try:
            costs = _costs(plan(file))
        except SpecError as error:  # files that extend the same faulty one repeat its problems
            problems |= {str(problem): problem for problem in error.problems}
            continue
        params, macs = _human(costs)
        facts = f"  {file}  {params} params, {macs} MACs at {costs['resolution']}"
        line = Text.assemble(("ok", "bold green"), facts)
        console().print(line, soft_wrap=True)  # one line per file, however long its path
    if problems:
        raise SpecError(list(problems.values()))


def _diff(args: argparse.Namespace) -> None:
    from nfflax.spec.plan import plan

    networks = [plan(source) for source in (args.a, args.b)]
    a, b = map(_costs, networks)
    keys_a, keys_b = (network.spec.values_by_key() for network in networks)
    differences = {k: {"a": v, "b": keys_b[k]} for k, v in keys_a.items() if v != keys_b[k]}
    ratios = {key: b[key] / a[key] for key in ("params", "macs")}
    if args.json:
        print_json({"a": a, "b": b, "ratio": ratios, "differences": differences})
        return
    table = new_table()
    table.add_column("key", style="bold", no_wrap=True)
    table.add_column(args.a, style="red", overflow="fold")
    table.add_column(args.b, style="green", overflow="fold")
    table.add_column("ratio", justify="right")
    for key, values in differences.items():
        table.add_row(key, *(json.dumps(value, ensure_ascii=False) for value in values.values()))
    table.add_section()
    for name, key, left, right in zip(
        ("params", "MACs"), ratios, _human(a), _human(b), strict=True
    ):
        table.add_row(name, left, right, f"{ratios[key]:.2f}")
    table.add_row("at", str(a["resolution"]), str(b["resolution"]))
    display(table)


def _schema(args: argparse.Namespace) -> None:
    from nfflax.spec.run import Run
    from nfflax.spec.schema import Spec, file_schema

    print_json(file_schema(Run if args.of_runs else Spec))


def _resolution(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d{0,4})(?:x([1-9]\d{0,4}))?", text, re.ASCII)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 256, or 256x320")
    height, width = match.groups()
    return int(height), int(width or height)


def _costs(network: "Plan") -> dict[str, Any]:
    return {
        "name": network.spec.name,
        "summary": network.spec.summary,
        "params": network.params,
        "macs": network.macs(),
        "resolution": network.spec.resolution.test,
    }


def _human(costs: dict[str, Any]) -> tuple[str, str]:
    """Parameters and multiply-adds in a few characters."""
    from nfflax.spec.table import human

    return human(costs["params"]), human(costs["macs"], 2)
