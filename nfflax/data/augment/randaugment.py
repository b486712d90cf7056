"""RandAugment (arXiv:1909.13719): a few random operations in a row, all of one magnitude.

The draws are separate from the work. `draw` makes every random number of a batch from one key;
`distort` is a plain function of images and draws. So the work can run on each device's part of
the batch alone, and the result does not depend on how many devices there are.
"""

import functools
import math
from dataclasses import dataclass
from typing import get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from nfflax.ambient import BATCH_AXES, automatic_axes, has_mesh
from nfflax.data.augment.layer import Choice, distort_layer
from nfflax.data.augment.operations import OPERATIONS, Numerics, Settings, settings

_DEFAULT_LAYERS = 2  # of an official name that gives none
_MAX_MAGNITUDE = 30  # the end of the range that the paper and the official code name


@dataclass(frozen=True)
class RandAugment:
    """How many operations each image gets, how strong, and by whose arithmetic.

    `numerics` "official" is DeepMind's code to the letter: Contrast blends with a grey that is
    the number of pixels over 256, not the image's mean, and the arguments of Solarize and
    Posterize wrap around at 256. "pillow" takes Pillow's definitions for all operations.
    """

    layers: int = 4
    magnitude: float = 5
    numerics: Numerics = "official"

    def __post_init__(self) -> None:
        if self.layers < 1:
            raise ValueError(f"RandAugment: layers = {self.layers}; allowed: 1 or more")
        if not 0 <= self.magnitude <= _MAX_MAGNITUDE:
            raise ValueError(
                f"RandAugment: magnitude = {self.magnitude}; allowed: 0 to {_MAX_MAGNITUDE}"
            )
        if self.numerics not in get_args(Numerics):
            allowed = ", ".join(get_args(Numerics))
            raise ValueError(f"RandAugment: numerics = {self.numerics!r}; allowed: {allowed}")

    @classmethod
    def named(cls, name: str) -> "RandAugment":
        """From the official code's shorthand: "405" is 4 layers of magnitude 5, "15" 2 of 15."""
        if not (name.isascii() and name.isdecimal()):
            raise ValueError(f"RandAugment: {name!r}; allowed: digits, as in 405")
        layers, magnitude = divmod(int(name), 100)
        return cls(layers or _DEFAULT_LAYERS, magnitude)


def apply_randaugment(key: jax.Array, images_NHWC: jax.Array, config: RandAugment) -> jax.Array:
    """Float32 images, of whole numbers in 0..255, from images in 0..255.

    Fractions are cut off first. Inside `jax.set_mesh` each device works on its own images.
    """
    choices = draw(key, images_NHWC.shape, config.layers)
    whole = jnp.clip(images_NHWC, 0, 255).astype(jnp.uint8)
    return distort(whole, choices, config).astype(jnp.float32)


def draw(key: jax.Array, shape: tuple[int, ...], layers: int) -> Choice:
    """Every layer's choice for images of `shape` (N, H, W, C): uniform and independent."""
    batch, height, width, _ = shape
    highest = (len(OPERATIONS), 2, height, width)
    keys = jax.random.split(key, len(highest))
    pairs = zip(keys, highest, strict=True)
    return Choice(*(jax.random.randint(k, (layers, batch), 0, high) for k, high in pairs))


def distort(images_NHWC: jax.Array, choices: Choice, config: RandAugment) -> jax.Array:
    """uint8 images after the operations in `choices`, whose arrays are (layers, N)."""
    _, height, width, channels = images_NHWC.shape
    if channels not in (1, 3):
        raise ValueError(f"RandAugment: images of {channels} channels; allowed: 1 or 3")
    tables = settings(config.magnitude, (height, width), config.numerics)
    work = functools.partial(_distort, tables=tables, numerics=config.numerics)

    free = automatic_axes()
    batch = tuple(name for name in BATCH_AXES if name in free)
    if not free:  # one device, or inside a shard_map; else nobody says where the images lie
        is_local = has_mesh() or jax.device_count() == 1
        return work(images_NHWC, choices, is_local=is_local)
    if not batch or images_NHWC.shape[0] % math.prod(free[name] for name in batch):
        return work(images_NHWC, choices, is_local=False)
    images_spec, choices_spec = PartitionSpec(batch), PartitionSpec(None, batch)
    return jax.shard_map(
        functools.partial(work, is_local=True),
        in_specs=(images_spec, choices_spec),
        out_specs=images_spec,
        axis_names=frozenset(free),
    )(images_NHWC, choices)


def _distort(
    images_NHWC: jax.Array,
    choices: Choice,
    *,
    tables: Settings,
    numerics: Numerics,
    is_local: bool,
) -> jax.Array:
    def one_layer(images: jax.Array, choice: Choice) -> tuple[jax.Array, None]:
        return distort_layer(images, choice, tables, numerics, is_local=is_local), None

    images_NCHW, _ = lax.scan(one_layer, jnp.moveaxis(images_NHWC, -1, 1), choices)
    return jnp.moveaxis(images_NCHW, 1, -1)
