"""Weight pickles of every age come out equal, and whatever else a file holds is a WeightsError.

tests/golden/haiku_pickles/ holds one small tree, written by dill.dump (_pickle_: pickle.dump) of

    2021_released_format  dm-haiku 0.0.3 (FlatMapping), dill 0.3.3, numpy 1.16.6, Python 3.7
    2021_protocol4        the same with numpy 1.19.5, Python 3.8
    2020_frozendict       the first, with Haiku's mapping of before August 2020
    2023_*                dm-haiku 0.0.10, jax 0.4.13, dill 0.3.6, numpy 1.24.4
    2026_*                dm-haiku 0.0.17, jax 0.10.2, dill 0.4.1, numpy 2.4.6

The first format is the released one: a tree of F0's names and shapes in it takes 285,976,842 bytes,
as F0_haiku.npz does (deepmind-research, nfnet_demo_colab.ipynb). No jaxlib of that age can be had,
so a class in its place pickles as numpy's array, like jax 0.2.9's (jax/interpreters/xla.py).
"""

import io
import pickle
import struct
from collections import OrderedDict
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hostile_pickles import mutated, read_as, refusal_of
from hypothesis import given, settings

from nfflax.weights.errors import WeightsError
from nfflax.weights.haiku_pickle import read_haiku_pickle

GOLDEN = sorted((Path(__file__).parents[1] / "golden" / "haiku_pickles").glob("*.pkl"))
BYTES = {path.stem: path.read_bytes() for path in GOLDEN}

TREE = {
    "NFNet/~/stem_conv0": {
        "w": np.arange(12, dtype=np.float32).reshape(1, 1, 3, 4) / 8,
        "b": np.array([0.5, -1.5, 2.0, 0.0], np.float32),
        "gain": np.ones(4, np.float32),
    },
    "NFNet/~/nf_block": {"skip_gain": np.array(0.25, np.float32)},
}


@pytest.fixture
def read(tmp_path):
    return partial(read_as, read_haiku_pickle, tmp_path / "F0_haiku.npz")


@pytest.fixture
def refuse(tmp_path):
    return partial(refusal_of, read_haiku_pickle, tmp_path / "F0_haiku.npz")


def assert_same(tree, expected):
    assert type(tree) is dict
    assert {module: list(inner) for module, inner in tree.items()} == {
        module: list(inner) for module, inner in expected.items()
    }
    for module, parameters in expected.items():
        assert type(tree[module]) is dict
        for name, array in parameters.items():
            found = tree[module][name]
            assert type(found) is np.ndarray
            assert (found.dtype, found.shape) == (array.dtype, array.shape)
            assert found.tobytes() == array.tobytes()
            assert not found.flags.writeable


# What is read


@pytest.mark.parametrize(
    "name", [n for n in BYTES if n not in ("2026_dict_bfloat16", "2026_scalars")]
)
def test_golden_files_come_out_equal(read, name):
    assert_same(read(BYTES[name]), TREE)


def test_bfloat16(read):
    expected = {
        module: {name: array.astype(ml_dtypes.bfloat16) for name, array in parameters.items()}
        for module, parameters in TREE.items()
    }
    assert_same(read(BYTES["2026_dict_bfloat16"]), expected)


def test_numpy_scalars_become_arrays(read):
    expected = {"NFNet/~/nf_block": {"skip_gain": np.array(0.25, np.float32)}}
    assert_same(read(BYTES["2026_scalars"]), expected)


def test_jax_arrays_of_2022(read):
    """Between jax 0.2.27 and 0.4 the same wrapper had another name (jax/_src/device_array.py)."""
    today = BYTES["2026_flatmapping_jax_protocol3"]
    wrapper = b"jax._src.array\n_reconstruct_array\n"
    assert wrapper in today
    old = today.replace(wrapper, b"jax._src.device_array\nreconstruct_device_array\n")
    assert_same(read(old), TREE)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("dtype", ["?", "i1", "u2", "<f2", ">f4", "f8", "c8"])
def test_all_numbers_by_all_protocols(read, dtype, protocol):
    array = np.arange(-2, 4).astype(dtype).reshape(2, 3)
    tree = OrderedDict(m=OrderedDict(c=array, f=np.asfortranarray(array), empty=array[:0].copy()))
    if protocol == 2:
        del tree["m"]["empty"]  # which it writes as a call of bytes
    assert_same(read(pickle.dumps(tree, protocol)), tree)


def test_shared_arrays_and_bytes_after_the_end(read):
    array = np.arange(3.0)
    tree = {"a": {"w": array}, "b": {"w": array}}
    assert_same(read(pickle.dumps(tree) + b"more"), tree)


# What is no such file


def test_file_that_is_not_there(tmp_path):
    with pytest.raises(WeightsError, match=r"F7_haiku\.npz: 1 problem\n.*No such file"):
        read_haiku_pickle(tmp_path / "F7_haiku.npz")
    with pytest.raises(WeightsError, match=r"directory|denied"):
        read_haiku_pickle(str(tmp_path))


def npz() -> bytes:
    archive = io.BytesIO()
    np.savez(archive, w=np.ones(3))
    return archive.getvalue()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "empty. Download it again"),
        (npz(), r"true .npz (a zip archive), as DeepMind's are not. Use numpy.load"),
        (b"\n<!DOCTYPE html><html><body>Sign in", "web page or an error message. Download"),
        (b"\xef\xbb\xbf<?xml version='1.0'?><Error><Code>NoSuchKey", "web page or an error"),
        (struct.pack("<Q", 640) + b'{"w":{"dtype":"F32"', "safetensors file. Use the safetensors"),
        (b"version https://git-lfs.github.com/spec/v1", "no pickle of protocol 2 to 5"),
        (b"cos\nsystem\n(S'true'\ntR.", "no pickle of protocol 2 to 5"),
        (b"\x80\x06N.", "no pickle of protocol 2 to 5"),
    ],
)
def test_other_kinds_of_file(refuse, content, problem):
    assert problem in refuse(content)


@pytest.mark.parametrize("name", ["2021_released_format", "2026_pickle_protocol5"])
def test_truncation_anywhere(refuse, name):
    for length in range(2, len(BYTES[name])):
        assert "incomplete or damaged" in refuse(BYTES[name][:length])


ARRAY = np.ones(2, np.float32)


@pytest.mark.parametrize(
    ("tree", "problems"),
    [
        ([ARRAY], ["holds (list)"]),
        (ARRAY, ["holds (_Array)"]),
        ({"m": ARRAY}, ["'m': (NoneType): (_Array)"]),
        ({1: {"w": ARRAY}}, ["(int): 'w': (_Array)"]),
        ({"m": {("w",): ARRAY}}, ["'m': (tuple): (_Array)"]),
        ({"m": {"w": {"x": ARRAY}}}, ["'m': 'w': (dict)"]),
        ({"m": {"w": 1.0, "b": ARRAY}, "n": {"w": None}}, ["'m': 'w': (float)", "'n': 'w': (None"]),
    ],
)
def test_trees_of_another_form(refuse, tree, problems):
    message = refuse(pickle.dumps(tree))
    assert f"{len(problems)} problem" in message
    for problem in problems:
        assert problem in message


# What chance makes of a file


@settings(max_examples=100)
@given(content=mutated(list(BYTES.values())))
def test_mutated_files_are_valid_or_refused(tmp_path_factory, content):
    assert_valid_or_refused(tmp_path_factory, content)


@pytest.mark.slow
@settings(max_examples=2000)
@given(content=mutated(list(BYTES.values())))
def test_many_mutated_files_are_valid_or_refused(tmp_path_factory, content):
    assert_valid_or_refused(tmp_path_factory, content)


def assert_valid_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "mutated.npz"
    path.write_bytes(content)
    try:
        tree = read_haiku_pickle(path)
    except WeightsError:
        return
    for module, parameters in tree.items():
        assert isinstance(module, str)
        for name, array in parameters.items():
            assert isinstance(name, str)
            assert type(array) is np.ndarray
            assert array.dtype.kind in "biufcV"
            array.tobytes()


# How it is said


def test_message_lists_problems_up_to_forty():
    one = WeightsError("F0.npz", ["bad w"])
    assert str(one) == "F0.npz: 1 problem\n  - bad w"
    many = WeightsError("F0.npz", [f"bad {n}" for n in range(43)])
    lines = str(many).splitlines()
    assert lines[0] == "F0.npz: 43 problems"
    assert lines[1:41] == [f"  - bad {n}" for n in range(40)]
    assert lines[41:] == ["  and 3 more"]
    assert (many.source, len(many.problems)) == ("F0.npz", 43)
    assert str(pickle.loads(pickle.dumps(many))) == str(many)
