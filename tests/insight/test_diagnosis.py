"""Sound networks pass, and every way to spoil the signal is called by its name."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import nfflax
import nfflax.nn.activations
import nfflax.nn.wsconv
import nfflax.spec.activations
from nfflax.insight import Report, diagnose
from nfflax.insight.spp import input_of

SMALL = {
    "extends": "nf_resnet",
    "name": "small",
    "stem": {"width": 16, "kernel": 3, "stride": 1, "pool": "none"},
    "stages": {"depth": [1, 2], "width": [32, 64], "stride": [1, 2]},
    "resolution": {"train": 16, "test": 16},
}
NOISE = np.random.default_rng(0).standard_normal((4, 16, 16, 3), np.float32)

FAULTY = {
    "mish_with_gamma_of_relu": (jax.nn.mish, 1.714),
    "silu_20_percent_off": (jax.nn.silu, 1.788 * 1.2),
    "constant": (jnp.ones_like, 1.0),
    "root": (jnp.sqrt, 1.0),
}


@pytest.fixture(scope="module", autouse=True)
def faulty_activations():
    """Known here only: other tests go through all that there are."""
    for name, (function, gamma) in FAULTY.items():
        nfflax.register_activation(name, function, gamma)
    yield
    for name in FAULTY:
        del nfflax.nn.activations._registry[name]
        nfflax.spec.activations._names.discard(name)


def network(changes: dict[str, Any]) -> nfflax.NFNet:
    return nfflax.build(nfflax.load_spec(SMALL, changes), rngs=nnx.Rngs(0))


def found_in(changes: dict[str, Any]) -> Report:
    return diagnose(network(changes), NOISE)


def test_parts_that_are_not_as_the_spec_says():
    """One network with four of them: each is named apart."""
    model = network({})
    for stage in model.stages:  # beta goes on from one stage to the next
        places = range(stage.start, stage.start + len(stage.betas))
        stage.betas = tuple((1 + 0.04 * place) ** -0.5 for place in places)
    second = model.stages[1]
    assert second.rest is not None
    second.rest.alpha = 1.0
    second.first.act1.scaled = False
    model.stem.convs[0].kernel[...] += 1  # standardisation removes it, as it should
    model.stages[0].first.conv2 = nfflax.nn.wsconv.Conv(8, 32, (1, 1), rngs=nnx.Rngs(0))
    report = diagnose(model, NOISE)
    assert [fault.kind for fault in report.faults] == ["gamma", "kernels", "beta", "alpha"]
    gamma, kernels, beta, alpha = map(str, report.faults)
    assert "gamma of `relu` is not applied" in gamma
    assert "stages.1.blocks.0" in gamma
    assert "weights are not standardised in 1 of 12 convolutions" in kernels
    assert beta.startswith("stages.1.blocks.1 sees 0.96 of the variance it should: ")
    assert "beta is never reset" in beta
    assert "grows 1.9" in alpha
    assert "in stage 1, planned 1.04x: alpha of stages.1.blocks.1 is 1, not 0.2" in alpha


def test_no_weight_standardization_and_a_wrong_gamma(monkeypatch):
    plain = lambda w, gain, *_: (w, gain, jnp.zeros_like(gain))  # noqa: E731
    monkeypatch.setattr(nfflax.nn.wsconv, "_measured", plain)
    report = found_in({"numerics.activation": "mish_with_gamma_of_relu"})
    gamma, kernels = map(str, report.faults)
    assert "gamma of `mish_with_gamma_of_relu` is 1.714 and should be 1.592; each" in gamma
    assert "weights are not standardised in 12 of 12 convolutions" in kernels
    means = report.curves["avg_sq_mean"] / report.curves["avg_var"]
    assert means[-1] > 10 * means[0]
    assert f"reaches {means.max():.2g} of their variance" in kernels


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "kind", "said"),
    [
        ({"numerics.activation": "silu_20_percent_off"}, "gamma", "is 2.146 and should be 1.78"),
        ({"numerics.gamma": "none"}, "gamma", 'is not applied (numerics.gamma = "none")'),
        ({"numerics.activation": "constant"}, "dead activation", "activation `constant` is dead"),
        ({"numerics.activation": "root"}, "not finite", "activation `root` made it of finite"),
        ({"block.alpha": 1}, "alpha", "block.alpha = 1 lets every block add 1 to"),
        ({"attention.kind": "se", "attention.gain": 1}, "attention", "attention.gain = 1, and 2"),
        ({"numerics.ws_eps_mode": "add", "numerics.ws_eps": 0.1}, "kernels", "ws_eps = 0.1"),
    ],
)
def test_specs_that_spoil_the_signal(changes, kind, said):
    report = found_in(changes)
    assert said in str(report)
    assert report.faults[0].kind == kind
    assert not report.healthy


@pytest.mark.slow
def test_no_beta():
    model = network({})
    for stage in model.stages:
        stage.betas = tuple(1.0 for _ in stage.betas)
    (fault,) = diagnose(model, NOISE).faults
    assert "beta is not applied, every block multiplies by 1" in fault.text


@pytest.mark.slow
def test_one_wrong_beta_and_where_nan_begins():
    model = network({})
    first, rest = model.stages[1].betas
    model.stages[1].betas = first, rest / 2
    model.final_act.scaled = False
    model.stages[0].first.conv1.kernel[...] *= jnp.nan
    report = diagnose(model, NOISE)
    assert report.faults[0].text == (
        "NaN or infinity from stages.0.blocks.0 on: conv1 made it of finite values"
    )
    assert np.isnan(report.curves["avg_var"][1:]).all()


@pytest.mark.slow
def test_the_curves_are_those_of_signals():
    """And the model is left as it was, its zeros included."""
    model = network({})
    before = jax.tree.map(np.asarray, nnx.state(model))
    report = diagnose(model, NOISE)
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, nnx.state(model)))
    ones = nfflax.signals(network({"block.skip_gain": "ones"}), NOISE)
    for name, curve in report.curves.items():
        np.testing.assert_allclose(curve, ones[name], rtol=1e-4, atol=1e-6)
    assert report.expected is not None
    np.testing.assert_allclose(report.expected, [1, 1.04, 1.04, 1.08])
    assert report.healthy
    with pytest.raises(ValueError, match="this small is folded"):
        diagnose(nfflax.fold(model), NOISE)


@pytest.mark.slow
def test_gains_that_have_trained_are_no_fault():
    model = network({"attention.kind": "se", "block.skip_gain": "ones"})
    for stage in model.stages:
        assert isinstance(stage.first.conv2, nfflax.nn.WSConv)
        stage.first.conv2.gain[...] = 3.0
        stage.first.skip_gain[...] = 0.3
        stage.first.attention.fc1.bias[...] += 2.0
    assert diagnose(model, NOISE).faults == ()


# One of each kind of network, a small one; the others have more parts of the same kinds.
KINDS = (
    "nfnet_nano nfnet_micro nfnet_f0 nfnet_f0_plus nfnet_f0_bn nf_regnet_b0 nf_resnet50 "
    "nf_seresnet50 resnet50_bn se_resnext_d_f0 timm_dm_nfnet_f0 timm_nfnet_f0 timm_test_nfnet "
    "timm_eca_nfnet_l0 timm_nf_regnet_b0 timm_nf_resnet26 timm_nf_seresnet26 timm_nf_ecaresnet26"
).split()
SIZES = re.compile(
    r"(stem|stages)\.width|stages\.group_width|(head|regularization|resolution|preprocess)\..*"
)


def shortened(name: str) -> nfflax.Spec:
    """A shipped network's first two stages, of which parts the later ones consist too."""
    stages = nfflax.load_spec(name).stages
    columns = {f"stages.{key}": list(getattr(stages, key)[:2]) for key in stages.columns}
    return nfflax.load_spec(name, columns | {"stages.depth": [1, 2]})


def kind_of(name: str) -> tuple[str, ...]:
    """What a network consists of, however large."""
    values = shortened(name).values_by_key().items()
    return tuple(f"{key} = {value}" for key, value in values if not SIZES.fullmatch(key))


def test_every_kind_of_network_is_looked_at():
    assert {kind_of(name) for name in nfflax.list_specs()} == {kind_of(name) for name in KINDS}
    assert len({kind_of(name) for name in KINDS}) == len(KINDS)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_shipped_networks_are_sound(name):
    model = nfflax.build(shortened(name), rngs=nnx.Rngs(0))
    shape = 2, 32, 32, model.spec.stem.in_channels
    report = diagnose(model, np.random.default_rng(0).standard_normal(shape, np.float32))
    assert report.faults == ()
    assert (report.expected is None) == (model.spec.norm.kind == "batch")


def test_the_work_of_a_measurement_is_bounded():
    for name in ("nfnet_nano", "nfnet_f0", "nfnet_f7"):
        spec = nfflax.load_spec(name)
        images, size = input_of(spec)
        assert 1 <= images <= 8
        assert images * nfflax.plan(spec, resolution=size).macs() <= 16e9
