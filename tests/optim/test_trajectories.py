"""Trajectories of the official optimisers, step by step, on stacked and unstacked parameters."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from golden_data import golden, normals

import nfflax
from nfflax.nn.roles import SCALAR_ROLE, Role, kernel_role, vector_role
from nfflax.optim.directions import sgd
from nfflax.optim.schedules import warmup_cosine

OFFICIAL = ["sgd_agc_official", "sgd_agc_big_wd", "sgd_agc_no_nesterov", "sgd_regnet"]
STEPS = 5


def role_for(name: str, shape: tuple[int, ...]) -> Role:
    if len(shape) < 2:
        return vector_role() if shape else SCALAR_ROLE
    return kernel_role(shape, clip=name != "NFNet/~/linear/w")


def start(reference: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {k.removeprefix("init:"): v for k, v in reference.items() if k.startswith("init:")}


def gradients(step: int, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """The reference gradients of a step: large and small steps, units of four magnitudes."""
    scale = [1.0, 0.1, 0.01, 1.0, 0.001][step]
    found = {}
    for name, shape in shapes.items():
        gradient = normals(f"grad/{step}/{name}", shape) * scale
        if shape:
            gradient = gradient * 10.0 ** -(np.arange(shape[-1]) % 4)
        found[name] = gradient.astype(np.float32)
    return found


class Unstacked:
    """One variable per tensor."""

    def pack(self, tensors: dict[str, np.ndarray], roles: dict[str, Role]) -> nnx.State:
        variables: dict[Any, Any] = {
            (name,): nnx.Param(jnp.asarray(value), role=roles[name])
            for name, value in tensors.items()
        }
        return nnx.from_flat_state(variables)

    def unpack(self, state: Any) -> dict[str, np.ndarray]:
        return {str(path[0]): np.asarray(value[...]) for path, value in nnx.to_flat_state(state)}


class Stacked:
    """Tensors of equal shape and role as layers of one variable, under a layer of other numbers."""

    def pack(self, tensors: dict[str, np.ndarray], roles: dict[str, Role]) -> nnx.State:
        groups: dict[Any, list[str]] = {}
        for name, value in tensors.items():
            groups.setdefault((value.shape, roles[name]), []).append(name)
        self.names: dict[Any, list[str]] = {("|".join(names),): names for names in groups.values()}
        variables: dict[Any, Any] = {}
        for (shape, role), names in groups.items():
            decoy = 1000 * normals("decoy", shape)
            layers = np.stack([*(tensors[name] for name in names), decoy])
            variables["|".join(names),] = nnx.Param(jnp.asarray(layers, jnp.float32), role=role)
        return nnx.from_flat_state(variables)

    def unpack(self, state: Any) -> dict[str, np.ndarray]:
        return {
            name: np.asarray(layers[...])[i]
            for path, layers in nnx.to_flat_state(state)
            for i, name in enumerate(self.names[path])
        }


@pytest.mark.parametrize("layout", [Unstacked, Stacked])
@pytest.mark.parametrize("which", OFFICIAL)
def test_official_trajectory(which: str, layout: type) -> None:
    settings = golden("optim.json")[which]
    reference = golden(f"optim_{which}.npz")
    kwargs = settings["kwargs"]
    schedule = settings["schedule"]["kwargs"]
    rate = official_schedule(schedule)
    tx = sgd(
        rate,
        momentum=kwargs["momentum"],
        nesterov=bool(kwargs["nesterov"]),
        dampening=kwargs.get("dampening", 0.0),
        weight_decay=kwargs["weight_decay"],
        clipping=kwargs.get("clipping"),
        eps=kwargs.get("eps", 1e-3),
    )
    begin = start(reference)
    shapes = {name: value.shape for name, value in begin.items()}
    roles = {name: role_for(name, shape) for name, shape in shapes.items()}
    layout = layout()
    params = layout.pack(begin, roles)
    state = tx.init(params)

    @jax.jit
    def train_step(params: nnx.State, state: Any, grads: nnx.State) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for step in range(STEPS):
        grads = layout.pack(gradients(step, shapes), roles)
        params, state = train_step(params, state, grads)
        found = layout.unpack(params)
        momenta = layout.unpack(optax.tree.get(state, "trace"))
        assert float(rate(step)) == pytest.approx(reference["lr"][step], rel=1e-6)
        for name in shapes:
            largest = max(np.max(np.abs(reference[f"params{t}:{name}"])) for t in range(STEPS))
            close(found[name], reference[f"params{step}:{name}"], largest)
            close(momenta[name], reference[f"momentum{step}:{name}"])


@pytest.mark.parametrize(("clipping", "eps"), [(0.01, 1e-3), (0.02, 0.01), (0.16, 1e-3)])
def test_clipping_alone_matches_the_official_transform(clipping: float, eps: float) -> None:
    """Bare arrays: the rule by rank is the official one, the classifier clipped as well."""
    reference = golden("optim_agc_optax.npz")
    params = start(golden("optim_sgd_agc_official.npz"))
    tx = nfflax.agc(clipping, eps)
    state = tx.init(params)
    update = jax.jit(tx.update)
    for step in range(STEPS):
        grads = gradients(step, {name: value.shape for name, value in params.items()})
        if step == 0:
            close(grads["NFNet/~/linear/w"], reference["grad0:NFNet/~/linear/w"])
        clipped, state = update(grads, state, params)
        for name in params:
            close(clipped[name], reference[f"clip{clipping:g}_eps{eps:g}_step{step}:{name}"])


@pytest.mark.parametrize("name", ["nfnet_4096_360ep", "nf_regnet_1024_360ep", "resnet_1024_90ep"])
def test_official_schedules(name: str) -> None:
    check_schedule(golden("schedules.json")[name])


def test_a_short_schedule_past_its_end() -> None:
    check_schedule(golden("schedules.json")["small"])


def official_schedule(kwargs):
    peak, steps, warmup = (kwargs[k] for k in ("max_val", "num_steps", "warmup_steps"))
    return warmup_cosine(peak, steps, warmup, start=kwargs["start_val"], end=kwargs["min_val"])


def check_schedule(reference: dict[str, Any]) -> None:
    kwargs = reference["kwargs"]
    rate = official_schedule(kwargs)
    found = jax.vmap(rate)(jnp.asarray(reference["steps"]))
    np.testing.assert_allclose(found, reference["f64"], rtol=0, atol=1e-6 * kwargs["max_val"])


def close(found: Any, wanted: np.ndarray, scale: float = 0.0) -> None:
    """Within 1e-6 of the largest entry, here or (`scale`) anywhere on the tensor's trajectory.

    A skip gain that starts at 0 crosses it again: there, steps cancel that are 20 times larger.
    """
    scale = max(scale, float(np.max(np.abs(wanted), initial=0)))
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6 * scale)
