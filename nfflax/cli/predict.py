"""`nfflax predict`: what a trained network sees in images."""

import argparse
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nfflax.cli import Parser, console, display, print_json
from nfflax.cli.data_parts import positive, progress
from nfflax.cli.eval import add_network

if TYPE_CHECKING:
    import numpy as np

    from nfflax.data.views import EvalView
    from nfflax.train.inference import Loaded

_EXAMPLES = """examples:
  nfflax predict runs/digits seven.png
  nfflax predict nfnet_f0 photos/ --top 3 --json
"""
_BATCH = 32  # images that the network gets at a time
_BAR = 24  # characters of the bar that means certainty


def add_arguments(parser: Parser) -> None:
    """Declare the arguments."""
    parser.description = "Show the likeliest classes of images."
    parser.epilog = f"{_EXAMPLES}\nThe exit code is 2 if an image cannot be used."
    parser.set_defaults(run=_predict)
    add_network(parser)
    parser.add_argument(
        "images", type=Path, nargs="+", metavar="IMAGE", help="an image, or a folder of images"
    )
    parser.add_argument(
        "--top", type=positive, default=5, metavar="K", help="how many classes to show (5)"
    )
    parser.add_argument(
        "--resolution", type=positive, metavar="N", help="side of the images (the network's own)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")


def _predict(args: argparse.Namespace) -> int:
    import dataclasses

    from nfflax.train.cache import use_compilation_cache
    from nfflax.train.inference import load_model
    from nfflax.weights.fold import fold

    use_compilation_cache()
    loaded = load_model(args.network, spec=args.spec)
    loaded = dataclasses.replace(loaded, model=fold(loaded.model))  # once, for all batches
    side = args.resolution or loaded.view.resolution
    view = dataclasses.replace(loaded.view, resolution=side)
    files = [file for given in args.images for file in _files(given)]
    shown: list[dict[str, Any]] = []
    with progress("looking", len(files)) as advance:
        for start in range(0, len(files), _BATCH):
            part = files[start : start + _BATCH]
            shown += _looked_at(loaded, view, part, args.top, min(_BATCH, len(files)))
            advance(len(part))
    if args.json:
        print_json(shown)
    else:
        for note in loaded.notes:
            console(stderr=True).print(f"note: {note}", soft_wrap=True)
        for image in shown:
            _show(image)
    return 2 if any("error" in image for image in shown) else 0


def _files(given: Path) -> list[Path]:
    """The images that an argument means."""
    from nfflax.data.folder import IS_IMAGE

    if not given.is_dir():
        return [given]
    found = [file for file in given.rglob("[!.]*") if IS_IMAGE.search(file.name)]
    return sorted(found) or [given]


def _looked_at(
    loaded: "Loaded", view: "EvalView", files: Sequence[Path], top: int, batch_size: int
) -> Iterator[dict[str, Any]]:
    """For each file its likeliest classes, or what is wrong with it."""
    import numpy as np

    from nfflax.train.inference import predictions

    with ThreadPoolExecutor() as pool:
        opened = list(pool.map(lambda file: _opened(view, file), files))
    good = [image for image in opened if not isinstance(image, str)]
    found = iter(())
    if good:
        stacked = predictions(loaded.model, np.stack(good), top=top, batch_size=batch_size)
        found = zip(stacked.classes.tolist(), stacked.probabilities.tolist(), strict=True)
    for file, image in zip(files, opened, strict=True):
        if isinstance(image, str):
            yield {"image": str(file), "error": image}
            continue
        seen = [
            {"class": number, "name": _name(loaded, number), "probability": probability}
            for number, probability in zip(*next(found), strict=True)
        ]
        yield {"image": str(file), "predictions": seen}


def _opened(view: "EvalView", file: Path) -> "np.ndarray | str":
    """The image for the network, or what is wrong with it."""
    from nfflax.data.errors import ImageError

    try:
        return view(file.read_bytes())
    except IsADirectoryError:
        return "holds no images"
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    except ImageError as error:
        return error.reason


def _name(loaded: "Loaded", number: int) -> str:
    names = loaded.class_names
    return names[number] if number < len(names) else str(number)


def _show(image: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    if "error" in image:
        words = Text.assemble((image["image"], "bold"), "  ", (image["error"], "red"))
        console().print(words, soft_wrap=True)
        return
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(justify="right", no_wrap=True)
    table.add_column(width=_BAR, no_wrap=True, style="green")
    table.add_column(overflow="fold")
    for seen in image["predictions"]:
        table.add_row(f"{seen['probability']:.2%}", _bar(seen["probability"]), seen["name"])
    console().print(Text(image["image"], "bold"), soft_wrap=True)
    display(table)


def _bar(share: float) -> str:
    full, rest = divmod(round(8 * _BAR * share), 8)
    return "█" * full + " ▏▎▍▌▋▊▉"[rest].strip()
