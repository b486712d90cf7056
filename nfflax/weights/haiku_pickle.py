"""Reads DeepMind's released NFNet weights, on the machine that executes nothing in a file.

F0_haiku.npz to F6_haiku.npz are no npz archives but dill pickles of a Haiku parameter tree
(github.com/google-deepmind/deepmind-research, nfnets/utils.py).
"""

import os
from typing import Any

import numpy as np

from nfflax.weights.pickle_machine import (
    ENOUGH,
    NUMPY,
    RefusedError,
    StandIns,
    array_of,
    find,
    make_array,
    mapped,
    refusal,
    run,
    shown,
)

_STRANGERS = {
    rb"PK\x03\x04.{26}[^/]+/data\.pkl": "This is a file of torch.save's, and no Haiku weights.",
    rb"PK\x03\x04": "This is a true .npz (a zip archive), as DeepMind's are not. Use numpy.load.",
    # The legacy format's magic number.
    rb".{,16}l\xfc\x9cF\xf9 j\xa8P\x19": "This is a file of torch.save's, and no Haiku weights.",
    rb"(?!\x80[\x02-\x05])": "This is no pickle of protocol 2 to 5, as Haiku weights are.",
}


def read_haiku_pickle(path: str | os.PathLike[str]) -> dict[str, dict[str, np.ndarray]]:
    """The tree {module: {parameter: read-only array}} in a file. Anything else: WeightsError."""
    with mapped(path, _STRANGERS) as program:
        return _as_arrays(run(program, _STAND_INS))


def _as_arrays(tree: Any) -> dict[str, dict[str, np.ndarray]]:
    if not isinstance(tree, dict):
        raise RefusedError(f"The file holds {shown(tree)} and no modules with parameters.")
    # Modules may share one mapping, so there can be far more arrays than operations.
    if sum(len(inner) for inner in tree.values() if isinstance(inner, dict)) > ENOUGH:
        raise refusal(f"A tree of more than {ENOUGH} arrays")
    arrays, problems = {}, []
    for module, parameters in tree.items():
        inner = parameters if isinstance(parameters, dict) else {None: parameters}
        for name, leaf in inner.items():
            array = array_of(leaf)
            if isinstance(module, str) and isinstance(name, str) and array is not None:
                arrays.setdefault(module, {})[name] = array
            else:
                found = f"{shown(module)}: {shown(name)}: {shown(leaf)}"
                problems.append(f"{found} does not fit {{module: {{parameter: array}}}}.")
    if problems:
        raise RefusedError(*problems)
    return arrays


def _wrapped(_function: Any, _arguments: Any, state: Any, _attributes: Any) -> Any:
    return make_array(*state)


_STAND_INS: StandIns = {
    **NUMPY,
    "collections.OrderedDict": {}.copy,  # called without arguments, and filled by SETITEMS
    # Haiku's mappings, each around a dict. FlatMap (since June 2021) still pickles as FlatMapping;
    # until August 2020 there was frozendict (haiku/_src/data_structures.py).
    "haiku._src.data_structures.FlatMapping": lambda mapping: mapping,
    "haiku._src.data_structures.frozendict": lambda mapping: mapping,
    # Each around numpy's own function, arguments and state. Until 2022 JAX had no wrapper.
    "dill._dill._create_array": _wrapped,
    "jax._src.array._reconstruct_array": _wrapped,
    "jax._src.device_array.reconstruct_device_array": _wrapped,
    # dill 0.3.3 looked numpy's functions up in their module. F0_haiku.npz has the length for it.
    "dill._dill._get_attr": lambda *names: find(_STAND_INS, *names),
    "dill._dill._import_module": lambda name: name,
}
