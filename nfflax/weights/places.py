"""Where weights may be, in one grammar for commands, run files and Python.

runs/digits, F0_haiku.npz, ~/nets/l0/       a local path, which wins where it exists
https://host/path/file                      an address; http works too
hf://owner/repo[@revision][/file]           Hugging Face's hub
nfnet_f0, timm_nfnet_l0                     a preset with published weights
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from nfflax.spec.errors import nearest
from nfflax.spec.presets import list_specs
from nfflax.weights.download import Download, Progress, download
from nfflax.weights.errors import WeightsError
from nfflax.weights.hub import fetch_from_hub
from nfflax.weights.published import Published, all_published, preset_of, published

GRAMMAR = "a local path, https://..., hf://owner/repo[@revision][/file], or a preset's name"


@dataclass(frozen=True)
class Fetched:
    """Weights that are on this machine now."""

    place: str
    """What was asked for."""
    path: Path
    """A local file or folder."""
    notes: tuple[str, ...] = ()
    """What their user should know: where they come from, whether checksums agree."""
    sha256: str = ""
    """Of a file from an address."""
    published: Published | None = None
    """What is known of the place, if it is a preset with published weights."""


def fetch(
    place: str | os.PathLike[str], *, progress: Progress = lambda _done, _all: None
) -> Fetched:
    """Bring the weights at `place` to this machine; raises WeightsError where that cannot be.

    A local path is returned as it is. What is downloaded is kept, and not downloaded again.
    `progress` hears of bytes as they come.
    """
    text = os.fspath(place)
    local = Path(os.path.expanduser(text))
    if not text:
        raise WeightsError("the weights", [f"No place is given. Allowed: {GRAMMAR}."])
    if os.path.exists(local):
        return Fetched(text, local, _shadow_notes(text))
    known = published(text)
    address = known.place if known else text
    scheme = _scheme(address)
    if scheme in ("http", "https"):
        found = download(address, progress)
        path, sha256, notes = found.path, found.sha256, _web_notes(found, known)
    elif scheme == "hf":
        path, commit = _from_hub(text, address, known, progress)
        sha256, notes = "", (f"{address} at commit {commit}",)
    else:
        raise WeightsError(text, [_unknown(text, scheme)])
    if known is not None:
        notes = (f"{text}: published by {known.source}, licence {known.licence}", *notes)
    return Fetched(text, path, notes, sha256, known)


def _scheme(place: str) -> str:
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]+)://", place)
    return match[1].lower() if match else ""


def _from_hub(
    place: str, address: str, known: Published | None, progress: Progress
) -> tuple[Path, str]:
    try:
        return fetch_from_hub(address, progress)
    except WeightsError as error:
        mirrors = [f"The same weights are at {known.mirror}."] if known and known.mirror else []
        raise WeightsError(place, [*error.problems, *mirrors]) from None


def _web_notes(found: Download, known: Published | None) -> tuple[str, ...]:
    verb = "from the cache" if found.from_cache else "downloaded"
    notes = [
        f"{found.url}: {found.size:,} bytes, {verb}: {found.path}",
        f"sha256 {found.sha256}, md5 {found.md5}",
    ]
    if known is not None and known.md5:
        listed = "a public repository lists (the publisher lists none)"
        agrees = "is the one that" if found.md5 == known.md5 else f"is not {known.md5}, which"
        notes.append(f"md5 {agrees} {listed}")
    # As PyTorch's hub has it, and timm's release files.
    if promised := re.search(r"-([0-9a-f]{8,64})\.[^/]*$", found.url):
        agrees = "agrees" if found.sha256.startswith(promised[1]) else "does NOT agree"
        notes.append(f"sha256 {agrees} with {promised[1]} in the file's name")
    return tuple(notes)


def _shadow_notes(text: str) -> tuple[str, ...]:
    if published(text) is None:
        return ()
    return (f"{text} is the local file or folder of that name, not the published weights",)


def _unknown(place: str, scheme: str) -> str:
    """Why a text is no place, and what may have been meant."""
    if scheme:
        near = f"hf://{place.partition('://')[2]}" if scheme.startswith("hf") else ""
        return f"{scheme}:// is no way to weights. {_meant(near)}Allowed: {GRAMMAR}."
    if place in list_specs():
        return f"The preset {place} has no published weights. {_meant(_like(place))}{_which()}"
    name = re.sub(r"^hf[-_]hub:", "", place)  # as timm writes it
    near = f"hf://{name}" if name != place or place.startswith("timm/") else _like(place)
    return f"There is no such file or folder. {_meant(near)}Allowed: {GRAMMAR}."


def _like(place: str) -> str:
    """The preset with published weights that is called most like this, without timm's tags."""
    names = [entry.preset for entry in all_published()]
    bare = place.partition(".")[0]
    return preset_of(bare) if preset_of(bare) in names else nearest(bare, names)


def _meant(near: str) -> str:
    return f"Did you mean {near}? " if near else ""


def _which() -> str:
    names = [entry.preset for entry in all_published()]
    return f"Those that have: {', '.join(names)}."
