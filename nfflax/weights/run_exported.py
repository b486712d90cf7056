"""Runs the network beside this file. It needs jax, numpy and flatbuffers, and not nfflax.

    python run.py images.npy    # prints every image's likeliest class

Images are one array; metadata.json says its shape and dtype, and how an image is cut and resized.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np
from jax import export

FOLDER = Path(__file__).parent
PROGRAM = export.deserialize(bytearray((FOLDER / "program.bin").read_bytes()))
with np.load(FOLDER / "weights.npz") as arrays:
    WEIGHTS = jax.device_put(dict(arrays))
CALL = jax.jit(PROGRAM.call)


def run(images: np.ndarray) -> np.ndarray:
    """Float32 logits, (images, classes)."""
    return np.asarray(CALL(WEIGHTS, images))


if __name__ == "__main__":
    NAMES = json.loads((FOLDER / "metadata.json").read_text("utf-8"))["class_names"]
    for best in run(np.load(sys.argv[1])).argmax(-1).tolist():
        print(best, NAMES[best] if NAMES else "")
