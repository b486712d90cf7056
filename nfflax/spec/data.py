"""The [data] table of a run spec: where images come from and how the host prepares them."""

from typing import Annotated, Literal

from pydantic import Field

from nfflax.spec.base import Table

Name = Annotated[str, Field(min_length=1, max_length=1000)]


class Data(Table):
    """Where images come from and how the host prepares them."""

    source: Name = "digits"
    """A folder of images or of packed records (from the working directory), "tfds:NAME" (TensorFlow
    Datasets), "hf:NAME" (Hugging Face datasets), or "digits": scikit-learn's 8 x 8 handwritten
    digits."""
    train: Name = "train"
    """Split to train on: of an image folder, a subfolder or a list of files (.txt)."""
    eval: Name = "test"
    """Split to evaluate on."""
    classes: str = Field(default="", max_length=1000)
    """For an image folder: a text file with one class folder per line, in the order of the labels;
    none: the subfolders of the split, sorted."""
    image_key: Name = "image"
    """Name of the image in the examples of tfds and hf."""
    label_key: Name = "label"
    """Name of the label in the examples of tfds and hf."""
    crop_area: Annotated[float, Field(gt=0, le=1)] = 0.08
    """Least share of the image that a random training crop covers; 1: no crop, the image squashed
    to a square."""
    crop_ratio: Annotated[float, Field(ge=1, le=100)] = 4 / 3
    """The crop's width / height lies between 1 / crop_ratio and crop_ratio."""
    flip: bool = True
    """Mirror every other training image."""
    on_error: Literal["raise", "skip"] = "raise"
    """An image that cannot be decoded ends the run, or is replaced by the next good one (in
    evaluation: not counted)."""
    workers: Annotated[int, Field(ge=0, le=1024)] | None = None
    """How many decode at a time; 0: the training loop itself. Without it: one per CPU core."""
    worker_kind: Literal["thread", "process"] = "thread"
    """Pillow decodes without holding Python back, so threads are best on all but many cores."""
    prefetch: Annotated[int, Field(ge=1, le=1000)] = 2
    """Batches kept ready."""

    @property
    def in_words(self) -> str:
        """One line for people on what is shown in training."""
        parts = [f"{self.source} ({self.train})"]
        if self.crop_area == 1:
            parts.append("whole images, squashed")
        else:
            parts.append(f"crops of {100 * self.crop_area:g}% to 100%")
        return " · ".join(parts + ["flips"] * self.flip)
