"""What can go wrong with a run, apart from its spec and its data."""

from nfflax.spec.errors import SpecError


class CheckpointError(SpecError):
    """A run's folder or a checkpoint that cannot be used as asked."""

    subject = "checkpoint"


class MeshError(SpecError):
    """Devices that cannot be arranged as a run asks."""

    subject = "mesh"


class TrainError(RuntimeError):
    """A run that cannot go on, through no fault of its spec: a full disk, say."""
