"""What fusing RandAugment gains: time against sixteen branches, and against a train step.

    python benchmarks/randaugment.py [--size 192] [--batch 64] [--layers 4] [--magnitude 10]
    python benchmarks/randaugment.py --step-batch 8   # also time an NFNet-F0 train step

The other form is what one writes first: a function per operation, `lax.switch` on the operation,
`vmap` over images. Both forms get the same images and the same draws, run in one process in turn,
and must agree. Prints milliseconds, best of several: wall, and CPU of the whole process.
"""

import argparse
import math
import time

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax
from rich.console import Console
from rich.table import Table

import nfflax
from nfflax.data.augment.operations import FILL, OPERATIONS
from nfflax.data.augment.randaugment import RandAugment, distort, draw

REPEATS = 5


# --- one function per operation, on one image ---------------------------------------------------


def blend(degenerate, image, factor):
    away = degenerate + factor * (image.astype(jnp.float32) - degenerate)
    return jnp.clip(away, 0, 255).astype(jnp.uint8)


def per_channel(function):
    return lambda image: jnp.stack([function(image[..., c]) for c in range(3)], -1)


@per_channel
def autocontrast(channel):
    low, high = (f(channel).astype(jnp.int32) for f in (jnp.min, jnp.max))
    stretched = (channel.astype(jnp.int32) - low) * 255 // jnp.maximum(high - low, 1)
    return jnp.where(high > low, stretched, channel).astype(jnp.uint8)


@per_channel
def equalize(channel):
    counts = jnp.bincount(channel.reshape(-1), length=256)
    brightest = jnp.max(channel).astype(jnp.int32)
    step = (channel.size - counts[brightest]) // 255
    table = (jnp.cumsum(counts) - counts + step // 2) // jnp.maximum(step, 1)
    equal = jnp.clip(table, 0, 255).astype(jnp.uint8)[channel.astype(jnp.int32)]
    return jnp.where(step == 0, channel, equal)


def transform(image, a, b, c, d, e, f):
    height, width, _ = image.shape
    y, x = jnp.mgrid[:height, :width].astype(jnp.float32)
    column = lax.round(a * x + b * y + c).astype(jnp.int32)
    row = lax.round(d * x + e * y + f).astype(jnp.int32)
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    taken = image.at[jnp.where(inside, row, 0), jnp.where(inside, column, 0)].get()
    return jnp.where(inside[..., None], taken, jnp.uint8(FILL))


def rotate(image, angle):
    height, width, _ = image.shape
    cos, sin, x, y = jnp.cos(angle), jnp.sin(angle), (width - 1) / 2, (height - 1) / 2
    return transform(image, cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y)


def color(image, factor):
    scale = 255.5 / 255
    red, green, blue = (image[..., c].astype(jnp.float32) for c in range(3))
    grey = jnp.floor(0.2989 * scale * red + 0.587 * scale * green + 0.114 * scale * blue)
    return blend(grey[..., None], image, factor)


def sharpness(image, factor):
    values = image.astype(jnp.float32)
    height, width, _ = image.shape
    total = sum(values[i : height - 2 + i, j : width - 2 + j] for i in range(3) for j in range(3))
    smooth = jnp.floor((total + 4 * values[1:-1, 1:-1]) / 13)
    return blend(values.at[1:-1, 1:-1].set(smooth), image, factor)


def cutout(image, row, column, half):
    y, x = jnp.mgrid[: image.shape[0], : image.shape[1]]
    cut = (y >= row - half) & (y < row + half) & (x >= column - half) & (x < column + half)
    return jnp.where(cut[..., None], jnp.uint8(FILL), image)


def branches(magnitude, size):
    """OPERATIONS as functions of (image, sign, row, column)."""
    strength = magnitude / 10
    factor, shear, pixels = strength * 1.8 + 0.1, strength * 0.3, strength * 100
    threshold, shift = int(strength * 256) % 256, min((8 - int(strength * 4)) % 256, 7)
    grey = min(math.prod(size) // 256, 255)
    angle = math.radians(strength * 30)

    def solarize_add(image, *_):
        added = jnp.minimum(image.astype(jnp.int32) + int(strength * 110), 255)
        return jnp.where(image < 128, added, image).astype(jnp.uint8)

    functions = {
        "AutoContrast": lambda image, *_: autocontrast(image),
        "Equalize": lambda image, *_: equalize(image),
        "Invert": lambda image, *_: 255 - image,
        "Rotate": lambda image, sign, *_: rotate(image, sign * angle),
        "Posterize": lambda image, *_: image >> shift << shift,
        "Solarize": lambda image, *_: jnp.where(image < threshold, image, 255 - image),
        "Color": lambda image, *_: color(image, factor),
        "Contrast": lambda image, *_: blend(float(grey), image, factor),
        "Brightness": lambda image, *_: blend(0.0, image, factor),
        "Sharpness": lambda image, *_: sharpness(image, factor),
        "ShearX": lambda image, sign, *_: transform(image, 1, sign * shear, 0, 0, 1, 0),
        "ShearY": lambda image, sign, *_: transform(image, 1, 0, 0, sign * shear, 1, 0),
        "TranslateX": lambda image, sign, *_: transform(image, 1, 0, sign * pixels, 0, 1, 0),
        "TranslateY": lambda image, sign, *_: transform(image, 1, 0, 0, 0, 1, sign * pixels),
        "Cutout": lambda image, _, row, column: cutout(image, row, column, int(strength * 40)),
        "SolarizeAdd": solarize_add,
    }
    return [functions[name] for name in OPERATIONS]


def switched(images, choices, config):
    functions = branches(config.magnitude, images.shape[1:3])

    def one(image, choice):
        sign = 1.0 - 2.0 * choice.is_negative
        return lax.switch(choice.operation, functions, image, sign, choice.row, choice.column)

    return lax.scan(lambda x, choice: (jax.vmap(one)(x, choice), None), images, choices)[0]


# --- measuring ----------------------------------------------------------------------------------


def best_ms(runs, repeats):
    """For each of `runs`, which take turns: (wall, CPU) milliseconds, the least of each."""
    times = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            jax.block_until_ready(run())
            times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {
        name: tuple(1000 * min(kind) for kind in zip(*t, strict=True)) for name, t in times.items()
    }


def train_step(batch, size):
    """A compiled NFNet-F0 step with momentum SGD on images of `size`, as a function of nothing."""
    graph, state = nnx.split(nfflax.build("nfnet_f0", rngs=nnx.Rngs(0)), nnx.Param)
    parameters = nnx.to_pure_dict(state)
    optimizer = optax.sgd(0.1, 0.9, nesterov=True)
    images = jax.random.normal(jax.random.key(0), (batch, size, size, 3))
    labels = jnp.arange(batch)

    @jax.jit
    def step(parameters, slots):
        def loss(parameters):
            logits = nnx.merge(graph, parameters)(images, train=True, rngs=jax.random.key(1))
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        updates, slots = optimizer.update(jax.grad(loss)(parameters), slots, parameters)
        return optax.apply_updates(parameters, updates), slots

    slots = optimizer.init(parameters)
    jax.block_until_ready(step(parameters, slots))
    return lambda: step(parameters, slots)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=int, default=192)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--magnitude", type=int, default=10)
    parser.add_argument("--step-batch", type=int, default=0)
    given = parser.parse_args()
    config = RandAugment(given.layers, given.magnitude)

    shape = (given.batch, given.size, given.size, 3)
    images = jax.random.randint(jax.random.key(0), shape, 0, 256).astype(jnp.uint8)
    choices = draw(jax.random.key(1), shape, config.layers)
    forms = {"vmap(lax.switch)": switched, "fused": distort}
    runs, results, seconds = {}, {}, {}
    for name, form in forms.items():
        start = time.perf_counter()
        compiled = jax.jit(form, static_argnums=2).lower(images, choices, config).compile()
        seconds[name] = time.perf_counter() - start
        results[name] = compiled(images, choices)
        runs[name] = lambda compiled=compiled: compiled(images, choices)
    different = jnp.mean(jnp.any(results["fused"] != results["vmap(lax.switch)"], axis=-1))
    if different > 0.01:  # halves of a pixel may round either way
        raise SystemExit(f"the two forms differ in {different:.1%} of the pixels")
    measured = best_ms(runs, REPEATS)

    table = Table("RandAugment", "compile s", "wall ms", "CPU ms", "wall, fused = 1")
    unit = measured["fused"][0]
    for name, (wall, cpu) in measured.items():
        table.add_row(
            name, f"{seconds[name]:.1f}", f"{wall:.1f}", f"{cpu:.1f}", f"{wall / unit:.1f}"
        )
    if given.step_batch:
        step = train_step(given.step_batch, given.size)
        wall, cpu = best_ms({"step": step}, 3)["step"]
        scale = given.batch / given.step_batch
        name = f"F0 step, batch {given.step_batch}, times {scale:g}"
        wall, cpu = wall * scale, cpu * scale
        table.add_row(name, "", f"{wall:.1f}", f"{cpu:.1f}", f"{wall / unit:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
