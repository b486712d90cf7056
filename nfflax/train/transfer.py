"""Weights that were trained before: found, compared with the network asked for, put in place.

They come from a run's folder, from one of its checkpoints, or from elsewhere: weights/places.py has
the grammar, weights/foreign.py the formats. What counts is what the weights mean: with another
activation the same shapes are another network.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from nfflax.nn.net import NFNet
from nfflax.optim.roles import leaves_by_path
from nfflax.spec.errors import NOT_GIVEN, Problem, SpecError, nearest
from nfflax.spec.files import Origin
from nfflax.spec.load import load_run, load_spec
from nfflax.spec.presets import list_specs
from nfflax.spec.run import Run
from nfflax.spec.schema import Spec
from nfflax.train.checkpoint import FOLDER as CHECKPOINTS
from nfflax.train.checkpoint import load_weights
from nfflax.train.downloads import fetched
from nfflax.train.errors import CheckpointError
from nfflax.train.placing import on_mesh, set_arrays
from nfflax.weights.adapt import CHANNELS, CLASSES, Values, adapted_spec, with_channels
from nfflax.weights.errors import WeightsError
from nfflax.weights.foreign import Foreign, abstract_network, is_hub_folder, read_foreign
from nfflax.weights.meaning import OF_CHANNELS, differing
from nfflax.weights.places import Fetched
from nfflax.weights.published import imagenet_classes, published

if TYPE_CHECKING:  # who only loads a network needs no data pipeline
    from nfflax.train.program import Program
    from nfflax.train.state import State


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """Trained weights, and what is known of them."""

    path: str
    """Where they were found."""
    spec: Spec
    """The network that they belong to."""
    spec_source: str
    """What a run's `model.spec` calls it: a file or a preset; empty where there is neither."""
    values: Callable[[NFNet], Values]
    """Arrays on the host, by the paths that they have in this network without arrays."""
    run: Run | None = None
    """The run that trained them; None for what no run of nfflax did."""
    step: int | None = None
    """Updates made by then; None where that is not known."""
    class_names: tuple[str, ...] = ()
    """In the order of the outputs; empty where they are not known."""
    notes: tuple[str, ...] = ()
    """What their user should know."""
    foreign: Foreign | None = None
    """The arrays as they were read; None for a checkpoint."""
    local: Path | None = None
    """Where their file or folder is on this machine; None for a checkpoint."""

    def __str__(self) -> str:
        return self.path if self.step is None else f"{self.path}, step {self.step:,}"

    def arrays(self, mesh: Mesh | None = None) -> tuple[Any, Any]:
        """Parameters and BatchNorm's statistics, as a training state has them.

        On a mesh every device gets its part of them straight from the host; without one they lie on
        the default device, free to move.
        """
        model = abstract_network(self.spec)
        if mesh is not None:
            on_mesh(mesh, model)
        set_arrays(model, self.values(model), self.path)
        _, params, stats = nnx.split(model, nnx.Param, ...)
        return nnx.to_pure_dict(params), nnx.to_pure_dict(stats)

    def seen_as(self, spec: Spec, origin: Origin) -> "Pretrained":
        """The same as `spec` has it, up to classes and channels; raises CheckpointError."""
        require_same(self, spec, origin)
        before = self.spec
        own = {CLASSES: before.head.num_classes, CHANNELS: before.stem.in_channels}
        own |= {key: getattr(before.preprocess, key.split(".")[1]) for key in OF_CHANNELS}
        return dataclasses.replace(self, spec=load_spec(spec, own))

    def with_channels(self, in_channels: int) -> "Pretrained":
        """The same for images of other channels (weights/adapt.py); raises CheckpointError."""
        before = self.spec
        if in_channels == before.stem.in_channels:
            return self
        try:
            spec = adapted_spec(before, in_channels=in_channels)
        except WeightsError as error:
            raise _as_checkpoint_error(self.path, error) from None

        def values(_: NFNet) -> Values:
            return with_channels(self.values(abstract_network(before)), before, in_channels)

        channels = f"{before.stem.in_channels} channels before, {in_channels} now"
        note = f"the first convolution is adapted to the images: {channels}"
        return dataclasses.replace(self, spec=spec, values=values, notes=(*self.notes, note))


def with_weights(state: "State", program: "Program") -> tuple["State", tuple[str, ...]]:
    """A fresh training state with the weights that the run starts from, and what to say about it.

    They become the parameters and their average; optimiser and step stay fresh. A classifier for
    another number of classes stays fresh too; any other difference is one CheckpointError.
    """
    run, found = program.run, starting_weights(program.run)
    params, stats = found.arrays(program.mesh)
    notes = [*found.notes, f"starting from {found}"]
    before, now = found.spec.head.num_classes, run.spec.head.num_classes
    if before != now:
        params = {key: value for key, value in params.items() if key != "classifier"}
        if now:
            params["classifier"] = state["params"]["classifier"]
        notes.append(f"the classifier starts anew: {before:,} classes before, {now:,} now")
    average = {"ema": _copied(params)} if "ema" in state else {}
    return {**state, "params": params, **average, "stats": stats}, tuple(notes)


def starting_weights(run: Run) -> Pretrained:
    """The weights that a run starts from; raises CheckpointError where they do not fit it.

    Their first convolution is for the images of the run.
    """
    path, name = run.model.weights, f"run {run.name}"
    try:
        found = open_weights(path, run.spec, Origin(name, prefix="model.set."))
        return found.with_channels(run.spec.stem.in_channels)
    except CheckpointError as error:
        whole = {"file": name, "key": "model.weights", "value": path}  # of the path itself
        problems = [
            dataclasses.replace(problem, **whole) if problem.file == path else problem
            for problem in error.problems
        ]
        raise CheckpointError(problems) from None


def _copied(params: Any) -> Any:
    """The same in other memory, as the train step uses up what it is given."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
    return jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=shardings)(params)


def require_same(
    found: Pretrained, spec: Spec, origin: Origin, *, same_classes: bool = False
) -> None:
    """Raise CheckpointError, with all differences, if weights mean something else in `spec`.

    Classes and channels are free, for they can be adapted; with `same_classes` they are not.
    `origin` is where the keys of `spec` were said.
    """
    others = differing(found.spec, spec, same_classes=same_classes)
    if not others:
        return
    theirs, ours = found.spec.values_by_key(), spec.values_by_key()
    problems = [
        origin.problem(key, f"is {_shown(theirs[key])} in {found.path}", ours[key])
        for key in others
    ]
    keys = "1 key" if len(problems) == 1 else f"{len(problems)} keys"
    message = f"is another network than the one in {found.path}: they differ in {keys}"
    key, value = ("model.spec", spec.name) if origin.prefix else ("", NOT_GIVEN)
    first = Problem(origin.file, key, message, value, nearest=found.spec_source)
    raise CheckpointError([first, *problems])


def open_weights(place: str, spec: Spec | None = None, origin: Origin | None = None) -> Pretrained:
    """What lies at a place (weights/places.py), none of it on a device yet.

    `spec`, said in `origin`, is the network to see in it, up to classes and channels, which stay
    those of the weights. Only a file that does not say its network, and whose shapes no preset has,
    needs it; where the network is known, it must be the same. In a run of several processes all
    call this together.
    """
    try:
        there = fetched(place)
    except WeightsError as error:
        near = _nearest_run(Path(os.path.expanduser(place)))
        raise _as_checkpoint_error(place, error, near) from None
    if there.path.is_dir() and not is_hub_folder(there.path):
        found = _checkpoint(place, there.path)
    else:
        found = _from_elsewhere(place, there, spec)
    return found if spec is None else found.seen_as(spec, origin or Origin(f"network {spec.name}"))


def _nearest_run(place: Path) -> str:
    """The run with the most similar name, beside the place or below runs/."""
    found = {}
    for parent in (place.parent, Path("runs")):
        with contextlib.suppress(OSError):
            found |= {f.name: str(f) for f in parent.iterdir() if (f / CHECKPOINTS).is_dir()}
    return found.get(nearest(place.name, found), "")


# --- a run's folder, or one of its checkpoints ------------------------------------------------


def _checkpoint(path: str, place: Path) -> Pretrained:
    weights = load_weights(place)
    try:
        # What `nfflax convert` has written knows no run.
        run = None if "spec" in weights.about else load_run(weights.about["run"])
        spec = load_spec(weights.about["spec"]) if run is None else run.spec
        class_names = tuple(weights.about["class_names"])
    except KeyError as error:
        message = f"does not say {error}, as the checkpoints of a training run do"
        raise CheckpointError([Problem(path, "", message)]) from None
    except SpecError as error:
        message = "is of a run or a network that cannot be understood here"
        raise CheckpointError([Problem(path, "", message), *error.problems]) from None
    values = leaves_by_path(weights.params) | leaves_by_path(weights.stats)
    files = (place / "spec.json", place.parent.parent / "spec.json")
    return Pretrained(
        path=path,
        spec=spec,
        spec_source=next((str(file) for file in files if file.is_file()), ""),
        values=lambda _: values,
        run=run,
        step=None if run is None else weights.step,
        class_names=class_names,
        notes=tuple(
            f"the checkpoint of step {step} is damaged ({reason}); it is left out"
            for step, reason in weights.damaged
        ),
    )


# --- files and folders from elsewhere ---------------------------------------------------------


def _from_elsewhere(place: str, there: Fetched, asked: Spec | None) -> Pretrained:
    known = load_spec(there.published.preset) if there.published else None
    try:
        foreign = read_foreign(there.path, known)
        spec, notes = _network_of(place, foreign, asked)
    except WeightsError as error:
        raise _as_checkpoint_error(place, error) from None

    def values(network: NFNet) -> Values:
        try:
            return foreign.values(network)
        except WeightsError as error:
            raise _as_checkpoint_error(place, error) from None

    names = foreign.class_names
    if not names and published(spec.name) and spec.head.num_classes == len(imagenet_classes()):
        names = imagenet_classes()
        if not there.published:
            notes += (f"its {len(names):,} classes are taken for ImageNet's",)
    return Pretrained(
        path=place,
        spec=spec,
        spec_source=spec.name if spec.name in list_specs() else "",
        values=values,
        class_names=names if len(names) == spec.head.num_classes else (),
        notes=(*there.notes, *notes),
        foreign=foreign,
        local=there.path,
    )


def _network_of(place: str, foreign: Foreign, asked: Spec | None) -> tuple[Spec, tuple[str, ...]]:
    """The network that weights are of, and what to say about that choice."""
    if asked is None:
        return _likeliest(place, foreign)
    nearest_spec = min(foreign.specs, key=lambda spec: len(differing(spec, asked)), default=None)
    others = [] if nearest_spec is None else differing(nearest_spec, asked)
    if nearest_spec is not None and (foreign.is_known or not others):
        return nearest_spec, ()
    own = foreign.own(asked)
    problems = foreign.problems(own)
    if nearest_spec is None:
        if problems:
            raise WeightsError(place, problems)
        return own, ()
    if problems:  # how the specs differ says more than hundreds of names
        return nearest_spec, ()
    # A variation with a preset's shapes: whose it is, only its user knows.
    keys = f"they differ in {', '.join(others)}"
    return own, (f"the weights fit {nearest_spec.name} as well as {asked.name}: {keys}",)


def _likeliest(place: str, foreign: Foreign) -> tuple[Spec, tuple[str, ...]]:
    if not foreign.specs:
        count = sum(array.size for array in foreign.arrays.values())
        message = f"holds {count:,} weights, as none of the presets that it could be of does"
        allowed = "--spec NAME|FILE (in Python: spec=) says which network it is"
        raise CheckpointError([Problem(place, "", message, allowed=allowed)])
    taken, *others = (spec.name for spec in foreign.specs)
    note = f"taken for {taken}; {' and '.join(others)} fits too, and --spec (spec=) chooses it"
    return foreign.specs[0], (note,) if others else ()


def _as_checkpoint_error(path: str, error: WeightsError, near: str = "") -> CheckpointError:
    return CheckpointError([Problem(path, "", text, nearest=near) for text in error.problems])


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
