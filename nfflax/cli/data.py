"""`nfflax data`: look into a source of images, pack one into a few large files, make one up.

Its commands about the images of a run are in data_run.py.
"""

import argparse
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nfflax.cli import Parser, add_command, console, data_run, display, new_table, print_json
from nfflax.cli.data_parts import positive, progress, reference, whole

if TYPE_CHECKING:
    from nfflax.data.sources import Source
    from nfflax.spec.errors import Problem

_EXAMPLES = """examples:
  nfflax data inspect imagenet/
  nfflax data inspect digits --split train --verify
  nfflax data pack imagenet/ imagenet_packed/
  nfflax data pack tfds:imagenet2012 imagenet_packed/ --split validation
  nfflax data generate toy/ --classes 10 --train 1000
  nfflax data preview digits --step 100
  nfflax data bench nfnet --set data.source=imagenet_packed
"""
_SAMPLED = 64  # images that `inspect` opens without --verify


def add_arguments(parser: Parser) -> None:
    """Declare the subcommands."""
    parser.description = (
        "Look into sources of images and what a run makes of them, pack them, make one up."
    )
    parser.epilog = _EXAMPLES
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    def command(name: str, run: Any, summary: str) -> Parser:
        return add_command(commands, name, run, summary, has_json=True)

    def source_of(added: Parser) -> None:
        added.add_argument(
            "source",
            type=reference,
            metavar="SOURCE",
            help="a folder of images or of packed records, digits, tfds:NAME or hf:NAME",
        )
        added.add_argument(
            "--split",
            action="append",
            type=reference,
            metavar="NAME",
            help="a split; may be repeated (default: all that are there)",
        )
        for option, text in (
            ("classes", "file of an image folder's classes, in the order of their labels"),
            ("image-key", "name of the image in the examples of tfds and hf"),
            ("label-key", "name of the label there"),
        ):
            metavar = "FILE" if option == "classes" else "NAME"
            added.add_argument(f"--{option}", type=reference, metavar=metavar, help=text)

    inspect = command("inspect", _inspect, "show what a source holds, and find damaged images")
    source_of(inspect)
    inspect.add_argument(
        "--verify", action="store_true", help="decode every image and compare every checksum"
    )

    pack = command("pack", _pack, "pack a source into a few large files; goes on where it stopped")
    source_of(pack)
    pack.add_argument("folder", type=Path, metavar="FOLDER", help="where the packed files go")
    pack.add_argument(
        "--shard-images",
        type=positive,
        default=8192,
        metavar="N",
        help="images in each file (default: %(default)s)",
    )

    generate = command("generate", _generate, "make up a folder of JPEG images in classes")
    generate.add_argument("folder", type=Path, metavar="FOLDER", help="a new folder")
    for name, default, text in (
        ("classes", 10, "number of classes"),
        ("train", 1000, "images to train on"),
        ("test", 200, "images to test on"),
        ("size", 256, "short side in pixels"),
    ):
        generate.add_argument(
            f"--{name}", type=positive, default=default, metavar="N", help=f"{text} (%(default)s)"
        )
    generate.add_argument("--seed", type=whole, default=0, metavar="N", help="random seed (0)")

    data_run.add_preview(command)
    data_run.add_bench(command)


def _inspect(args: argparse.Namespace) -> None:
    from nfflax.data.errors import DataError

    reports, problems = [], []
    for split, source in _sources(args):
        report, bad = _report(split, source, every=args.verify)
        reports.append(report)
        problems += bad
    if not args.json:
        table = new_table()
        table.add_column("split", style="bold", no_wrap=True)
        for header in ("images", "classes", "opened"):
            table.add_column(header, justify="right", no_wrap=True)
        table.add_column("kinds")
        table.add_column("short side", justify="right", no_wrap=True)
        for report in reports:
            counts = (report["images"], report["classes"], report["opened"])
            kinds = ", ".join(f"{count:,} {kind}" for kind, count in report["kinds"].items())
            sides = "{least} to {most} px".format(**report["short_side"])
            table.add_row(report["split"], *(f"{count:,}" for count in counts), kinds, sides)
        display(table)
    if problems:
        raise DataError(problems)
    if args.json:
        print_json(reports)


def _report(split: str, source: "Source", *, every: bool) -> tuple[dict[str, Any], list["Problem"]]:
    """What a split holds, seen from some of its images or all, and what is wrong with them."""
    from nfflax.data.decode import Picture
    from nfflax.data.errors import ImageError
    from nfflax.data.records import RecordSource
    from nfflax.spec.errors import Problem

    problems = source.damaged_shards() if every and isinstance(source, RecordSource) else []
    stride = 1 if every else max(len(source) // _SAMPLED, 1)
    kinds: Counter[str] = Counter()
    sides = []
    with progress(f"opening {split}", -(-len(source) // stride)) as advance:
        for index in range(0, len(source), stride):
            name = f"image {index}"
            try:
                record = source[index]
                name = record.name
                picture = Picture(record.image)
                if every:
                    picture.region((0, 0, picture.width, picture.height), 1)
            except ImageError as error:
                problems.append(Problem(error.name or name, "", error.reason))
            else:
                kinds[picture.kind] += 1
                sides.append(min(picture.width, picture.height))
            advance(1)
    report = {
        "split": split,
        "images": len(source),
        "classes": len(source.class_names),
        "opened": len(sides),
        "kinds": dict(kinds.most_common()),
        "short_side": {"least": min(sides, default=0), "most": max(sides, default=0)},
    }
    return report, problems


def _pack(args: argparse.Namespace) -> None:
    from nfflax.data.pack import pack_split

    reports = []
    for split, source in _sources(args):
        with progress(f"packing {split}", len(source)) as advance:
            manifest = pack_split(
                source, args.folder, split, shard_images=args.shard_images, progress=advance
            )
        size = sum(shard["bytes"] for shard in manifest["shards"])
        files = len(manifest["shards"])
        reports.append({"split": split, "images": len(source), "files": files, "bytes": size})
    if args.json:
        print_json(reports)
        return
    for report in reports:
        text = "{split}  {images:,} images in {files} files, {bytes:,} bytes".format(**report)
        console().print(text, soft_wrap=True)


def _generate(args: argparse.Namespace) -> None:
    from nfflax.data.generate import generate_folder

    shape = {key: getattr(args, key) for key in ("classes", "train", "test", "size", "seed")}
    with progress("drawing", args.train + args.test) as advance:
        generate_folder(args.folder, **shape, progress=advance)
    if args.json:
        print_json({"folder": str(args.folder)} | shape)
    else:
        text = "{train:,} + {test:,} images in {classes} classes".format(**shape)
        console().print(f"{args.folder}  {text}", soft_wrap=True)


def _sources(args: argparse.Namespace) -> Iterator[tuple[str, "Source"]]:
    """The splits asked for, or all that there are, opened."""
    from nfflax.data.sources import open_source, splits_of
    from nfflax.spec.data import Data

    given = {key: getattr(args, key) for key in ("source", "classes", "image_key", "label_key")}
    data = Data(**{key: value for key, value in given.items() if value})
    for split in args.split or splits_of(data):
        yield split, open_source(data, split)
