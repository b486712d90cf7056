"""Exact fingerprints of arrays: what was saved is known again, to the bit, on any devices.

Checkpoint formats checksum little of their data: a flipped bit comes back as another number. A
fingerprint is a sum of hashes modulo 2^32, so it is the same however an array is split over
devices and in whichever order the parts are added.
"""

import functools
import zlib
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from nfflax.optim.roles import Path, leaves_by_path

_GOLDEN_RATIO = np.uint32(0x9E3779B9)  # of 2^32: neighbouring positions get far apart (Knuth, 6.4)
_SMALL = 1 << 20  # bytes: up to here, hashing on the host is faster than compiling a program for it


def fingerprints(tree: Any) -> dict[Path, str]:
    """The fingerprint of every leaf, by path: 16 hexadecimal digits.

    Any change of a single element changes it for certain; exchanged or transposed elements, another
    shape or another dtype do but for one chance in 2^64. Processes that hold parts of the tree call
    this together, and get the same answer.
    """
    leaves = leaves_by_path(tree)
    # One by one: `nfflax.train.distributed.one_at_a_time` tells why.
    sums = [jax.device_get(_sums(leaf)) for leaf in leaves.values()]
    return {
        path: f"{int(high):08x}{int(low):08x}"
        for path, (high, low) in zip(leaves, sums, strict=True)
    }


def _sums(leaf: Any) -> Any:
    """The two sums, on the host for small arrays, and where the array is for large ones.

    One program for each shape: one for a whole tree takes several times as long to compile.
    """
    seed = np.uint32(zlib.crc32(f"{leaf.dtype} {tuple(leaf.shape)}".encode()))
    is_here = not isinstance(leaf, jax.Array) or leaf.is_fully_addressable
    if is_here and leaf.nbytes <= _SMALL:
        return _hashed(np.asarray(leaf), seed, np)
    sharding = getattr(leaf, "sharding", None)
    is_on_mesh = isinstance(sharding, NamedSharding)
    return _program(NamedSharding(sharding.mesh, PartitionSpec()) if is_on_mesh else None)(
        leaf, seed
    )


@functools.cache
def _program(everywhere: NamedSharding | None) -> Any:
    return jax.jit(functools.partial(_hashed, xp=jnp), out_shardings=everywhere)


def _hashed(x: Any, seed: Any, xp: ModuleType) -> Any:
    """Two sums over hashes of (position, bits); at a given position no two words share a hash."""
    words = _words(xp.atleast_1d(x))
    position = np.uint32(0)
    for axis, size in enumerate(words.shape):  # no reshape of x: that would gather a split array
        place = xp.arange(size, dtype=np.uint32).reshape((-1,) + (1,) * (words.ndim - 1 - axis))
        position = position * np.uint32(size) + place
    high = _mixed(words ^ _mixed(position * _GOLDEN_RATIO + seed))
    low = _mixed(high ^ _GOLDEN_RATIO)
    return xp.stack([xp.sum(high, dtype=np.uint32), xp.sum(low, dtype=np.uint32)])


def _words(x: Any) -> Any:
    """The bits of an array as unsigned 32-bit words; eight-byte elements make two."""
    unsigned = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint32}[x.dtype.itemsize]
    return x.view(unsigned).astype(np.uint32)


def _mixed(word: Any) -> Any:
    """MurmurHash3's finaliser: a permutation of the 32-bit words that spreads every bit."""
    word = (word ^ (word >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    word = (word ^ (word >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return word ^ (word >> np.uint32(16))
