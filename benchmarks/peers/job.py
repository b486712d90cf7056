"""What a contestant is asked to do, and what it says about itself: the messages between processes.

Both sides read this file, in whatever environment they are: standard library only.
"""

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

What = Literal["step", "forward"]
CLASSES = 1000


@dataclass(frozen=True)
class Job:
    """A network and what to time of it. A step is forward, backward and update."""

    what: What
    network: str
    """A preset of nfflax; a peer knows what it calls that network itself."""
    pixels: int
    batch: int
    dtype: Literal["float32", "bfloat16"]
    """Of the computation; parameters are float32."""
    device: Literal["cpu", "cuda"]
    source: str = ""
    """The folder of the peer's source code, where it is not installed."""
    options: dict[str, Any] = field(default_factory=dict)
    """How this contestant differs from others of the same program."""

    @classmethod
    def read(cls, text: str) -> "Job":
        """The job that `write` made text of."""
        return cls(**json.loads(text))

    def write(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Ready:
    """What a contestant says once it has made a step: from now on it does as many as it is told."""

    compile_wall: float
    """Seconds until there was a program to run; 0 where nothing is compiled."""
    compile_cpu: float
    step_wall: float
    """Seconds of one step, roughly: the second, the first one that has nothing left to set up."""
    memory: int
    """The most bytes that were in use while it ran: of the process, or on the GPU."""
    params: int
    macs: float
    """Multiply-adds of one image's forward pass."""
    device: str
    versions: dict[str, str]
