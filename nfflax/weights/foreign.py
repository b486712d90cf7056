"""A file or folder of weights from elsewhere: what format it is in, and which network it can be.

The format goes by the content: DeepMind's pickle, what torch.save or safetensors wrote with timm's
names or ours, a Hugging Face folder. Which network it is, some say themselves. Of the others only
names and shapes are known, and presets are tried on them.
"""

import contextlib
import functools
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from flax import nnx

from nfflax.nn.net import NFNet
from nfflax.spec.errors import SpecError
from nfflax.spec.files import NOT_FOR_DOCUMENTS
from nfflax.spec.load import load_spec
from nfflax.spec.plan import Plan, plan
from nfflax.spec.presets import list_specs
from nfflax.spec.schema import Spec
from nfflax.weights import deepmind, naming, timm
from nfflax.weights.adapt import adapted_spec
from nfflax.weights.errors import WeightsError
from nfflax.weights.haiku_pickle import read_haiku_pickle
from nfflax.weights.hub_folder import read_hub_folder
from nfflax.weights.naming import Entry

Format = Literal["deepmind", "timm", "nfflax"]

SPEC, CLASS_NAMES = "nfflax_spec", "nfflax_class_names"
"""Metadata of our safetensors files, whatever the names in them: both as JSON."""

# The presets that a file of each format can be of, the likeliest first. DeepMind released no
# others; timm's dm_nfnet_* hold DeepMind's numbers, so the official spec is as right for them.
_PRESETS = {
    "deepmind": ("nfnet_f?", "timm_dm_nfnet_f?"),
    "timm": ("timm_*", "nfnet_f?"),
    "nfflax": ("*",),
}
# Where the outputs of the classifier and the channels of the image are to be read.
_CLASSIFIER = {
    "deepmind": (re.compile(r"[^/]+/~/linear/w"), 1),
    "timm": (re.compile(r"head\.fc\.weight"), 0),
    "nfflax": (re.compile(r"classifier\.kernel"), 1),
}
_FIRST_CONV = {
    "deepmind": (re.compile(r"[^/]+/~/(stem_conv0|initial_conv)/w"), 2),
    "timm": (re.compile(r"stem\.conv1?\.weight"), 1),
    "nfflax": (re.compile(r"stem\.convs\.0\.kernel"), 2),
}
_STATISTICS = (".mean", ".var")
_TORCH_BEFORE_ZIP = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"  # its magic number


@dataclass(frozen=True)
class Foreign:
    """Weights under the names of some format, and what is known of them."""

    source: str
    format: Format
    arrays: Mapping[str, np.ndarray]
    """By their names in the format; DeepMind's are `module/parameter`."""
    specs: tuple[Spec, ...] = ()
    """The networks that they can be of, the likeliest first, with their classes and channels."""
    is_known: bool = False
    """Whether they are certainly of one of `specs`, and not of another network with its shapes."""
    class_names: tuple[str, ...] = ()
    """In the order of the outputs; empty where they are not known."""

    @property
    def num_classes(self) -> int:
        """Outputs of the classifier; 0 where there is none."""
        return _length(self.arrays, *_CLASSIFIER[self.format]) or 0

    @property
    def in_channels(self) -> int:
        """Channels of the image."""
        return _length(self.arrays, *_FIRST_CONV[self.format]) or 3

    def own(self, spec: Spec) -> Spec:
        """A network with the classes and channels of these weights."""
        return adapted_spec(spec, num_classes=self.num_classes, in_channels=self.in_channels)

    def problems(self, spec: Spec) -> list[str]:
        """Every name and shape that is another one in `spec`'s network."""
        network = abstract_network(spec)
        try:
            by_name = {entry.ours: entry for entry in self.entries(network)}
        except WeightsError as error:
            return list(error.problems)
        return naming.misfits(leaves_of(network), by_name, self.arrays)

    def values(self, network: NFNet) -> dict[naming.Path, np.ndarray]:
        """The arrays by their paths in a network without arrays; raises WeightsError."""
        entries = self.entries(network)
        return naming.read_entries(leaves_of(network), entries, self.arrays, self.source)

    def entries(self, network: NFNet) -> list[Entry]:
        """Our names of the network's arrays with those of these weights."""
        if self.format == "deepmind":
            root = deepmind.root_of(self.arrays, naming.param_shapes(network))
            return deepmind.haiku_entries(naming.param_shapes(network), root)
        return format_entries(self.format, network)


def format_entries(form: Format, network: NFNet) -> list[Entry]:
    """The names of a network's arrays in a format; WeightsError where it has none for some."""
    if form == "nfflax":
        leaves = leaves_of(network).items()
        names = [name for path, leaf in leaves for name, _ in naming.block_names(path, leaf.shape)]
        return [Entry(name, name) for name in names]
    if form == "timm":
        return timm.network_entries(network)
    names = list(naming.param_shapes(network))
    return deepmind.haiku_entries(names, deepmind.haiku_class(names))


def read_foreign(path: str | os.PathLike[str], known: Spec | None = None) -> Foreign:
    """The weights in a local file or Hugging Face folder; raises WeightsError.

    `known` is the network that the place they come from says they are of.
    """
    place, source = Path(path), os.fspath(path)
    if place.is_dir():
        return _folder(place)
    metadata: Mapping[str, str] = {}
    if _is_torch(place) or timm.is_safetensors(place):
        arrays, metadata = timm.read_state_dict(place)
        form: Format = "nfflax" if any(name.endswith(".kernel") for name in arrays) else "timm"
    else:
        arrays, form = deepmind.flat(read_haiku_pickle(place)), "deepmind"
    found = Foreign(source, form, arrays)
    said = _spec_of(source, metadata) if SPEC in metadata else known
    if said is not None:
        specs = tuple(found.own(spec) for spec in (said, *_twins(said.name)))
        return Foreign(source, form, arrays, specs, True, _names_of(source, metadata))
    specs = tuple(_fitting(found))
    return Foreign(source, form, arrays, specs, is_known=form == "deepmind" and bool(specs))


def is_hub_folder(path: Path) -> bool:
    """Whether a folder has Hugging Face's layout."""
    return (path / "config.json").is_file()


def abstract_network(spec: Spec) -> NFNet:
    """A spec's network with shapes in place of arrays."""
    graph, state = _abstract(plan(spec))
    # Without the shardings that a mesh around the first caller gives.
    bare = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
    return nnx.merge(graph, bare)


@functools.lru_cache(maxsize=8)
def _abstract(compiled: Plan) -> tuple[nnx.GraphDef, nnx.State]:
    """Tracing a network takes a second, and opening one looks at it several times."""
    return nnx.split(nnx.eval_shape(lambda: NFNet(compiled, rngs=nnx.Rngs(0))))


def leaves_of(network: NFNet) -> dict[naming.Path, nnx.Variable]:
    """The parameters and BatchNorm's statistics of a network, by path."""
    state = nnx.state(network, nnx.Any(naming.PARAMS, nnx.BatchStat))
    return dict(nnx.to_flat_state(state))


def _folder(place: Path) -> Foreign:
    held = read_hub_folder(place)
    specs = (held.spec, *_twins(held.preset))
    return Foreign(os.fspath(place), held.layout, held.arrays, specs, True, held.class_names)


def _twins(preset: str) -> list[Spec]:
    """The official spec of timm's dm_nfnet_*, which have DeepMind's numbers, and the reverse."""
    if match := re.fullmatch(r"(timm_dm_)?(nfnet_f[0-6])", preset):
        return [load_spec(match[2] if match[1] else f"timm_dm_{preset}")]
    return []


def _is_torch(place: Path) -> bool:
    """Whether torch.save wrote a file, as far as its beginning tells."""
    try:
        with open(place, "rb") as file:
            head = file.read(len(_TORCH_BEFORE_ZIP))
    except OSError as error:
        problem = f"The file cannot be read: {error.strerror or error}."
        raise WeightsError(os.fspath(place), [problem]) from None
    return head.startswith(b"PK\x03\x04") or head == _TORCH_BEFORE_ZIP


def _spec_of(source: str, metadata: Mapping[str, str]) -> Spec:
    """The network that one of our files says it is of."""
    try:
        said = json.loads(metadata[SPEC])
        # Of a stranger's spec no key may lead to a file of ours.
        if not isinstance(said, dict) or not said.keys().isdisjoint(NOT_FOR_DOCUMENTS):
            raise ValueError("it must be resolved, as nfflax writes it")
        return load_spec(said)
    except (SpecError, ValueError, RecursionError) as error:
        raise WeightsError(source, [f"Its metadata {SPEC!r} is no spec: {error!s:.500}"]) from None


def _names_of(source: str, metadata: Mapping[str, str]) -> tuple[str, ...]:
    try:
        names = json.loads(metadata.get(CLASS_NAMES, "[]"))
    except ValueError:
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise WeightsError(source, [f"Its metadata {CLASS_NAMES!r} is no list of names."])
    return tuple(names)


def _fitting(found: Foreign) -> Iterator[Spec]:
    """The presets with just these names and shapes. Counting first leaves few to look at."""
    sizes = {name: array.size for name, array in found.arrays.items()}
    count = sum(size for name, size in sizes.items() if not name.endswith(_STATISTICS))
    for pattern in _PRESETS[found.format]:
        for name in list_specs(pattern):
            with contextlib.suppress(SpecError, WeightsError):  # no network has such ends
                spec = found.own(load_spec(name))
                if plan(spec).params == count and not found.problems(spec):
                    yield spec


def _length(arrays: Mapping[str, np.ndarray], name: re.Pattern[str], axis: int) -> int | None:
    """The length of one axis of the array whose name matches."""
    for key, array in arrays.items():
        if name.fullmatch(key) and axis < array.ndim:
            return array.shape[axis]
    return None
