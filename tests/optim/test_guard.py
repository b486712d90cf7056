"""The divergence guard: broken steps change nothing, are counted, and end the run in time."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nfflax.optim import metrics, sgd
from nfflax.optim.guard import DivergedError, guard, raise_if_diverged

WEIGHTS = {"w": np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3), "b": np.ones(3, np.float32)}
GRADS = jax.tree.map(lambda w: 0.1 * w + 0.02, WEIGHTS)
INNER = {
    "sgd": sgd(0.1, statistics=True, weight_decay=0.01),
    "adam": optax.adam(0.1),
    "masked": optax.masked(sgd(0.1), {"w": True, "b": False}),
}


def broken(value: float) -> Any:
    return {"w": GRADS["w"], "b": np.array([0, value, 0], np.float32)}


def run(tx: optax.GradientTransformation, gradients: list[Any], **extra: Any) -> tuple[Any, Any]:
    tx = optax.with_extra_args_support(tx)

    @jax.jit
    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    params, state = WEIGHTS, tx.init(WEIGHTS)
    for grads in gradients:
        params, state = step(params, state, grads)
    return params, state


def assert_same(found: Any, wanted: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.parametrize("inner", INNER.values(), ids=INNER)
def test_a_broken_step_leaves_no_trace(inner: optax.GradientTransformation) -> None:
    calm, _ = run(guard(inner), [GRADS] * 3)
    bare, bare_state = run(inner, [GRADS] * 3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), calm, bare)
    bad = [GRADS, broken(np.nan), GRADS, broken(np.inf), broken(-np.inf), GRADS]
    params, state = run(guard(inner), bad)
    assert_same(params, calm)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), state.inner, bare_state)
    found = metrics(state)
    assert (int(found["guard/skipped"]), int(found["guard/in_a_row"])) == (3, 0)


def test_an_exploding_step_is_skipped_once_there_is_a_history() -> None:
    huge = jax.tree.map(lambda g: 1e3 * g, GRADS)
    _, state = run(guard(sgd(0.1)), [huge, *[GRADS] * 30])
    assert int(state.skipped) == 0  # nothing to compare the first step with
    _, state = run(guard(sgd(0.1)), [*[GRADS] * 30, huge, huge])
    found = metrics(state)
    assert (int(found["guard/skipped"]), int(found["guard/in_a_row"])) == (2, 2)
    norm = np.sqrt(sum(np.sum(g**2) for g in GRADS.values()))
    assert float(found["guard/norm"]) == pytest.approx(1e3 * norm, rel=1e-5)
    assert float(found["guard/typical_norm"]) == pytest.approx(norm, rel=1e-5)
    _, state = run(guard(sgd(0.1), spike=0), [*[GRADS] * 30, huge])
    assert int(state.skipped) == 0


def test_a_loss_that_is_not_finite_skips_the_step() -> None:
    params, state = run(guard(sgd(0.1)), [GRADS], value=jnp.nan)
    assert_same(params, WEIGHTS)
    assert int(state.skipped) == 1


def test_the_schedule_after_the_guard_counts_every_step() -> None:
    rate = lambda step: jnp.asarray([1.0, 10.0, 100.0])[step]  # noqa: E731
    tx = optax.chain(guard(optax.identity()), optax.scale_by_learning_rate(rate))
    state = tx.init(WEIGHTS)
    _, state = tx.update(broken(np.nan), state, WEIGHTS)
    updates, _ = tx.update(GRADS, state, WEIGHTS)
    assert_same(updates, jax.tree.map(lambda g: -10 * g, GRADS))


def test_too_many_broken_steps_end_the_run() -> None:
    _, state = run(guard(sgd(0.1)), [GRADS, broken(np.nan), broken(np.inf)])
    found = metrics(state)
    raise_if_diverged(found, 3, step=17)
    with pytest.raises(DivergedError) as caught:
        raise_if_diverged(found, 2, step=17, checkpoint="runs/a/15")
    message = str(caught.value)
    assert "the 2 steps up to step 17" in message
    assert "the weights are those of step 15" in message
    assert "The last good checkpoint is runs/a/15." in message


def test_a_fresh_state_can_be_donated() -> None:
    tx = guard(sgd(0.1, statistics=True))
    params = jax.tree.map(jnp.array, WEIGHTS)
    step = jax.jit(tx.update, donate_argnums=1)
    step(GRADS, tx.init(params), params)


def test_every_gradient_shape_counts_in_the_norm() -> None:
    shapes = [(), (5,), (4, 3), (2, 4, 3), (3, 3, 2, 4), (2, 3, 3, 2, 4)]
    rng = np.random.default_rng(0)
    grads = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    tx = guard(optax.identity())
    state: Any = tx.update([*grads, jnp.full(3, 2, jnp.bfloat16)], tx.init(grads), grads)[1]
    squares = sum(np.sum(np.square(g, dtype=np.float64)) for g in grads) + 12
    assert float(state.norm) == pytest.approx(np.sqrt(squares), rel=1e-6)
