"""From a run spec to the optimiser: groups, rules, layer-wise rates, the official train step."""

import warnings
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from golden_data import (
    abstract_model,
    formula_input,
    golden,
    haiku_formula_tree,
    normals,
    params,
    random_model,
    small_spec,
)

import nfflax
from nfflax.optim import RecipeWarning, cross_entropy, from_spec, metrics
from nfflax.spec.errors import SpecError
from nfflax.spec.load import load_run

SHALLOW = {"stages.depth": [1, 3], "stages.width": [8, 12], "stages.stride": [1, 2]}
AT_ONCE = {
    "schedule__kind": "constant",
    "schedule__warmup_epochs": 0,
}  # no warm-up from a rate of 0


def recipe(model: nnx.Module, **changes: Any) -> nfflax.optim.Recipe:
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    return from_spec(load_run("nfnet", changes), model)


@pytest.fixture(scope="module")
def network() -> nfflax.NFNet:
    return random_model(small_spec("nfnet_f0", SHALLOW))


def updates(found: nfflax.optim.Recipe, tree: Any) -> Any:
    """The first updates, for a gradient of all ones."""
    grads = jax.tree.map(np.ones_like, tree)
    return jax.jit(lambda grads, tree: found.tx.update(grads, found.tx.init(tree), tree)[0])(
        grads, tree
    )


def test_the_three_official_groups(network: nfflax.NFNet) -> None:
    found = recipe(network)
    described = [(g.name, g.decay, g.clip, g.learning_rate) for g in found.groups]
    assert sorted(described) == [
        ("bias, gain, skip_gain", 0.0, 0.01, 1.0),
        ("classifier.kernel", 2e-5, None, 1.0),
        ("kernel", 2e-5, 0.01, 1.0),
    ]
    assert sum(g.count for g in found.groups) == nfflax.plan(network.plan.spec).params
    names = [name for group in found.groups for name in group.parameters]
    assert len(set(names)) == len(names) == len(jax.tree.leaves(params(network)))
    assert found.warnings == ()


@pytest.mark.parametrize(
    "name", ["nf_regnet_b0", "nf_seresnet50", "timm_eca_nfnet_l0", "resnet50_bn"]
)
def test_every_kind_of_network_is_covered(name: str) -> None:
    groups = recipe(abstract_model(name)).groups
    assert sum(group.count for group in groups) == nfflax.plan(name).params


def test_parts_learn_slower_or_not_at_all(network: nfflax.NFNet) -> None:
    found = recipe(
        network,
        optimizer__layer_decay=0.5,
        optimizer__freeze=["stages.0", "final_conv.gain"],
        optimizer__weight_decay=0.0,
        agc__clipping=0,
        **AT_ONCE,
    )
    factors = {name: g.learning_rate for g in found.groups for name in g.parameters}
    assert factors["classifier.kernel"] == factors["final_conv.kernel"] == 1.0
    assert factors["stages.1.rest.conv1.kernel"] == factors["stages.1.first.conv1.kernel"] == 0.5
    assert factors["stages.0.first.conv1.kernel"] == factors["final_conv.gain"] == 0.0
    assert factors["stem.convs.0.kernel"] == 0.125
    tree = params(network)
    state = jax.eval_shape(found.tx.init, tree)
    traces = optax.tree.get(state, "trace")
    assert not jax.tree.leaves([traces["stages"][0], traces["final_conv"]["gain"]])
    assert jax.tree.structure(traces["stem"]) == jax.tree.structure(tree["stem"])
    moved = updates(found, tree)
    first_step = -1.9 * float(found.schedule(0))  # of Nesterov's momentum, for gradients of one
    for path, update in nnx.traversals.flatten_mapping(moved).items():
        wanted = first_step * factors[".".join(map(str, path))]
        np.testing.assert_allclose(update, np.full(update.shape, wanted), rtol=1e-6)


class Detector(nnx.Module):
    def __init__(self, backbone: nfflax.NFNet):
        self.backbone = backbone
        self.head = nnx.Linear(8, 4, rngs=nnx.Rngs(0))


def test_foreign_parameters_need_a_rule(network: nfflax.NFNet) -> None:
    model = Detector(network)
    with pytest.raises(SpecError, match=r"no rule matches them: head\.bias, head\.kernel"):
        recipe(model)
    rules = [
        {"match": "head.*"},
        {"match": "head.kernel", "clip": False, "learning_rate": 10.0, "unit_axes": [0]},
        {"match": "backbone.stem.*", "decay": False},
    ]
    found = recipe(model, optimizer__rules=rules)
    by_name = {name: g for g in found.groups for name in g.parameters}
    kernel, bias = by_name["head.kernel"], by_name["head.bias"]
    assert (kernel.decay, kernel.clip, kernel.learning_rate) == (2e-5, None, 10.0)
    assert (bias.decay, bias.clip, bias.learning_rate) == (0.0, 0.01, 1.0)
    assert by_name["backbone.stem.convs.0.kernel"].decay == 0
    assert by_name["backbone.final_conv.kernel"].decay == 2e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer__freeze": ["stage.0"]}, r"optimizer.freeze\[0\](.|\n)*mean: stages.0"),
        ({"optimizer__freeze": ["stem", "stages", "final_conv", "classifier"]}, "nothing to train"),
        ({"optimizer__rules": [{"match": "stem.conv.*"}]}, r"rules\[0\].match(.|\n)*no parameter"),
        ({"optimizer__rules": [{"match": "stem.*", "unit_axes": [3]}]}, "lacks some of these axes"),
    ],
)
def test_mistakes_are_named(network: nfflax.NFNet, changes: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        recipe(network, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer__kind": "adamw"}, "agc.clipping = 0.01 under adamw"),
        ({"optimizer__kind": "lion", "agc__clipping": 0}, "lion: losses of NFNets"),
        ({"optimizer__kind": "lars"}, "lars: stable, but worse"),
        ({"train__batch_size": 256}, "0.01 at batch size 256"),
    ],
)
def test_what_burnt_others_is_warned_of(network: nfflax.NFNet, changes: Any, message: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = recipe(network, **changes)
    assert [str(w.message) for w in caught] == list(found.warnings)
    assert {w.category for w in caught} == {RecipeWarning}
    assert any(message in text for text in found.warnings)


@pytest.mark.parametrize("kind", ["adamw", "lars", "lion"])
def test_other_optimisers_treat_a_stack_as_its_layers(kind: str, network: nfflax.NFNet) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RecipeWarning)
        changes = {"optimizer__kind": kind, "optimizer__weight_decay": 0.1, "agc__clipping": 0}
        found = recipe(network, **changes, **AT_ONCE, schedule__learning_rate=1e-3)
    tree = params(network)
    moved = updates(found, tree)["stages"][1]["rest"]["conv1"]
    weight = np.asarray(tree["stages"][1]["rest"]["conv1"]["kernel"])
    rate = float(found.schedule(0))
    if kind == "lars":
        grad = 1 + 0.1 * weight
        norm = lambda x: np.sqrt(np.sum(x**2, axis=(1, 2, 3, 4), keepdims=True))  # noqa: E731
        wanted = grad * 0.001 * norm(weight) / norm(grad) * 1.9  # Nesterov's first step
    else:
        wanted = 1 + 0.1 * weight  # both move by the sign first, then decay decoupled
    np.testing.assert_allclose(moved["kernel"], -rate * wanted, rtol=1e-4)
    bias = -rate * np.full((2, 3), 1.9 if kind == "lars" else 1.0)
    np.testing.assert_allclose(moved["bias"][:, :3], bias, rtol=1e-4)


def test_schedules_by_kind(network: nfflax.NFNet) -> None:
    cosine = recipe(network).schedule
    assert float(cosine(0)) == 0
    assert float(cosine(1564)) == pytest.approx(1.6)
    assert float(cosine(112_602)) == pytest.approx(0, abs=1e-6)
    constant = recipe(network, schedule__kind="constant", schedule__start=0.1).schedule
    assert [float(constant(step)) for step in (0, 5000)] == pytest.approx([0.1, 1.6])
    decaying = recipe(network, schedule__kind="exponential").schedule
    epoch = 1_281_167 / 4096
    assert float(decaying(round(5 * epoch + 2.4 * epoch * 3.5))) == pytest.approx(1.6 * 0.97**3)


def test_ema_and_gradient_follow_the_run(network: nfflax.NFNet) -> None:
    assert recipe(network, ema__decay=0).ema is None
    average = recipe(network, ema__decay=0.5).ema
    assert average is not None
    assert float(average(jnp.zeros(()), jnp.ones(()), 100)) == pytest.approx(0.5)

    def value_and_grad(params: Any, batch: Any, key: Any) -> Any:
        return (jnp.mean(batch) * params, {}), jnp.mean(batch**2) * params

    plain = recipe(network).gradient(value_and_grad)
    assert plain is value_and_grad
    batch, key = jnp.arange(8.0), jax.random.key(0)
    wrapped = recipe(network, train__accumulate=2, sam__rho=0.1, sam__fraction=0.5)
    (_, _), gradient = wrapped.gradient(value_and_grad)(jnp.ones(()), batch, key)
    assert float(gradient) == pytest.approx(1.1 * np.mean(np.arange(8.0) ** 2))


# --- the official train step -------------------------------------------------------------------

TINY = {
    "name": "train_nfnet_tiny",
    "extends": "nfnet",
    "stem": {"width": [16, 32, 64, 16]},
    "stages": {"depth": [1, 2, 2, 1], "width": [32, 64, 96, 96], "group_width": 16},
    "head": {"num_classes": 10, "dropout": 0.0},
    "regularization": {"stochastic_depth": 0.0},
    "resolution": {"train": 32, "test": 32},
}


RUN = {
    "extends": "nfnet",
    "name": "train_nfnet_tiny",
    "train": {"batch_size": 8, "steps": 10},
    "loss": {"label_smoothing": 0.1},
    "schedule": {"learning_rate": 0.4, "reference_batch": 0, "warmup_steps": 2.5},
}


def official_batch(step: int, *, mixed: bool) -> dict[str, Any]:
    """The reference's batches; an unmixed image is one with a ratio of 1."""

    def uniform(name: str, dtype: Any) -> np.ndarray:
        seed = zlib.crc32(f"train/{step}/{name}".encode())
        return np.random.Generator(np.random.PCG64(seed)).random(8, dtype=dtype)

    return {
        "images": formula_input((8, 32, 32, 3), f"train/{step}/images"),
        "labels": np.floor(uniform("labels", np.float64) * 10).astype(np.int32),
        "mix_labels": np.floor(uniform("mix_labels", np.float64) * 10).astype(np.int32),
        "ratio": uniform("ratio", np.float32) if mixed else np.ones(8, np.float32),
    }


def checks(tree: Any) -> np.ndarray:
    """Sum, norm and a projection of every tensor, by the official names in order."""
    rows = {}
    tree = jax.tree.map(np.asarray, tree)
    for module, arrays in nfflax.weights.to_deepmind(tree).items():
        for name, array in arrays.items():
            x = np.asarray(array, np.float64)
            probe = normals(f"probe/{module}/{name}", x.shape)
            rows[f"{module}/{name}"] = x.sum(), np.linalg.norm(x), np.vdot(x, probe)
    return np.array([rows[name] for name in sorted(rows)])


def test_the_official_train_step() -> None:
    """Loss, parameters, momentum and average over four steps, plain and with mixed labels."""
    reference = golden("train_nfnet_tiny.npz")
    with jax.default_matmul_precision("highest"):
        model = random_model(nfflax.load_spec(TINY))
        nfflax.weights.load_deepmind(model, haiku_formula_tree(model))
        run = load_run(RUN, {"model.dtype": "float32"})
        with pytest.warns(RecipeWarning, match="batch size 8"):
            found = from_spec(run, model)
        graph, start = nnx.split(model)

        def loss(tree: Any, batch: Any, _: Any) -> Any:
            logits = nnx.merge(graph, tree)(batch["images"], train=False)
            labels = batch["labels"], batch["mix_labels"], batch["ratio"]
            smoothing = run.loss.label_smoothing
            return cross_entropy(logits, *labels, label_smoothing=smoothing).mean(), {}

        gradient = found.gradient(jax.value_and_grad(loss, has_aux=True))
        average = found.ema
        assert average is not None

        @jax.jit
        def train_step(params: Any, ema: Any, state: Any, batch: Any, step: Any) -> Any:
            (value, _), grads = gradient(params, batch, jax.random.key(0))
            updates, state = found.tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            return params, average(ema, params, step), state, value

        first = nnx.to_pure_dict(start)
        first_state = jax.jit(found.tx.init)(first)
        for kind in ("steps", "steps_mixed"):
            params, ema, state = first, first, first_state
            for step in range(4):
                batch = official_batch(step, mixed=kind == "steps_mixed")
                params, ema, state, value = train_step(params, ema, state, batch, step)
                assert float(found.schedule(step)) == pytest.approx(
                    float(reference[f"{kind}/lr"][step]), rel=1e-6
                )
                assert float(value) == pytest.approx(
                    float(reference[f"{kind}/loss"][step]), rel=1e-4
                )
                trees = {"param": params, "ema": ema, "momentum": optax.tree.get(state, "trace")}
                for name, tree in trees.items():
                    wanted = reference[f"{kind}/{name}_checks{step}"]
                    error = np.abs(checks(tree) - wanted).max(axis=1)
                    floor = 1e-7 * np.linalg.norm(wanted[:, 1])
                    assert np.all(error <= 1e-4 * wanted[:, 1] + floor), (kind, step, name)
            assert 0 < float(metrics(state)["clipped"]) <= 1
