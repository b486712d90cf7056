"""`nfflax eval`: the loss and accuracy of a trained network on its own data or on others."""

import argparse
from typing import TYPE_CHECKING, Any

from nfflax.cli import Parser, add_overrides, console, display, new_table, print_json
from nfflax.cli.data_parts import positive, progress, reference
from nfflax.cli.processes import add_processes, carry_out, is_first
from nfflax.spec.errors import Problem

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from nfflax.data.sources import Source
    from nfflax.spec.run import Run
    from nfflax.train.transfer import Pretrained

_EXAMPLES = """examples:
  nfflax eval runs/digits
  nfflax eval runs/digits --set data.eval=train --resolution 48
  nfflax eval nfnet_f0 --set data.source=imagenet --set data.eval=val
"""
_KEYS = ("data", "eval.batch_size", "mesh", "model")  # of a run, that evaluation heeds
_BATCH = 256  # images per step, where no run says


def add_arguments(parser: Parser) -> None:
    """Declare the arguments."""
    parser.description = "Evaluate a trained network, on all devices."
    parser.epilog = _EXAMPLES
    parser.set_defaults(run=lambda args: carry_out(args, lambda: _evaluate(args)))
    add_network(parser)
    parser.add_argument(
        "--resolution", type=positive, metavar="N", help="side of the images (the network's own)"
    )
    add_overrides(parser, "data.eval=val")
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    add_processes(parser)


def add_network(parser: Parser) -> None:
    """Declare which trained network is meant."""
    parser.add_argument(
        "network",
        type=reference,
        metavar="NETWORK",
        help="a run's folder, one of its checkpoints, a file of weights, https://..., "
        "hf://owner/repo, or a preset with published weights",
    )
    parser.add_argument(
        "--spec",
        type=reference,
        metavar="NAME|FILE",
        help="the network of a file that does not say it",
    )


def _evaluate(args: argparse.Namespace) -> None:
    import jax

    from nfflax.data.sources import open_source
    from nfflax.spec.files import Origin
    from nfflax.spec.load import load_spec
    from nfflax.train.cache import use_compilation_cache
    from nfflax.train.evaluate import evaluate
    from nfflax.train.mesh import make_mesh
    from nfflax.train.program import make_program
    from nfflax.train.transfer import open_weights, require_same

    found = open_weights(args.network, load_spec(args.spec) if args.spec else None)
    run = _run_of(found, args)
    require_same(found, run.spec, Origin("run eval", prefix="model.set."), same_classes=True)
    source = open_source(run.data, run.data.eval)
    notes = [*found.notes, *_label_notes(run, source, found.class_names)]
    use_compilation_cache()
    mesh = make_mesh(run.mesh)
    program = make_program(_fitted(run, mesh), mesh)
    batches = program.eval_steps(source)
    with jax.set_mesh(mesh), progress("evaluating", batches) as advance:
        params, stats = found.arrays(mesh)
        results = evaluate(program, {"": params}, stats, source, advance)
    results["skipped"] = len(source) - results["examples"]
    if is_first() and args.json:
        print_json(_data(found, run, results, notes))
    elif is_first():
        _show(found, run, results, notes)


def _run_of(found: "Pretrained", args: argparse.Namespace) -> "Run":
    """What there is to evaluate: the network and data of the run it comes from, as changed here."""
    from nfflax.data.errors import DataError
    from nfflax.spec.load import load_run, parse_override

    overrides = dict(map(parse_override, args.overrides))
    problems = [
        Problem("--set", key, "says nothing about evaluation", value, ", ".join(_KEYS))
        for key, value in overrides.items()
        if not any(key == allowed or key.startswith(f"{allowed}.") for allowed in _KEYS)
    ]
    if found.run is None and "data.source" not in overrides:
        message = "a file of weights does not say what to evaluate them on"
        problems.append(
            Problem("--set", "data.source", message, allowed="--set data.source=FOLDER")
        )
    if problems:
        raise DataError(problems)
    if args.resolution:
        overrides["model.set.resolution.test"] = args.resolution
    model: dict[str, Any] = {"dtype": "float32"}
    tables: dict[str, Any] = {"eval": {"batch_size": _BATCH}}
    if found.run:
        model = found.run.model.model_dump()
        size = found.run.eval.batch_size or found.run.train.batch_size
        tables = {"data": found.run.data.model_dump(), "eval": {"batch_size": size}}
    # A program has an optimiser as well. Nothing of it is used: the plainest there is.
    tables |= {"train": {"steps": 1}, "schedule": {"warmup_epochs": 0}, "agc": {"clipping": 0}}
    tables |= {"ema": {"decay": 0}, "model": model | {"spec": found.spec}}
    return load_run({"name": "eval"} | tables, overrides)


def _fitted(run: "Run", mesh: "Mesh") -> "Run":
    """The run with batches that divide among the devices here, rounded up."""
    from nfflax.spec.load import load_run
    from nfflax.train.mesh import batch_shards

    shards = batch_shards(mesh)
    size = -(-(run.eval.batch_size or _BATCH) // shards) * shards
    return load_run(run, {"eval.batch_size": size, "train.batch_size": size})


def _label_notes(run: "Run", source: "Source", class_names: tuple[str, ...]) -> list[str]:
    """What to know about the labels; more of them than the network has outputs is an error."""
    from nfflax.data.errors import DataError

    theirs, classes = tuple(source.class_names), run.spec.head.num_classes
    if classes < len(theirs):
        message = f"has {len(theirs)} classes, and the network tells {classes} apart"
        raise DataError([Problem("run eval", "data.source", message, run.data.source)])
    for number, (theirs_is, ours_is) in enumerate(zip(theirs, class_names, strict=False)):
        # ImageNet's folders are called by the synset, the first word of a class's name.
        if theirs_is not in (ours_is, ours_is.split(" ", 1)[0]):
            where = f"class {number} is {theirs_is!r} in {run.data.source}"
            return [f"{where}, and was {ours_is!r} in training"]
    return []


def _data(
    found: "Pretrained", run: "Run", results: dict[str, float], notes: list[str]
) -> dict[str, Any]:
    """The result, for programs."""
    return {
        "network": found.path,
        "spec": run.spec.name,
        "step": found.step,
        "source": run.data.source,
        "split": run.data.eval,
        "resolution": run.spec.resolution.test,
        "images": int(results["examples"]),
        "skipped": int(results["skipped"]),
        **{key: results[key] for key in ("loss", "top1", "top5", "seconds")},
        "notes": notes,
    }


def _show(found: "Pretrained", run: "Run", results: dict[str, float], notes: list[str]) -> None:
    """The same for people."""
    if results["skipped"]:
        notes = [*notes, f"{results['skipped']:,.0f} images could not be decoded"]
    for note in notes:
        console(stderr=True).print(f"note: {note}", soft_wrap=True)
    network = f"{run.spec.name} at {run.spec.resolution.test} px, {run.model.dtype}"
    console().print(f"{found}  {network}", soft_wrap=True)
    console().print()
    table = new_table()
    table.add_column("data", style="bold", overflow="fold")
    for header, style in (("images", ""), ("loss", ""), ("top-1", "green"), ("top-5", "")):
        table.add_column(header, style=style, justify="right", no_wrap=True)
    count, loss = f"{results['examples']:,.0f}", f"{results['loss']:.4f}"
    shares = (f"{results[key]:.2%}" for key in ("top1", "top5"))
    table.add_row(f"{run.data.source} ({run.data.eval})", count, loss, *shares)
    display(table)
