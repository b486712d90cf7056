"""Accumulated gradients: those of the whole batch, from rows that stay where they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import nfflax
from nfflax.optim.accumulate import with_accumulation, with_preparation

ROWS = 32


def loss(params, batch, key):
    """Aux tells what each call was given: its rows and its key."""
    y = jnp.tanh(batch["x"] @ params["w"]) @ params["v"]
    errors = jnp.square(y - batch["y"])
    aux = {
        "large": jnp.mean(errors > 1),
        "rows": jnp.int32(len(y)),
        "some": jnp.any(errors > 1),
        "drawn": jax.random.uniform(key),
    }
    return jnp.mean(errors), aux


plain = jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(5, 7)), "v": rng.normal(size=(7, 3))}
    batch = {"x": rng.normal(size=(ROWS, 5)), "y": rng.normal(size=(ROWS, 3))}
    return (
        *jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (params, batch)),
        jax.random.key(1),
    )


def assert_close(found, wanted):
    def close(a, b):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5, atol=1e-6)

    jax.tree.map(close, found, wanted)


@pytest.mark.parametrize("steps", [2, 8])
def test_equals_the_whole_batch(case, steps):
    (value, aux), gradients = jax.jit(with_accumulation(plain, steps))(*case)
    (whole, whole_aux), wanted = plain(*case)
    assert_close(gradients, wanted)
    assert_close((value, aux["large"]), (whole, whole_aux["large"]))
    assert float(aux["rows"]) == ROWS / steps


def test_what_microbatches_share_is_made_once(case):
    made = []

    def prepare(params):
        made.append(params)
        return {"w": jnp.tanh(params["w"]), "v": params["v"] * 2}

    def composed(params, batch, key):
        return loss(prepare(params), batch, key)

    found = jax.jit(with_preparation(with_accumulation(plain, 4), prepare))(*case)
    assert len(made) == 1
    wanted = jax.jit(jax.value_and_grad(composed, has_aux=True))(*case)
    assert_close((found[0][0], found[1]), (wanted[0][0], wanted[1]))


def test_a_microbatch_takes_every_nth_row_and_its_own_key(case):
    params, batch, key = case
    steps = 4
    weighted = {"x": batch["x"], "y": batch["y"] * (jnp.arange(ROWS)[:, None] % steps == 1) * 10}
    parts = [
        plain(params, jax.tree.map(lambda x: x[j::steps], weighted), jax.random.fold_in(key, j))  # noqa: B023
        for j in range(steps)
    ]
    found = jax.jit(with_accumulation(plain, steps))(params, weighted, key)
    # Shares of "some" are by microbatch: rows dealt in another way would all have some.
    assert_close(found, jax.tree.map(lambda *leaves: sum(map(jnp.float32, leaves)) / steps, *parts))


def test_sums_in_float32_and_keeps_dtypes(case):
    """A thousand steps of 0.001 each: a bfloat16 sum would stall at 0.5 (its spacing is 0.004)."""

    def small(params, batch, key):
        del key
        gradient = jnp.full_like(params, 0.001) * jnp.mean(batch).astype(params.dtype)
        return (jnp.mean(batch), ()), gradient

    params, batch = jnp.ones(2, jnp.bfloat16), jnp.ones(1024)
    (value, _), gradient = jax.jit(with_accumulation(small, 1024))(params, batch, case[2])
    assert gradient.dtype == jnp.bfloat16
    assert value.dtype == jnp.float32
    np.testing.assert_array_equal(gradient, jnp.full(2, 0.001, jnp.bfloat16))


def test_a_sharded_batch_stays_where_it_is(case):
    """Eight devices, several microbatches: the same numbers, and no row is ever sent."""
    params, batch, key = case
    wanted = jax.jit(with_accumulation(plain, 4))(*case)
    mesh = Mesh(
        np.array(jax.devices()).reshape(4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2
    )
    with jax.set_mesh(mesh):
        params = jax.device_put(params, NamedSharding(mesh, P()))
        batch = jax.device_put(batch, NamedSharding(mesh, P(("data", "fsdp"))))
        step = jax.jit(with_accumulation(plain, 4)).lower(params, batch, key).compile()
        assert_close(step(params, batch, key), wanted)
    text = step.as_text()
    assert text is not None
    assert "all-reduce" in text
    for operation in ("all-gather", "all-to-all", "collective-permute"):
        assert operation not in text


def test_clipping_sees_the_accumulated_gradient(case):
    params, batch, key = case
    _, gradients = jax.jit(with_accumulation(plain, 4))(*case)
    tx = nfflax.agc(0.01)
    found, _ = tx.update(gradients, tx.init(params), params)
    _, whole = plain(params, batch, key)
    wanted, _ = tx.update(whole, tx.init(params), params)
    assert_close(found, wanted)


def test_one_step_is_the_function_itself():
    assert with_accumulation(plain, 1) is plain


def test_bad_numbers_are_named(case):
    params, batch, key = case
    with pytest.raises(ValueError, match="32 rows does not divide into 5 microbatches"):
        with_accumulation(plain, 5)(*case)
    with pytest.raises(ValueError, match="steps must be at least 1, not 0"):
        with_accumulation(plain, 0)
    with pytest.raises(ValueError, match=r"share their first axis; here: \[\(32, 5\), \(31, 3\)\]"):
        with_accumulation(plain, 2)(params, batch | {"y": batch["y"][1:]}, key)
