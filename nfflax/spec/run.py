"""What a run file may say: how a network is trained, table by table, and the numbers that follow.

Defaults are the ImageNet recipe of the NFNets (arXiv:2102.06171; deepmind-research,
`nfnets/experiment_nfnets.py`). Rules that join several keys are in run_check.py.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BeforeValidator, ConfigDict, Field

from nfflax.spec.augment import Augment
from nfflax.spec.base import Document, Table, as_tuple
from nfflax.spec.data import Data
from nfflax.spec.errors import Problem, SpecError
from nfflax.spec.execution import Checkpoint, Eval, Log, Mesh
from nfflax.spec.schema import MAX_DEPTH, Positive, Rate, Spec

if TYPE_CHECKING:
    from nfflax.spec.check import Finding

N = TypeVar("N", int, float)

# Limits far beyond any run, so that a mistyped digit is an error.
MAX_BATCH, MAX_STEPS, MAX_EPOCHS, MAX_IMAGES = 1 << 24, 10**9, 100_000, 10**12

Amount = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(gt=0, le=1)]
Text = Annotated[str, Field(min_length=1, max_length=1000)]
Axes = Annotated[tuple[int, ...], BeforeValidator(as_tuple)]


def _as_in_files(schema: dict[str, Any]) -> None:
    """The JSON Schema of `[model]` in a file, where a network is named, and changed by `set`."""
    properties = schema["properties"]
    network = {"$ref": properties["spec"].pop("$ref")}
    properties["spec"] |= {"anyOf": [{"type": "string"}, network]}
    changes = "Keys of the model spec that this run changes, e.g. head.num_classes = 10."
    properties["set"] = network | {"description": changes}


class Model(Table):
    """The network, and how it is built. In a file, `model.set` changes keys of its spec."""

    model_config = ConfigDict(json_schema_extra=_as_in_files)
    file_keys: ClassVar = ("set",)

    spec: Spec = Field(examples=["nfnet_f0", "my_net.toml"])
    """A model preset, or a path relative to this file; a resolved run holds the whole spec."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Compute type. Parameters, their updates, logits and losses are float32 in any case."""
    remat: Literal["none", "block", "conv"] = "none"
    """What the backward pass recomputes to save memory: all but block inputs ("block"), all but
    convolution outputs ("conv"), or nothing."""
    unroll: Annotated[int, Field(ge=1, le=MAX_DEPTH)] = 1
    """How many of a stage's equal blocks the compiler sees at once; 1 compiles fastest."""
    weights: Annotated[str, Field(max_length=1000)] = ""
    """Weights to start from: a run's folder, one of its checkpoints, a file of weights, https://...,
    hf://owner/repo, or a preset with published weights. A classifier for other classes starts anew,
    a first convolution for other channels is adapted; everything else must fit."""


class Train(Table):
    """How much is trained, and in what portions."""

    either: ClassVar = (("steps", "epochs"),)

    batch_size: Annotated[int, Field(ge=1, le=MAX_BATCH)] = 4096
    """Images per step, over all devices and hosts."""
    epochs: Annotated[float, Field(ge=0, le=MAX_EPOCHS)] = 360.0
    """Length of the run in passes over the images."""
    steps: Annotated[int, Field(ge=0, le=MAX_STEPS)] = 0
    """Length of the run in steps, in place of epochs; 0: it is given in epochs."""
    examples: Annotated[int, Field(ge=0, le=MAX_IMAGES)] = 0
    """Images per epoch; 0: as many as the data source has."""
    accumulate: Annotated[int, Field(ge=1, le=MAX_BATCH)] = 1
    """Microbatches that a step works through one after the other; they must divide the batch."""
    seed: Annotated[int, Field(ge=0, le=(1 << 32) - 1)] = 0
    """Of initial weights, data order, augmentation and dropout."""

    @property
    def steps_per_epoch(self) -> float | None:
        """Steps in one pass over the images; None while their number is not known."""
        return self.examples / self.batch_size if self.examples else None

    @property
    def length(self) -> int | None:
        """Steps of the run; None while they are not known."""
        if self.steps or not self.epochs:
            return self.steps
        return int(self.epochs * self.examples // self.batch_size) if self.examples else None


class Loss(Table):
    """Softmax cross entropy."""

    label_smoothing: Rate = 0.1
    """Share of every label that is spread over all classes."""


class Rule(Table):
    """How the parameters that `match` finds are treated; the last rule that matches wins."""

    match: Text = Field(examples=["head.*"])
    """Pattern of dotted parameter paths, e.g. "head.*" or "*.bias"."""
    decay: bool | None = None
    """Whether weight decay applies."""
    clip: bool | None = None
    """Whether adaptive gradient clipping applies."""
    learning_rate: Positive | None = None
    """Factor of the schedule's learning rate."""
    unit_axes: Axes | None = None
    """Axes that the norm of one unit reduces in adaptive gradient clipping."""


class Optimizer(Table):
    """How gradients become updates, and which parameters take part."""

    kind: Literal["sgd", "adamw", "lars", "lion"] = "sgd"
    """Nesterov SGD is what the papers use; arXiv:2102.06171 found LARS worse, and others found
    AdamW to diverge."""
    momentum: Rate = 0.9
    """Of SGD and LARS."""
    nesterov: bool = True
    """Of SGD and LARS: look ahead along the momentum."""
    weight_decay: Amount = 2e-5
    """Added to the clipped gradient as a multiple of the weight; gains and biases never decay."""
    b1: Rate = 0.9
    """AdamW, Lion: decay of the gradient's average."""
    b2: Rate = 0.999
    """AdamW, Lion: decay of the squared gradient's (AdamW) or the momentum's (Lion) average."""
    epsilon: Positive = 1e-8
    """AdamW: added to the root of the squared gradient's average."""
    trust_coefficient: Positive = 0.001
    """LARS: a layer's update as a multiple of its weights' norm."""
    layer_decay: Share = 1.0
    """Each stage below the head learns slower by this factor; 1: all learn alike."""
    freeze: Annotated[tuple[Text, ...], BeforeValidator(as_tuple)] = ()
    """Parts that do not learn: beginnings of dotted parameter paths, e.g. "stem", "stages.0"."""
    rules: Annotated[tuple[Rule, ...], BeforeValidator(as_tuple)] = ()
    """Treatment of parameters that carry no role, and exceptions for those that do."""


class Agc(Table):
    """Adaptive gradient clipping (arXiv:2102.06171, section 4)."""

    clipping: Amount = 0.01
    """Largest ratio of a unit's gradient norm to its weight norm; 0: no clipping."""
    eps: Positive = 1e-3
    """Least weight norm that is assumed, so that units which start at zero can learn."""


class Sam(Table):
    """Sharpness-aware minimisation (arXiv:2010.01412; arXiv:2102.06171, section 6.1)."""

    rho: Amount = 0.0
    """Length of the ascent step; 0: no ascent. The papers use 0.05."""
    fraction: Share = 0.2
    """Share of the batch that the ascent gradient is computed on."""
    synchronize: bool = False
    """Average the ascent gradient over devices. The paper does not, and finds that better."""


class Schedule(Table):
    """The learning rate over the run: a linear warm-up, then a descent."""

    either: ClassVar = (("warmup_steps", "warmup_epochs"),)

    kind: Literal["cosine", "exponential", "constant"] = "cosine"
    """What follows the warm-up."""
    learning_rate: Positive = 0.1
    """Peak rate for a batch of reference_batch images."""
    reference_batch: Annotated[int, Field(ge=0, le=MAX_BATCH)] = 256
    """The peak is multiplied by train.batch_size / reference_batch; 0: it is taken as it stands."""
    warmup_epochs: Annotated[float, Field(ge=0, le=MAX_EPOCHS)] = 5.0
    """Length of the warm-up in epochs."""
    warmup_steps: Annotated[float, Field(ge=0, le=MAX_STEPS)] = 0.0
    """Length of the warm-up in steps, in place of epochs; 0: it is given in epochs."""
    start: Amount = 0.0
    """Rate at step 0, where there is a warm-up."""
    end: Amount = 0.0
    """"cosine": the rate at the last step."""
    decay_factor: Share = 0.97
    """"exponential": what the rate is multiplied by, time after time."""
    decay_epochs: Annotated[float, Field(gt=0, le=MAX_EPOCHS)] = 2.4
    """"exponential": epochs from one multiplication to the next."""

    def warmup(self, train: Train) -> float | None:
        """Steps of the warm-up; None while they are not known."""
        if self.warmup_steps or not self.warmup_epochs:
            return self.warmup_steps
        return train.steps_per_epoch and self.warmup_epochs * train.steps_per_epoch

    def peak(self, train: Train) -> float:
        """The rate at the end of the warm-up."""
        if not self.reference_batch:
            return self.learning_rate
        return self.learning_rate * train.batch_size / self.reference_batch


class Ema(Table):
    """The moving average of the parameters, which is what gets evaluated."""

    decay: Rate = 0.99999
    """Share of the average that stays at each step; 0: no average is kept."""
    warmup: bool = True
    """Use min(decay, (1 + t) / (10 + t)) at step t (TensorFlow 1's rule)."""


class Guard(Table):
    """What happens when the loss explodes: the step is skipped, and in the end the run stops."""

    spike: Amount = 100.0
    """A gradient norm this many times its running average counts as exploding; 0: only infinities
    and NaN do."""
    patience: Annotated[int, Field(ge=1, le=MAX_STEPS)] = 10
    """Steps skipped in a row before the run stops."""


class Run(Document):
    """One training run, fully resolved, network included. Hashable."""

    noun: ClassVar = "run"
    presets: ClassVar = "runs"

    model: Model
    data: Data = Data()
    augment: Augment = Augment()
    train: Train = Train()
    loss: Loss = Loss()
    optimizer: Optimizer = Optimizer()
    agc: Agc = Agc()
    sam: Sam = Sam()
    schedule: Schedule = Schedule()
    ema: Ema = Ema()
    guard: Guard = Guard()
    eval: Eval = Eval()
    mesh: Mesh = Mesh()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()

    @property
    def spec(self) -> Spec:
        """The network."""
        return self.model.spec

    @property
    def steps_per_epoch(self) -> float:
        """Steps in one pass over the images, rarely a whole number."""
        return self._known(self.train.steps_per_epoch)

    @property
    def steps(self) -> int:
        """Length of the run: whole steps only, as in the official code."""
        return self._known(self.train.length)

    @property
    def warmup(self) -> float:
        """Length of the warm-up in steps, fractions included."""
        return self._known(self.schedule.warmup(self.train))

    @property
    def eval_every(self) -> int:
        """Steps between two evaluations; 0: only at the end."""
        return self._interval(self.eval)

    @property
    def checkpoint_every(self) -> int:
        """Steps between two checkpoints; 0: only at the end."""
        return self._interval(self.checkpoint)

    def _interval(self, table: Eval | Checkpoint) -> int:
        if table.every_steps or not table.every_epochs:
            return table.every_steps
        return max(1, round(table.every_epochs * self.steps_per_epoch))

    @property
    def needs_examples(self) -> bool:
        """Whether the recipe is given in epochs, and nothing here says how long they are."""
        lengths = self.train.length, self.schedule.warmup(self.train)
        is_open = None in lengths or self.schedule.kind == "exponential"
        return is_open and not self.train.examples

    @property
    def peak_learning_rate(self) -> float:
        """The rate at the end of the warm-up, for this run's batch."""
        return self.schedule.peak(self.train)

    def _known(self, value: N | None) -> N:
        """The value, which is None for want of `train.examples`."""
        if value is None:
            message = "how many images make an epoch is not known: say so, or count in steps"
            problem = Problem(f"run {self.name}", "train.examples", message, 0, "1 or more")
            raise SpecError([problem])
        return value

    @classmethod
    def problems_between(cls, tables: Mapping[str, Any]) -> "list[Finding]":
        from nfflax.spec.run_check import problems_between  # it reads the tables defined here

        return problems_between(tables)
