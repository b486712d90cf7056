"""Checkpoints: what is saved comes back to the bit, on any devices, or it is said why not."""

import contextlib
import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_data import assert_equal, params, random_model, small_spec
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import nfflax
from nfflax.optim import from_spec
from nfflax.train.checkpoint import Checkpoints, Restored, load_weights
from nfflax.train.errors import CheckpointError, TrainError

ABOUT = {"run": {"name": "test", "ema": {"decay": 0.9}}}


def abstract(state: Any, sharding: Any = None) -> Any:
    """What to restore: by default onto the first device."""
    there = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there), state)


def small(step: int, width: int = 4, **more: Any) -> dict[str, Any]:
    """A state of a few arrays of each kind, other numbers at each step."""
    rng = np.random.default_rng(step)
    kernel = rng.normal(size=(3, 3, 8, width))
    return {
        "params": {"convs": {0: jnp.asarray(kernel, jnp.float32)}, "gain": jnp.ones(width)},
        "stats": {"mean": jnp.asarray(rng.normal(size=width), jnp.float32)},
        "opt": ({"trace": jnp.asarray(kernel, jnp.bfloat16)}, (), {"skip": jnp.asarray(True)}),
        "step": jnp.asarray(step, jnp.int32),
    } | more


@contextlib.contextmanager
def opened(workdir: Path, keep: int = 2, keep_best: int = 0) -> Iterator[Checkpoints]:
    with Checkpoints(workdir, keep=keep, keep_best=keep_best) as checkpoints:
        yield checkpoints


def restored(checkpoints: Checkpoints, wanted: Any = None) -> Restored:
    found = checkpoints.restore(abstract(small(1)) if wanted is None else wanted)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with steps 1 and 2, not to be changed."""
    workdir = tmp_path_factory.mktemp("saved")
    with opened(workdir) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, small(step), ABOUT, {"top1": 0.1 * step})
    return workdir


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    return Path(shutil.copytree(saved, tmp_path / "run"))


@pytest.fixture(scope="module")
def trained() -> dict[str, Any]:
    """The state of a small network, in all that the optimiser keeps."""
    model = random_model(small_spec("nfnet_f0", {"stages.depth": [1, 2, 1, 1]}))
    tree = params(model)
    recipe = from_spec(nfflax.load_run("nfnet"), model)
    rng = np.random.default_rng(1)
    opt = jax.tree.map(
        lambda x: jnp.asarray(rng.integers(0, 99, x.shape), x.dtype),
        jax.eval_shape(recipe.tx.init, tree),
    )
    average = jax.tree.map(lambda x: jnp.asarray(np.asarray(x) + 1), tree)
    return {"params": tree, "ema": average, "stats": {}, "opt": opt, "step": jnp.int32(7)}


def test_everything_of_a_training_state_comes_back(trained: Any, tmp_path: Path) -> None:
    with opened(tmp_path) as checkpoints:
        checkpoints.save(7, trained, ABOUT)
        found = restored(checkpoints, abstract(trained))
    assert (found.step, found.damaged) == (7, ())
    assert jax.tree.structure(found.state) == jax.tree.structure(trained)
    assert_equal(found.state, trained)
    weights = load_weights(tmp_path)
    assert (weights.step, weights.about, weights.stats) == (7, ABOUT, {})
    assert jax.tree.structure(weights.params) == jax.tree.structure(trained["ema"])
    assert_equal(weights.params, trained["ema"])


def test_nothing_is_stored_twice(tmp_path: Path) -> None:
    """Random numbers do not compress: the bytes on disk are those of the arrays, and a little."""
    big = np.random.default_rng(0).normal(size=(512, 512)).astype(np.float32)
    state = {"params": {"w": jnp.asarray(big)}, "stats": {}, "opt": (), "step": jnp.int32(0)}
    with opened(tmp_path) as checkpoints:
        checkpoints.save(0, state, ABOUT)
        checkpoints.save(1, state | {"ema": {"w": jnp.asarray(big + 1)}}, ABOUT)
    sizes = {
        step: sum(file.stat().st_size for file in (tmp_path / "checkpoints" / step).rglob("*"))
        for step in ("0", "1")
    }
    assert sizes["0"] < 1.2 * big.nbytes
    assert sizes["1"] < 2.2 * big.nbytes


def test_the_state_may_be_donated_at_once(tmp_path: Path) -> None:
    state = small(3)
    wanted = jax.tree.map(np.asarray, state)
    with opened(tmp_path) as checkpoints:
        checkpoints.save(3, state, ABOUT)
        for leaf in jax.tree.leaves(state):
            leaf.delete()
        assert_equal(restored(checkpoints).state, wanted)


def layout(count: int, shape: tuple[int, ...]) -> dict[str, Any]:
    """A mesh of some devices: kernels split by output channel, the rest repeated."""
    mesh = Mesh(np.asarray(jax.devices()[:count]).reshape(shape), ("data", "fsdp"))

    def sharding(leaf: Any) -> NamedSharding:
        axes = (None,) * 3 + ("fsdp",) if leaf.ndim == 4 else ()
        return NamedSharding(mesh, PartitionSpec(*axes))

    return jax.tree.map(sharding, small(1, 8))


def test_from_mesh_to_mesh(tmp_path: Path) -> None:
    """Eight devices, then four, one, and eight in another arrangement."""
    state = small(1, 8)
    wanted = jax.tree.map(np.asarray, state)
    meshes = [layout(8, (2, 4)), layout(4, (1, 4)), layout(1, (1, 1)), layout(8, (1, 8))]
    state = jax.device_put(state, meshes[0])
    for step, sharding in enumerate(meshes[1:]):
        target = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, sharding
        )
        with opened(tmp_path) as checkpoints:
            checkpoints.save(step, state, ABOUT)
            state = restored(checkpoints, target).state
        assert jax.tree.map(lambda x: x.sharding, state) == sharding
        assert_equal(jax.tree.map(np.asarray, state), wanted)


def test_what_is_kept(tmp_path: Path) -> None:
    """The newest and the best, also when the folder was closed in between."""
    scores = {1: 0.5, 2: 0.9, 3: 0.7, 4: None, 5: 0.9, 6: 0.1, 7: 0.2}
    left = []
    for step, score in scores.items():
        with opened(tmp_path, keep=2, keep_best=1) as checkpoints:
            checkpoints.save(step, small(step), ABOUT, None if score is None else {"top1": score})
            checkpoints.wait()
            left.append(checkpoints.steps())
    # of two that are equally good, the newer one stays
    assert left == [[1], [1, 2], [2, 3], [2, 3, 4], [4, 5], [5, 6], [5, 6, 7]]


def test_only_the_newest_when_none_is_best(tmp_path: Path) -> None:
    with opened(tmp_path, keep=1) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, small(step), ABOUT, {"top1": 1 / step})
        checkpoints.wait()
        assert checkpoints.steps() == [3]


def test_saving_again(run: Path) -> None:
    """A step that is there is left alone, unless it holds something else."""
    metadata = run / "checkpoints" / "2" / "_CHECKPOINT_METADATA"
    before = metadata.stat().st_mtime_ns
    with opened(run) as checkpoints:
        checkpoints.save(2, small(2), ABOUT)
        checkpoints.wait()
        assert metadata.stat().st_mtime_ns == before
        checkpoints.save(2, small(2) | {"step": jnp.int32(99)}, ABOUT)
        assert restored(checkpoints).state["step"] == 99


def test_leftovers_of_a_killed_save(run: Path) -> None:
    leftover = run / "checkpoints" / "3.orbax-checkpoint-tmp"
    shutil.copytree(run / "checkpoints" / "2" / "params", leftover / "params")
    (run / "checkpoints" / "notes.txt").write_text("mine")
    with opened(run) as checkpoints:
        assert checkpoints.steps() == [1, 2]
        assert restored(checkpoints).step == 2
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["1", "2", "notes.txt"]


def test_an_empty_folder_has_nothing_to_restore(tmp_path: Path) -> None:
    with opened(tmp_path) as checkpoints:
        assert checkpoints.restore(abstract(small(1))) is None
        with pytest.raises(CheckpointError, match="no such checkpoint"):
            checkpoints.restore(abstract(small(1)), 5)
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        load_weights(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        load_weights(tmp_path / "nothing")


# --- damage -----------------------------------------------------------------------------------


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def flip(file: Path) -> None:
    """One bit, in the middle."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


def files_of(step: Path) -> list[Path]:
    return sorted(path for path in step.rglob("*") if path.is_file() and path.stat().st_size)


def assert_right_or_older(run: Path, what: str) -> tuple[tuple[int, str], ...]:
    """Whatever happened to step 2: the right numbers of it, or those of step 1 and a reason."""
    with opened(run) as checkpoints:
        found = restored(checkpoints)
        assert_equal(found.state, small(found.step))
        assert found.step == (1 if found.damaged else 2), what
    return found.damaged


@pytest.mark.parametrize("harm", [truncate, Path.unlink, flip])
def test_damage_in_the_data_falls_back(
    harm: Callable[[Path], None], saved: Path, run: Path
) -> None:
    """Where the arrays are, and in the record of them."""
    step = run / "checkpoints" / "2"
    data = [max(step.glob(f"{item}/**/d/*"), key=lambda p: p.stat().st_size) for item in ITEMS]
    for file in (*data, step / "about" / "metadata"):
        harm(file)
        ((number, reason),) = assert_right_or_older(run, str(file))
        assert number == 2
        assert reason
        shutil.rmtree(step)
        shutil.copytree(saved / "checkpoints" / "2", step)


ITEMS = ("params", "train")


@pytest.mark.slow
@pytest.mark.parametrize("harm", [truncate, Path.unlink, flip])
def test_no_damage_goes_unnoticed(harm: Callable[[Path], None], saved: Path, run: Path) -> None:
    step = run / "checkpoints" / "2"
    for original in files_of(saved / "checkpoints" / "2"):
        file = run / original.relative_to(saved)
        harm(file)
        assert_right_or_older(run, str(file))
        shutil.rmtree(step)
        shutil.copytree(saved / "checkpoints" / "2", step)


@pytest.mark.parametrize("lost", ["params", "train", "about"])
def test_a_missing_item(lost: str, run: Path) -> None:
    shutil.rmtree(run / "checkpoints" / "2" / lost)
    assert assert_right_or_older(run, lost) == ((2, f"lacks {lost}"),)


def test_a_damaged_step_is_saved_anew(run: Path) -> None:
    """And it does not count among those that are kept."""
    (run / "checkpoints" / "7").mkdir()
    flip(max((run / "checkpoints" / "2").glob("params/**/d/*"), key=lambda p: p.stat().st_size))
    with opened(run, keep=2) as checkpoints:
        assert checkpoints.steps() == [1, 2]  # an empty folder is seen without reading
        found = restored(checkpoints)
        assert [step for step, _ in found.damaged] == [7, 2]
        assert checkpoints.steps() == [1]
        checkpoints.save(2, small(2), ABOUT)
        checkpoints.wait()
        assert checkpoints.steps() == [1, 2]
        assert_equal(restored(checkpoints).state, small(2))
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["1", "2"]


def test_nothing_good_is_left(run: Path) -> None:
    for step in ("1", "2"):
        shutil.rmtree(run / "checkpoints" / step / "train")
    with opened(run) as checkpoints, pytest.raises(CheckpointError) as raised:
        checkpoints.restore(abstract(small(1)))
    assert [problem.message for problem in raised.value.problems] == ["lacks train"] * 2


def test_weights_of_damaged_checkpoints(run: Path) -> None:
    flip(max((run / "checkpoints" / "2").glob("params/**/d/*"), key=lambda p: p.stat().st_size))
    weights = load_weights(run)
    assert weights.step == 1
    assert [step for step, _ in weights.damaged] == [2]
    assert_equal(weights.params, small(1)["params"])
    with pytest.raises(CheckpointError, match="other numbers than were saved"):
        load_weights(run / "checkpoints" / "2")


def test_weights_of_one_checkpoint(run: Path) -> None:
    """It may have been taken elsewhere, without the optimiser's part of the run."""
    moved = Path(shutil.copytree(run / "checkpoints" / "1", run / "best"))
    weights = load_weights(str(moved))
    assert (weights.step, weights.about) == (1, ABOUT)
    assert_equal(weights.stats, small(1)["stats"])
    tree = {key: small(1)[key] for key in ("params", "stats")}
    mesh = Mesh(np.asarray(jax.devices()), ("fsdp",))
    repeated = NamedSharding(mesh, PartitionSpec())
    spread = load_weights(moved, abstract(tree, repeated))
    assert {leaf.sharding for leaf in jax.tree.leaves(spread.params)} == {repeated}
    assert_equal(spread.params, weights.params)
    with pytest.raises(CheckpointError, match=r"params\.convs\.0"):
        load_weights(moved, abstract({"params": small(1, 8)["params"], "stats": tree["stats"]}))


# --- another network --------------------------------------------------------------------------


def test_another_network_is_an_error_not_damage(run: Path) -> None:
    other = small(1, 6)
    other["params"]["bias"] = jnp.zeros(3)
    del other["params"]["gain"]
    with opened(run) as checkpoints, pytest.raises(CheckpointError) as raised:
        checkpoints.restore(abstract(other))
    assert {problem.key: problem.message for problem in raised.value.problems} == {
        "opt.0.trace": "is bfloat16 [3, 3, 8, 4] in the checkpoint, "
        "and bfloat16 [3, 3, 8, 6] in this run",
        "params.bias": "the checkpoint lacks this array, float32 [3]",
        "params.convs.0": "is float32 [3, 3, 8, 4] in the checkpoint, "
        "and float32 [3, 3, 8, 6] in this run",
        "params.gain": "this run has no such array, float32 [4]",
        "stats.mean": "is float32 [4] in the checkpoint, and float32 [6] in this run",
    }


def test_another_dtype_is_never_cast(run: Path) -> None:
    other = small(1) | {"step": jnp.asarray(1, jnp.int16)}
    with opened(run) as checkpoints, pytest.raises(CheckpointError, match=r"int32 .* and int16"):
        checkpoints.restore(abstract(other))


# --- saves that fail --------------------------------------------------------------------------


@contextlib.contextmanager
def full_disk(room: int) -> Iterator[None]:
    """No file can grow beyond this many bytes: what the system says differs from a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("room", [0, 20_000], ids=["json fails", "arrays fail"])
def test_a_full_disk(run: Path, room: int) -> None:
    big = small(3, 4000)
    message = "checkpoint of step 3 could not be saved .*: File too large. .* that of step 2"
    with opened(run) as checkpoints:
        with full_disk(room):
            checkpoints.save(3, big, ABOUT)  # in the background, so it is the next call that knows
            with pytest.raises(TrainError, match=message):
                checkpoints.wait()
        assert checkpoints.steps() == [1, 2]
        assert_equal(restored(checkpoints).state, small(2))
    found = {path.name for path in (run / "checkpoints").iterdir()}
    # Orbax's threads may still have been at it; the next start clears up.
    assert found - {"3.orbax-checkpoint-tmp"} == {"1", "2"}


def test_the_next_save_tells_of_the_one_that_failed(run: Path) -> None:
    with opened(run) as checkpoints, full_disk(0):
        checkpoints.save(3, small(3), ABOUT)
        with pytest.raises(TrainError, match="step 3 could not be saved"):
            checkpoints.save(4, small(4), ABOUT)


def test_a_failed_save_does_not_hide_the_error_that_ends_the_run(run: Path) -> None:
    def crash() -> None:
        with opened(run) as checkpoints, full_disk(0):
            checkpoints.save(3, small(3), ABOUT)
            raise KeyError("the first error")

    with pytest.raises(KeyError, match="the first error") as raised:
        crash()
    assert "step 3 could not be saved" in raised.value.__notes__[0]


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(CheckpointError, match="cannot be opened"):
        Checkpoints(tmp_path, keep=1, keep_best=0)


def test_orbax_keeps_quiet(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    """And others who log through absl are still heard, and nothing stays changed."""
    absl = logging.getLogger("absl")
    before = list(absl.filters)  # a save that failed leaves one for good
    with caplog.at_level(logging.INFO):
        shutil.rmtree(run / "checkpoints" / "2" / "about")
        with opened(run) as checkpoints:
            restored(checkpoints)
            checkpoints.save(3, small(3), ABOUT)
            absl.warning("from someone else")
    assert [record.getMessage() for record in caplog.records if record.name == "absl"] == [
        "from someone else"
    ]
    assert absl.filters == before


_TRAINER = """
    import sys, time
    from pathlib import Path
    sys.path[:0] = sys.argv[2:]
    import jax.numpy as jnp, numpy as np
    from test_checkpoint import ABOUT, opened
    state = {"params": {"w": jnp.asarray(np.random.rand(4000, 2000), jnp.float32)},
             "stats": {}, "opt": ()}
    with opened(Path(sys.argv[1])) as checkpoints:
        for step in range(1000):
            checkpoints.save(step, state | {"step": jnp.int32(step)}, ABOUT)
            print(step, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.05, 0.2])
def test_killed_at_any_moment(tmp_path: Path, delay: float) -> None:
    here = Path(__file__).parent
    command = [sys.executable, "-c", textwrap.dedent(_TRAINER), str(tmp_path)]
    command += [str(here), str(here.parent), os.getcwd()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(3)]
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(delay)
        process.send_signal(signal.SIGKILL)
        lines += process.stdout.readlines()
    begun = int(lines[-1])
    state = {"params": {"w": jnp.zeros((4000, 2000))}, "stats": {}, "opt": (), "step": jnp.int32(0)}
    with opened(tmp_path) as checkpoints:
        found = restored(checkpoints, abstract(state))
        assert found.damaged == ()
        assert found.step == found.state["step"]
        assert found.step >= begun - 1
    left = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert all(name.isdecimal() for name in left)


def test_the_record_is_plain_json(saved: Path) -> None:
    """Other programs can tell what a checkpoint is without Orbax."""
    content = json.loads((saved / "checkpoints" / "1" / "about" / "metadata").read_text())
    assert (content["step"], content["about"], content["metrics"]) == (1, ABOUT, {"top1": 0.1})
    assert content["leaves"]["opt.0.trace"][:2] == ["bfloat16", [3, 3, 8, 4]]
