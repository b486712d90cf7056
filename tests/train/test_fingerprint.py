"""Fingerprints see every change of an array, and nothing of how it is laid out."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nfflax.train import fingerprint
from nfflax.train.fingerprint import fingerprints

DTYPES = ("float32", "bfloat16", "bool")


def mark(x: Any) -> str:
    return fingerprints([x])[(0,)]


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "_SMALL", -1)


def array(seed: int, shape: tuple[int, ...], dtype: str) -> jax.Array:
    values = np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(values > 0 if dtype == "bool" else values * 9, jnp.dtype(dtype))


@given(
    values=hnp.arrays(np.uint32, hnp.array_shapes(max_dims=3, max_side=5)),
    place=st.integers(0, 10**6),
    bit=st.integers(0, 31),
)
def test_any_single_bit_counts(values: np.ndarray, place: int, bit: int) -> None:
    flipped = values.copy()
    flipped.flat[place % values.size] ^= np.uint32(1 << bit)
    assert mark(flipped.view(np.float32)) != mark(values.view(np.float32))


@given(values=hnp.arrays(np.float32, st.just((4, 4)), elements=st.sampled_from([0, 1, -1, 2, 0.5])))
def test_order_counts(values: np.ndarray) -> None:
    """Also for round numbers, whose bits differ in a few high places only."""
    swapped = values.copy()
    swapped[0, 0], swapped[3, 2] = values[3, 2], values[0, 0]
    for other in (values.T, values[::-1], swapped):
        assert (mark(other) == mark(values)) == bool(np.array_equal(other, values))


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.reshape(6, 4),
        lambda x: x.reshape(24),
        lambda x: x.view(np.int32),
        lambda x: x.astype(np.float16),
        lambda x: np.where(x == 0, -x, x),
    ],
    ids=["reshaped", "flat", "other dtype, same bits", "narrower", "sign of zero"],
)
def test_shape_dtype_and_sign_count(change: Callable[[np.ndarray], np.ndarray]) -> None:
    values = np.arange(24, dtype=np.float32).reshape(4, 6)
    assert mark(change(values)) != mark(values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("on_device")
def test_the_same_on_any_devices(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = array(0, (3, 16, 8), dtype)
    mesh = Mesh(np.asarray(jax.devices()).reshape(4, 2), ("a", "b"))
    layouts = [PartitionSpec(), PartitionSpec(None, "a", "b"), PartitionSpec(None, ("a", "b"))]
    marks = {mark(jax.device_put(x, NamedSharding(mesh, layout))) for layout in layouts}
    marks.add(mark(x))
    monkeypatch.undo()
    marks.add(mark(x))
    assert len(marks) == 1


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("dtype", DTYPES)
def test_scalars_and_empty_arrays(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    leaves = [array(1, (), dtype), array(1, (0, 3), dtype)]
    there = fingerprints(leaves)
    monkeypatch.undo()
    assert fingerprints(leaves) == there


def test_the_value_is_part_of_the_file_format() -> None:
    """Another value here would make every checkpoint there is look damaged."""
    values = np.arange(10, dtype=np.float32).reshape(2, 5)
    assert fingerprints({"w": values}) == {("w",): "b0fb92f579249360"}
