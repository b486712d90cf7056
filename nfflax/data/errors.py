"""What is wrong with data: mistakes in what was asked for, and images that cannot be used."""

from typing import ClassVar

from nfflax.spec.errors import SpecError


class DataError(SpecError):
    """Data that cannot be used. `problems` lists every mistake found, as a SpecError does."""

    subject: ClassVar[str] = "data"


class ImageError(ValueError):
    """One image that cannot be used. `reason` says why, `name` which one, where that is known."""

    def __init__(self, reason: str, name: str = ""):
        super().__init__(reason, name)
        self.reason, self.name = reason, name

    def __str__(self) -> str:
        return f"{self.name} {self.reason}".lstrip()
