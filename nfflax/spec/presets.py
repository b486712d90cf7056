"""Where the shipped specs lie, and what they are called."""

import fnmatch
import functools
import re
from pathlib import Path


@functools.cache
def preset_root() -> Path:
    """The folder of shipped specs: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    return next(p for p in (package / "specs", package.parent / "specs") if p.is_dir())


def preset_paths() -> dict[str, Path]:
    """Name and file of every shipped model spec."""
    return shipped("models")


def family_paths() -> dict[str, Path]:
    """Name and file of the family bases: model specs extend them, alone they are no networks."""
    return shipped("families")


def list_specs(pattern: str = "*") -> list[str]:
    """Names of the shipped model specs that match a shell-style pattern, e.g. "nfnet_f*"."""
    return [name for name in preset_paths() if fnmatch.fnmatchcase(name, pattern)]


@functools.cache
def shipped(folder: str) -> dict[str, Path]:
    """Name and file of every spec in one of the shipped folders, in natural order."""
    files = {p.stem: p for p in (preset_root() / folder).glob("*.toml")}
    return dict(sorted(files.items(), key=lambda item: _natural(item[0])))


def _natural(name: str) -> list[tuple[int, str]]:
    """A sort key that puts nf_resnet50 before nf_resnet101."""
    return [(int(p), "") if p.isdigit() else (-1, p) for p in re.split(r"(\d+)", name) if p]
