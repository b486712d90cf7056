"""What `import nfflax` offers, and what it costs: next to nothing until a name is used."""

import ast
import importlib
import json
import subprocess
import sys
import types
from importlib import resources
from pathlib import Path

import pytest

import nfflax

# Loaded by training, data and command line alone; flax itself may bring some of them.
HEAVY = {"optax", "orbax", "grain", "PIL", "matplotlib", "tensorflow", "torch", "sklearn"}

ON_ITS_OWN = """
import json, sys
before = set(sys.modules)
import nfflax
own = sorted(set(sys.modules) - before)
nfflax.plan("nfnet_f0").params
planning = sorted(set(sys.modules) - before)
print(json.dumps([own, planning]))
"""

BESIDE_FLAX = """
import json, sys, time
import flax
from flax import nnx
before = set(sys.modules)
start = time.perf_counter()
import nfflax
seconds = time.perf_counter() - start
own = sorted(set(sys.modules) - before)
for name in nfflax.__all__:
    getattr(nfflax, name)
print(json.dumps([seconds, own, sorted(set(sys.modules) - before)]))
"""


def run(script: str):
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    )
    return json.loads(done.stdout.splitlines()[-1])


def packages(modules) -> set[str]:
    return {module.split(".")[0] for module in modules}


# What importing costs


def test_import_loads_the_standard_library_only_and_planning_needs_no_jax():
    own, planning = run(ON_ITS_OWN)
    assert packages(own) <= sys.stdlib_module_names | {"nfflax"}
    assert [module for module in own if module.startswith("nfflax")] == ["nfflax"]
    assert not packages(planning) & ({"jax", "jaxlib", "flax", "numpy"} | HEAVY)


def test_import_adds_nothing_to_flax_and_takes_no_time():
    """The least of three: on a busy machine one may wait for its turn."""
    runs = [run(BESIDE_FLAX) for _ in range(3)]
    assert min(seconds for seconds, *_ in runs) < 0.3
    _, own, all_names = runs[0]
    assert own == ["nfflax"]
    assert not packages(all_names) & HEAVY


# What there is


@pytest.mark.parametrize("name", nfflax.__all__)
def test_every_name_resolves_to_what_it_says(name):
    value = getattr(nfflax, name)
    assert value.__name__.rsplit(".", 1)[-1] == name
    assert value.__doc__
    home = importlib.import_module(value.__module__) if hasattr(value, "__module__") else None
    assert home is None or getattr(home, name) is value
    assert getattr(nfflax, name) is value


def test_type_checkers_see_the_same_names():
    """They read the imports under TYPE_CHECKING, which never run."""
    tree = ast.parse(Path(nfflax.__file__).read_text())
    blocks = [node for node in tree.body if isinstance(node, ast.If)]
    imports = [node for block in blocks for node in block.body if isinstance(node, ast.ImportFrom)]
    seen = {alias.asname: node.module for node in imports for alias in node.names}
    assert sorted(filter(None, seen)) == sorted(nfflax.__all__)
    for name, module in seen.items():
        assert name is not None
        assert module is not None
        assert getattr(importlib.import_module(module), name) is getattr(nfflax, name)


def test_dir_lists_the_public_names():
    assert dir(nfflax) == sorted([*nfflax.__all__, "__version__"])
    assert len(set(nfflax.__all__)) == len(nfflax.__all__)


def test_star_import():
    found = {}
    exec("from nfflax import *", found)
    assert set(nfflax.__all__) <= set(found)


@pytest.mark.parametrize("name", ["data", "insight", "nn", "optim", "spec", "weights"])
def test_subpackages_load_as_attributes(name):
    assert getattr(nfflax, name) is importlib.import_module(f"nfflax.{name}")


def test_an_unknown_name_is_an_attribute_error_that_names_it():
    with pytest.raises(AttributeError, match="module 'nfflax' has no attribute 'bulid'"):
        _ = nfflax.bulid
    assert not hasattr(nfflax, "__wrapped__")
    with pytest.raises(ImportError, match="bulid"):
        exec("from nfflax import bulid")


def test_types_are_published():
    assert resources.files("nfflax").joinpath("py.typed").is_file()


@pytest.mark.parametrize(
    ("package", "names"),
    [
        (
            "nfflax.nn",
            """Backbone EfficientChannelAttention Frozen NFNet Role SqueezeExcite WSConv
            WSConvTranspose build create gamma_of register_activation role_of""",
        ),
        (
            "nfflax.data",
            """ArraySource Batches Data DataError EvalView ImageError Record Source TrainView
            augmentation eval_batches generate_folder open_source pack_split sized train_batches
            train_feed""",
        ),
        ("nfflax.data.augment", "Mix RandAugment augment normalize"),
        (
            "nfflax.optim",
            """DivergedError Group Recipe RecipeWarning cross_entropy from_spec guard metrics
            raise_if_diverged sgd update_ema warmup_constant warmup_cosine warmup_exponential
            with_accumulation with_sam""",
        ),
        ("nfflax.weights", "WeightsError load_deepmind load_timm to_deepmind to_timm"),
    ],
)
def test_names_of_the_subpackages(package, names):
    module = importlib.import_module(package)
    for name in names.split():
        value = getattr(module, name)
        assert isinstance(value, type | types.FunctionType), name
        assert value.__name__ == name
        assert value.__doc__
        assert getattr(nfflax, name, value) is value
