"""The [augment] table of a run spec: what the device does to training images before the network."""

from typing import Annotated, Literal

from pydantic import Field

from nfflax.spec.base import Table


class Augment(Table):
    """MixUp, CutMix and RandAugment, by default as in the official code for NFNet-F0."""

    mixup: Annotated[float, Field(ge=0, le=1000)] = 0.2
    """MixUp's ratios are drawn from Beta(mixup, mixup); 0: no MixUp."""
    cutmix: bool = True
    """CutMix: on every other image of the batch, or without MixUp on all."""
    partners: Literal["fresh", "batch"] = "fresh"
    """What an image is mixed with: "fresh", an image of its own, so that a batch draws twice as
    many (official), or "batch", the next one of its batch."""
    layers: Annotated[int, Field(ge=0, le=64)] = 4
    """RandAugment: operations that each image gets, one after the other; 0: none."""
    magnitude: Annotated[float, Field(ge=0, le=30)] = 5.0
    """RandAugment: strength of the operations. Official: F0 5, F1 and F2 10, from F3 on 15."""
    numerics: Literal["official", "pillow"] = "official"
    """RandAugment: by whose arithmetic, DeepMind's to the letter or Pillow's."""

    @property
    def mixes(self) -> bool:
        """Whether images are mixed at all."""
        return bool(self.mixup) or self.cutmix

    @property
    def draws_partners(self) -> bool:
        """Whether the host draws a second image for every image of a batch."""
        return self.mixes and self.partners == "fresh"

    @property
    def in_words(self) -> str:
        """One line for people."""
        mixing = [f"MixUp {self.mixup:g}"] * bool(self.mixup) + ["CutMix"] * self.cutmix
        partners = {"fresh": "fresh partners", "batch": "partners of the same batch"}
        parts = [f"{' and '.join(mixing)} with {partners[self.partners]}"] * self.mixes
        if self.layers:
            numerics = f", {self.numerics} numerics" * (self.numerics != "official")
            layers = f"{self.layers} layer{'s' * (self.layers > 1)}"
            parts.append(f"RandAugment, {layers} of magnitude {self.magnitude:g}{numerics}")
        return " · ".join(parts) or "no mixing, no RandAugment"
