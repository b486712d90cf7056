"""The networks equal the official code and timm, number for number, on formula weights."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from golden_data import formula_input, golden, haiku_formula_tree, normals, timm_formula_state

import nfflax

# The official test network (index.json, train_nfnet_tiny): 210,528 parameters, 32-pixel images.
TINY = {
    "extends": "nfnet",
    "name": "tiny",
    "stem": {"width": [16, 32, 64, 16]},
    "stages": {"depth": [1, 2, 2, 1], "width": [32, 64, 96, 96], "group_width": 16},
    "head": {"num_classes": 10},
    "regularization": {"stochastic_depth": 0.0},
    "resolution": {"train": 32, "test": 32},
}
WIDTH_1 = {"stem.width": 48, "stages.width": [48, 104, 208, 440], "head.width": 1280}
OFFICIAL = [
    ("forward_nfnet_f0", "nfnet_f0", {}),
    ("forward_nfnet_f0_relu", "nfnet_f0", {"numerics.activation": "relu"}),
    ("forward_nf_resnet50", "nf_resnet50", {}),
    ("forward_nf_regnet_b0", "nf_regnet_b0", {}),
    ("forward_nf_regnet_b0_width1", "nf_regnet_b0", WIDTH_1),
]
SIGNALS = ("avg_sq_mean", "avg_var", "res_avg_var")


@pytest.fixture(autouse=True)
def _full_precision():
    with jax.default_matmul_precision("highest"):
        yield


def relative_error(found, wanted) -> float:
    return float(np.abs(np.asarray(found) - wanted).max() / np.abs(wanted).max())


def official_model(spec, **how):
    model = nfflax.build(spec, rngs=nnx.Rngs(0), **how)
    nfflax.weights.load_deepmind(model, haiku_formula_tree(model))
    return model


def smoothed_loss(logits, labels):
    targets = optax.smooth_labels(jax.nn.one_hot(labels, 10), 0.1)
    return optax.softmax_cross_entropy(logits, targets).mean()


@pytest.mark.parametrize(
    ("remat", "unroll"),
    [
        ("conv", 4),
        pytest.param("none", 1, marks=pytest.mark.slow),
        pytest.param("block", 4, marks=pytest.mark.slow),
    ],
)
def test_loss_and_every_gradient_equal_the_official_ones(remat, unroll):
    wanted = golden("train_nfnet_tiny.npz")
    model = official_model(TINY, unroll=unroll, remat=remat)
    images = formula_input((8, 32, 32, 3), "train/0/images")
    labels = wanted["plain/labels"]

    @nnx.jit
    def run(model):
        def loss(model):
            logits = model(images)
            return smoothed_loss(logits, labels), logits

        return nnx.value_and_grad(loss, has_aux=True)(model)

    (loss, logits), gradients = run(model)
    assert relative_error(logits, wanted["plain/logits"]) <= 1e-5
    assert float(loss) == pytest.approx(float(wanted["plain/loss"]), abs=1e-6)
    found = {
        f"{module}/{name}": gradient
        for module, params in nfflax.weights.to_deepmind(gradients).items()
        for name, gradient in params.items()
    }
    whole = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in found.values()))
    names = sorted(found)
    assert len(names) == len(wanted["plain/grad_checks"])
    for name, (total, norm, probe) in zip(names, wanted["plain/grad_checks"], strict=True):
        gradient = found[name].astype(np.float64)
        bound = 1e-4 * norm + 1e-7 * whole
        assert abs(gradient.sum() - total) <= bound * max(1, gradient.size**0.5), name
        assert abs(np.linalg.norm(gradient) - norm) <= bound, name
        shape = gradient.shape
        assert abs(np.vdot(gradient, normals(f"probe/{name}", shape)) - probe) <= bound * 4, name
    for key in (k for k in wanted if k.startswith("plain/grad:")):
        difference = np.linalg.norm(found[key.removeprefix("plain/grad:")] - wanted[key])
        assert difference <= 1e-4 * np.linalg.norm(wanted[key]) + 1e-7 * whole, key


@pytest.mark.slow
@pytest.mark.parametrize("unroll", [1, 6])
@pytest.mark.parametrize(("file", "preset", "changes"), OFFICIAL)
def test_forward_and_signals_equal_the_official_ones(file, preset, changes, unroll):
    wanted = golden(f"{file}.npz")
    model = official_model(nfflax.load_spec(preset, changes), unroll=unroll)
    for case in sorted({k.removeprefix("logits_") for k in wanted if k.startswith("logits_")}):
        images = formula_input((len(wanted[f"logits_{case}"]), *image_size(case), 3))
        logits = nnx.jit(lambda model, x: model(x))(model, images)
        assert relative_error(logits, wanted[f"logits_{case}"]) <= 1e-5
        found = nfflax.signals(model, images)
        for name in SIGNALS:
            assert relative_error(found[name], wanted[f"{name}_{case}"]) <= 1e-5


RESNET = {
    "extends": "nf_resnet",
    "name": "resnet",
    "stem": {"width": 16},
    "stages": {"depth": [1, 2, 2, 1], "width": [64, 128, 256, 512]},
    "head": {"num_classes": 10},
}
REGNET = {
    "extends": "nf_regnet",
    "name": "regnet",
    "stem": {"width": 36},
    "stages": {"depth": [2, 1, 3, 1], "width": [36, 78, 156, 330]},
    "head": {"width": 960, "num_classes": 10},
}
ODD_SIZES = {
    "tiny": (TINY, {}, (2, 37, 50, 3)),
    "tiny_onec": (
        TINY,
        {
            "stages.spatial_convs": 1,
            "attention.ratio": 0.25,
            "block.alpha": 0.3,
            "numerics.activation": "silu",
            "head.width_mult": 0,
            "head.width": 50,
            "head.num_classes": 7,
        },
        (3, 65, 33, 3),
    ),
    "odd": (
        TINY,
        {
            "stem.width": [16, 32, 64, 20],
            "stages.depth": [2, 1, 3, 2],
            "stages.width": [40, 72, 96, 96],
            "stages.group_width": 8,
            "stages.fit_groups": "down",
            "stages.expansion": [0.5, 1.0, 0.25, 0.75],
            "stages.expansion_of": ["out", "in", "out", "in"],
            "numerics.activation": "tanh",
        },
        (2, 41, 41, 3),
    ),
    "gray": (TINY, {"stem.in_channels": 1, "numerics.activation": "softplus"}, (2, 32, 48, 1)),
    "resnet": (RESNET, {}, (2, 50, 39, 3)),
    "resnet_se": (
        RESNET,
        {"attention.kind": "se", "attention.ratio": 0.25, "numerics.activation": "elu"},
        (2, 47, 65, 3),
    ),
    "regnet": (REGNET, {}, (2, 61, 75, 3)),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", ODD_SIZES)
def test_odd_sizes_and_options_equal_the_official_ones(case):
    """Logits, signals and gradients of sum(sin(logits)), on images the strides do not divide."""
    wanted = golden("odd_sizes.npz")
    base, changes, shape = ODD_SIZES[case]
    model, images = official_model(nfflax.load_spec(base, changes)), formula_input(shape)
    logits = nnx.jit(lambda model, x: model(x))(model, images)
    assert relative_error(logits, wanted[f"{case}/logits"]) <= 1e-5
    for name, found in nfflax.signals(model, images).items():
        assert relative_error(found, wanted[f"{case}/{name}"]) <= 1e-5
    gradients = nnx.jit(nnx.grad(lambda model: jnp.sum(jnp.sin(model(images)))))(model)
    tree = nfflax.weights.to_deepmind(gradients)
    found = {f"{module}/{k}": g for module, params in tree.items() for k, g in params.items()}
    norms = [np.linalg.norm(found[name].astype(np.float64)) for name in sorted(found)]
    np.testing.assert_allclose(norms, wanted[f"{case}/grad_norms"], rtol=1e-4)


def image_size(case: str) -> tuple[int, int]:
    """The size in a golden key: "64", or "60x92" where it is not square."""
    height, _, width = case.partition("x")
    return int(height), int(width or height)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dm_nfnet_f0", "nf_resnet50", "nfnet_l0"])
def test_timm_presets_equal_timm(name):
    wanted = golden(f"timm_{name}.npz")
    model = nfflax.build(f"timm_{name}", rngs=nnx.Rngs(0))
    nfflax.weights.load_timm(model, timm_formula_state(model))
    for case in (64, 96):
        images = formula_input((2, case, case, 3))
        logits = nnx.jit(lambda model, x: model(x))(model, images)
        assert relative_error(logits, wanted[f"logits_{case}"]) <= 1e-5
        stages = nnx.jit(lambda model, x: model.features(x))(model, images)
        means = [float(jnp.mean(stages[level])) for level in (2, 3, 4, 5)]
        assert np.allclose(means, wanted[f"stage_stats_{case}"][1:5, 0], atol=1e-5)
