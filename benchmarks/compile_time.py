"""How long a train step takes to compile: scanned and unrolled, afresh and from the cache.

    python benchmarks/compile_time.py
    python benchmarks/compile_time.py --topology v5e:2x2 --dtype bfloat16 --pixels 192 --batch 32

The step is that of the whole recipe, as `nfflax train` runs it. Every number is from a process of
its own. With a topology it is compiled for TPUs that are not here, by libtpu, scanned and afresh.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peers import page
from peers.contestants import ALL
from peers.driver import PATHS, this_machine

import nfflax
from nfflax.insight.rehearsal import TPU_ENVIRONMENT

FORMS = {"scanned": 1, "unrolled": ALL}
PARTS = "trace", "lower", "compile"
HEADER = "network", "form", *PARTS, "CPU s", "from the cache", "CPU s again"

Seconds = dict[str, dict[str, float]]
"""By part: "wall" and "cpu"."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line per network and form, and write what is asked for. 2: a bad argument or page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    networks = [f"nfnet_f{i}" for i in range(7)]
    add("--networks", nargs="+", default=networks, metavar="NAME", help="presets (F0 to F6)")
    add("--forms", nargs="+", default=list(FORMS), choices=list(FORMS), metavar="FORM")
    add("--batch", type=int, default=8, metavar="N", help="images per device (8)")
    add("--pixels", type=int, default=96, metavar="N", help="side of the images (96)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--topology", default="", metavar="POD", help="TPUs to compile for, e.g. v5e:2x2")
    add("--json", type=Path, metavar="FILE", help="write all seconds")
    add("--write", type=Path, metavar="PAGE", help="fill a table of docs/benchmarks.md")
    args = parser.parse_args(arguments)
    place = "compile-tpu" if args.topology else "compile"
    try:
        for network in args.networks:
            nfflax.load_spec(network)
        if args.write:
            page.check(args.write, place)
    except (nfflax.SpecError, page.PageError) as error:
        parser.error(str(error))
    found, body = [], []
    for network in args.networks:
        for form in ["scanned"] if args.topology else args.forms:
            try:
                fresh, cached = measure(network, form, args)
            except subprocess.CalledProcessError as error:
                said = "".join(error.stderr.strip().splitlines()[-1:])
                print(f"compile_time: {network}, {form}: {said}", file=sys.stderr)
                return 1
            found.append({"network": network, "form": form, "fresh": fresh, "cached": cached})
            body.append(row(network, form, fresh, cached))
            print(" ".join(body[-1]), flush=True)
    header = [name for name in HEADER if not args.topology or name not in HEADER[-2:]]
    table = page.table(header, body)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))
    if args.write:
        page.fill(args.write, place, f"{about(args)}\n\n{table}")
    print(table)
    return 0


def measure(network: str, form: str, args: argparse.Namespace) -> tuple[Seconds, Seconds | None]:
    """Afresh, and from the cache that this filled; None for a topology."""
    asked = {name: getattr(args, name) for name in ("batch", "pixels", "dtype", "topology")}
    asked |= {"network": network, "unroll": FORMS[form]}
    with tempfile.TemporaryDirectory() as cache:
        fresh = compiled(asked, cache)
        return fresh, None if args.topology else compiled(asked, cache)


def compiled(asked: dict[str, Any], cache: str) -> Seconds:
    """The seconds of one compilation; it leaves its program in a folder or takes it from there."""
    environment = os.environ | TPU_ENVIRONMENT
    environment |= {
        "PYTHONPATH": os.pathsep.join(map(str, PATHS)),
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-m", "peers.compile_once", json.dumps(asked)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def row(network: str, form: str, fresh: Seconds, cached: Seconds | None) -> list[str]:
    """A line of the table: seconds by the clock of each part, then sums of them."""
    cells = [network, form, *(page.seconds(fresh[part]["wall"]) for part in PARTS)]
    cells.append(page.seconds(total(fresh, "cpu")))
    if cached:
        cells += [page.seconds(total(cached, clock)) for clock in ("wall", "cpu")]
    return cells


def total(spent: Seconds, clock: str) -> float:
    """Seconds of all parts together."""
    return sum(spent[part][clock] for part in PARTS)


def about(args: argparse.Namespace) -> str:
    """What was compiled, where and when."""
    target = f", for {args.topology}" if args.topology else ""
    packages = ["jax", "flax", *(["libtpu"] if args.topology else [])]
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    setting = f"{args.batch} images per device, {args.pixels} px, {args.dtype}{target}"
    return f"{setting}. {this_machine()}; {versions}; {time.strftime('%F')}."


if __name__ == "__main__":
    sys.exit(main())
