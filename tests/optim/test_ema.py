"""The weights' average: the official numbers, and what must hold for any decay."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_data import golden

from nfflax.optim.ema import update_ema

STEPS = 5


@pytest.mark.parametrize("warmup", [True, False], ids=["tf1_ema", "ema"])
@pytest.mark.parametrize("which", ["sgd_agc_official", "sgd_agc_big_wd"])
def test_official_averages(which, warmup):
    reference = golden(f"optim_{which}.npz")
    decay = golden("optim.json")[which]["ema_decay"]
    update = jax.jit(partial(update_ema, decay=decay, warmup=warmup))
    names = [key.removeprefix("init:") for key in reference if key.startswith("init:")]
    average = {name: jnp.asarray(reference[f"init:{name}"]) for name in names}
    kind = "tf1_ema" if warmup else "ema"
    for step in range(STEPS):
        params = {name: reference[f"params{step}:{name}"] for name in names}
        average = update(average, params, step)
        for name in names:
            wanted = reference[f"{kind}{step}:{name}"]
            largest = max(np.max(np.abs(reference[f"init:{name}"])), np.max(np.abs(wanted)))
            error = np.max(np.abs(np.asarray(average[name]) - wanted))
            assert error <= 1e-6 * largest, (name, step)


def test_official_decay_at_many_steps():
    """From the first step to the one where 0.99999 is reached."""
    reference = golden("optim.json")["tf1_ema_effective_decay"]
    steps = jnp.asarray(reference["steps"], jnp.int32)
    for decay in ("0.99999", "0.9999"):
        # One step from 1 towards 0 shows the decay itself.
        update = jax.jit(partial(update_ema, decay=float(decay)))
        found = [float(update(jnp.ones(()), jnp.zeros(()), step)) for step in steps]
        np.testing.assert_allclose(found, reference[decay], rtol=1e-7)


def test_the_average_of_a_constant_does_not_drift():
    """Over a long run, where old and new weigh 0.99999 and 0.00001 in float32."""

    @jax.jit
    def run(value):
        def body(step, average):
            return update_ema(average, value, 10_000_000 + step)

        return jax.lax.fori_loop(0, 100_000, body, value)

    values = jnp.linspace(0.1, 1.7, 100)
    np.testing.assert_allclose(run(values), values, rtol=1e-6)


def test_leaves_keep_the_averages_dtype():
    average = {"a": jnp.ones(3, jnp.bfloat16), "b": jnp.ones(3)}
    params = {"a": jnp.zeros(3), "b": jnp.zeros(3, jnp.bfloat16)}
    found = update_ema(average, params, 0, decay=0.5, warmup=False)
    assert found["a"].dtype == jnp.bfloat16
    assert found["b"].dtype == jnp.float32
    np.testing.assert_array_equal(found["b"], 0.5)


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5])
def test_a_decay_outside_its_range_is_refused(decay):
    with pytest.raises(ValueError, match="decay must be at least 0 and less than 1"):
        update_ema(jnp.ones(1), jnp.ones(1), 0, decay=decay)
