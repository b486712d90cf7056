"""Tables of a run file on how it is carried out: evaluation, devices, checkpoints, logs.

Nothing here changes what is learnt, so a run may be resumed with other values.
"""

from typing import Annotated, ClassVar

from pydantic import Field

from nfflax.spec.base import Table

Count = Annotated[int, Field(ge=0, le=1_000_000_000)]
Epochs = Annotated[float, Field(ge=0, le=100_000)]
Devices = Annotated[int, Field(ge=1, le=1 << 20)]


class Eval(Table):
    """How often the network is evaluated; after the last step it always is."""

    either: ClassVar = (("every_steps", "every_epochs"),)

    every_epochs: Epochs = 1.0
    """Epochs between two evaluations; 0: only at the end."""
    every_steps: Count = 0
    """Steps between two evaluations, in place of epochs; 0: it is given in epochs."""
    batch_size: Count = 0
    """Images per evaluation step, over all devices and hosts; 0: as in training."""


class Mesh(Table):
    """How the devices are arranged: the product of all axes is their number."""

    data: Annotated[int, Field(ge=0, le=1 << 20)] = 0
    """Ways to split the batch, parameters repeated; 0: all devices that the other axes leave."""
    fsdp: Devices = 1
    """Ways to split the batch with the parameters split too, by output channel."""
    tensor: Devices = 1
    """Ways to split the channels inside a block, groups kept whole."""
    spatial: Devices = 1
    """Ways to split images by height, for images too large for one device."""
    devices: Count = 0
    """How many devices there must be, or the run does not start; 0: as many as there are."""


class Checkpoint(Table):
    """What is kept on disk; after the last step and when told to stop, a run always saves."""

    either: ClassVar = (("every_steps", "every_epochs"),)

    every_epochs: Epochs = 0.0
    """Epochs between two checkpoints, in place of steps; 0: it is given in steps."""
    every_steps: Count = 500
    """Steps between two checkpoints. A crash costs at most the steps since the last one, and while
    that is still being written the interval before."""
    keep: Annotated[int, Field(ge=1, le=1_000_000)] = 2
    """The newest checkpoints that are kept."""
    keep_best: Annotated[int, Field(ge=0, le=1_000_000)] = 1
    """Those with the best top-1 accuracy, which are kept besides. Where it is not 0, every
    evaluation that beats all before it saves."""


class Log(Table):
    """What is written down of a run's progress."""

    every: Annotated[int, Field(ge=1, le=1_000_000_000)] = 10
    """Steps between two lines of metrics."""
    tensorboard: bool = True
    """Write TensorBoard's files, where tensorboardX is installed."""
    wandb: Annotated[str, Field(max_length=1000)] = ""
    """Project at Weights & Biases that metrics go to (extra "wandb"); none: they do not."""
