"""Weights that were trained before: found, compared with the network asked for, put in place.

They come from a run's folder, from one of its checkpoints, or from a file that DeepMind released.
What counts is what the weights mean: with another activation the same shapes are another network.
"""

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nfflax.nn.builder import build
from nfflax.nn.net import NFNet
from nfflax.optim.roles import dotted, leaves_by_path, map_by_path
from nfflax.spec.errors import NOT_GIVEN, Problem, SpecError, nearest
from nfflax.spec.files import Origin
from nfflax.spec.load import load_run, load_spec
from nfflax.spec.plan import plan
from nfflax.spec.presets import list_specs
from nfflax.spec.run import Run
from nfflax.spec.schema import Spec
from nfflax.train.checkpoint import FOLDER as CHECKPOINTS
from nfflax.train.checkpoint import load_weights
from nfflax.train.errors import CheckpointError
from nfflax.train.mesh import param_shardings
from nfflax.weights import load_deepmind
from nfflax.weights.errors import WeightsError
from nfflax.weights.haiku_pickle import read_haiku_pickle

if TYPE_CHECKING:  # who only loads a network needs no data pipeline
    from nfflax.train.program import Program
    from nfflax.train.state import State

# Keys of a spec that leave the meaning of weights as it is: what only training does, what only
# initial values are, and how large images are.
_FREE = re.compile(
    r"regularization\..*|resolution\..*|head\.(dropout|init)|norm\.momentum"
    r"|block\.last_gain|preprocess\.(interpolation|crop|crop_fraction|crop_margin)"
)
_CLASSES = "head.num_classes"


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """Trained weights, and what is known of them."""

    path: str
    """Where they were found."""
    spec: Spec
    """The network that they belong to."""
    spec_source: str
    """What a run's `model.spec` calls it: a file or a preset; empty where there is neither."""
    load: Callable[[NFNet], None]
    """Sets them on a network without arrays, where its abstract arrays are to lie."""
    run: Run | None = None
    """The run that trained them; None for a released file."""
    step: int | None = None
    """Updates made by then; None for a released file."""
    class_names: tuple[str, ...] = ()
    """In the order of the outputs; empty where they are not known."""
    notes: tuple[str, ...] = ()
    """What their user should know."""

    def __str__(self) -> str:
        return self.path if self.step is None else f"{self.path}, step {self.step:,}"

    def arrays(self, mesh: Mesh | None = None) -> tuple[Any, Any]:
        """Parameters and BatchNorm's statistics, as a training state has them.

        On a mesh every device gets its part of them straight from the host; without one they lie on
        the default device, free to move.
        """
        model = nnx.eval_shape(lambda: build(self.spec, rngs=nnx.Rngs(0)))
        if mesh is not None:
            _on(mesh, model)
        self.load(model)
        _, params, stats = nnx.split(model, nnx.Param, ...)
        return nnx.to_pure_dict(params), nnx.to_pure_dict(stats)


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
    """The weights that a run starts from; raises CheckpointError where they do not fit it."""
    path, name = run.model.weights, f"run {run.name}"
    try:
        return open_weights(path, run.spec, Origin(name, prefix="model.set."))
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

    `origin` is where the keys of `spec` were said.
    """
    theirs, ours = _by_key(found.spec), _by_key(spec)
    free = [key for key in ours if _FREE.fullmatch(key) or (key == _CLASSES and not same_classes)]
    problems = [
        origin.problem(key, f"is {_shown(theirs[key])} in {found.path}", value)
        for key, value in ours.items()
        if theirs[key] != value and key not in free
    ]
    if not problems:
        return
    keys = "1 key" if len(problems) == 1 else f"{len(problems)} keys"
    message = f"is another network than the one in {found.path}: they differ in {keys}"
    key, value = ("model.spec", spec.name) if origin.prefix else ("", NOT_GIVEN)
    first = Problem(origin.file, key, message, value, nearest=found.spec_source)
    raise CheckpointError([first, *problems])


def open_weights(path: str, spec: Spec | None = None, origin: Origin | None = None) -> Pretrained:
    """What lies at a path, none of it on a device yet.

    `spec`, said in `origin`, is the network to see in it, up to the number of classes. Only a file
    in DeepMind's format that is none of the released ones needs it; where the network is known,
    it must be the same.
    """
    place = Path(os.path.expanduser(path))
    if os.path.isdir(place):
        found = _checkpoint(path, place)
    elif os.path.isfile(place):
        found = _released(path, place, spec)
    else:
        message, near = "no such file or folder", _nearest_run(place)
        allowed = "a run's folder, one of its checkpoints, or a file that DeepMind released"
        raise CheckpointError([Problem(path, "", message, allowed=allowed, nearest=near)])
    if spec is None:
        return found
    require_same(found, spec, origin or Origin(f"network {spec.name}"))
    classes = found.spec.head.num_classes
    return dataclasses.replace(found, spec=load_spec(spec, {_CLASSES: classes}))


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
        run = load_run(weights.about["run"])
        class_names = tuple(weights.about["class_names"])
    except KeyError as error:
        message = f"does not say {error}, as the checkpoints of a training run do"
        raise CheckpointError([Problem(path, "", message)]) from None
    except SpecError as error:
        message = "was trained by a run that cannot be understood here"
        raise CheckpointError([Problem(path, "", message), *error.problems]) from None
    values = leaves_by_path(weights.params) | leaves_by_path(weights.stats)
    files = (place / "spec.json", place.parent.parent / "spec.json")
    return Pretrained(
        path=path,
        spec=run.spec,
        spec_source=next((str(file) for file in files if file.is_file()), ""),
        load=lambda model: _set(model, values, path),
        run=run,
        step=weights.step,
        class_names=class_names,
        notes=tuple(
            f"the checkpoint of step {step} is damaged ({reason}); it is left out"
            for step, reason in weights.damaged
        ),
    )


# --- DeepMind's files -------------------------------------------------------------------------


def _released(path: str, place: Path, spec: Spec | None) -> Pretrained:
    try:
        tree = read_haiku_pickle(place)
    except WeightsError as error:
        raise _as_checkpoint_error(path, error) from None
    classes = _classes_of(tree)
    count = sum(array.size for module in tree.values() for array in module.values())
    known = _released_network(count, classes)
    network = known or spec
    if network is None:
        message = f"holds {count:,} weights, as none of the released networks does"
        raise CheckpointError([Problem(path, "", message, allowed="--spec NAME|FILE says which")])

    def load(model: NFNet) -> None:
        try:
            load_deepmind(model, tree)
        except WeightsError as error:
            raise _as_checkpoint_error(path, error) from None

    own = load_spec(network, {_CLASSES: classes})
    return Pretrained(path=path, spec=own, spec_source=known or "", load=load)


def _released_network(count: int, classes: int) -> str | None:
    """Which of the released networks has so many weights: no two have the same number."""
    for name in list_specs("nfnet_f?"):
        if plan(load_spec(name, {_CLASSES: classes})).params == count:
            return name
    return None


def _classes_of(tree: Mapping[str, Mapping[str, np.ndarray]]) -> int:
    """Outputs of the classifier in a Haiku tree."""
    for module, arrays in tree.items():
        if re.fullmatch(r"[^/]+/~/linear", module) and "b" in arrays:
            return arrays["b"].size
    return 0


def _as_checkpoint_error(path: str, error: WeightsError) -> CheckpointError:
    return CheckpointError([Problem(path, "", problem) for problem in error.problems])


# --- networks without arrays ------------------------------------------------------------------


def _on(mesh: Mesh, model: NFNet) -> None:
    """Say where on a mesh the arrays of a network without arrays are to lie."""
    places = leaves_by_path(param_shardings(model, mesh))
    whole = NamedSharding(mesh, PartitionSpec())

    def placed(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=places.get(path, whole))

    _replace(model, placed)


def _set(model: NFNet, values: Mapping[tuple[Any, ...], np.ndarray], source: str) -> None:
    """Give a network without arrays its arrays, each where it is to lie."""
    problems = []

    def value_of(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> Any:
        value = values.get(path)
        if value is None or (value.shape, value.dtype) != (leaf.shape, leaf.dtype):
            there = "missing" if value is None else f"{value.dtype} {list(value.shape)}"
            message = f"is {there}; the network has {leaf.dtype} {list(leaf.shape)}"
            problems.append(Problem(source, dotted(path), message))
            return leaf
        if leaf.sharding is None:
            return jnp.asarray(value)
        # Every process has it whole; device_put would send it to all of them to compare.
        return jax.make_array_from_callback(value.shape, leaf.sharding, lambda part: value[part])

    _replace(model, value_of)
    if problems:
        raise CheckpointError(problems)


def _replace(model: NFNet, function: Callable[..., Any]) -> None:
    """Put `function(path, leaf)` in the place of every leaf."""
    state = nnx.state(model)
    nnx.replace_by_pure_dict(state, map_by_path(function, nnx.to_pure_dict(state)))
    nnx.update(model, state)


# --- specs key by key -------------------------------------------------------------------------


def _by_key(spec: Spec) -> dict[str, Any]:
    """All values of a spec by dotted key, but what it is called."""
    return {
        f"{table}.{key}": value
        for table, values in spec.model_dump(mode="json").items()
        if isinstance(values, dict)
        for key, value in values.items()
    }


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
