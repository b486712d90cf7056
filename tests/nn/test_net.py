"""The network as its users meet it: shapes, modes, features, options, initial values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import nfflax
from nfflax.nn import role_of

SMALL = {
    "extends": "nfnet",
    "name": "small",
    "stem": {"width": [8, 16], "stride": [2, 1]},
    "stages": {"depth": [1, 3], "width": [32, 64], "stride": [1, 2], "group_width": 8},
    "head": {"num_classes": 7},
    "resolution": {"train": 32, "test": 32},
}
# A transition block and a stack of two, for what compiles a gradient.
TINY = {
    "extends": "nfnet",
    "name": "tiny",
    "stem": {"width": 8, "stride": 2},
    "stages": {"depth": [3], "width": 16, "stride": 1, "group_width": 8, "spatial_convs": 1},
    "head": {"num_classes": 7, "width_mult": 0},
    "resolution": {"train": 32, "test": 32},
}
KEY = jax.random.key(0)
FAMILIES = ["nfnet_f0", "nf_regnet_b0", "nf_seresnet50", "timm_eca_nfnet_l0", "resnet50_bn"]


def small(changes=None, **how):
    return nfflax.build(nfflax.load_spec(SMALL, changes), rngs=nnx.Rngs(0), **how)


def tiny(changes=None, **how):
    return nfflax.build(nfflax.load_spec(TINY, changes), rngs=nnx.Rngs(0), **how)


def abstract(spec, output_stride=None, **how):
    """The network without its arrays."""
    compiled = nfflax.plan(spec, output_stride=output_stride)
    return nnx.eval_shape(lambda: nfflax.NFNet(compiled, rngs=nnx.Rngs(0), **how))


def images(size=32, channels=3, batch=2):
    height, width = (size, size) if isinstance(size, int) else size
    return jax.random.normal(jax.random.key(1), (batch, height, width, channels))


def close(a, b, tolerance=1e-5):
    a, b = np.asarray(a), np.asarray(b)
    return np.abs(a - b).max() <= tolerance * np.abs(b).max()


# Compiled once per network: run op by op, each operation would compile alone.
@nnx.jit
def all_of(model, x):
    """(logits, maps, those of levels 3 and 1, final map)."""
    return model(x), model.features(x), model.features(x, [3, 1]), model.forward_features(x)


@pytest.fixture(scope="module")
def evaluated():
    return all_of(small(), images())


def gradients(model, x, key=None):
    def loss(model):
        return jnp.sum(jnp.tanh(model(x, train=key is not None, rngs=key)))

    return jax.tree.leaves(nnx.jit(nnx.grad(loss))(model))


# --- shapes and features -----------------------------------------------------------------------


# One of every structure; what else there is differs from these in depths and widths.
STRUCTURES = [
    *FAMILIES,
    "nf_resnet50",
    "nfnet_f0_bn",
    "nfnet_f1_plus",
    "nfnet_nano",
    "se_resnext_d_f0",
    "se_resnext_d_f0_width_conv",
    "timm_dm_nfnet_f0",
    "timm_nf_ecaresnet26",
    "timm_nf_regnet_b1",
    "timm_nf_seresnet26",
    "timm_nfnet_f0",
]


@pytest.mark.parametrize(
    "preset",
    [
        name if name in STRUCTURES else pytest.param(name, marks=pytest.mark.slow)
        for name in nfflax.list_specs()
    ],
)
def test_every_preset_has_the_planned_parameters(preset):
    model = abstract(preset)
    parameters = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert sum(p.size for p in parameters) == model.plan.params


@pytest.mark.parametrize("output_stride", [32, 16, 8])
@pytest.mark.parametrize("preset", FAMILIES)
def test_feature_info_tells_what_features_returns(preset, output_stride):
    model = abstract(preset, output_stride=output_stride)
    size = (64, 96)
    maps = jax.eval_shape(lambda m, x: m.features(x), model, jnp.zeros((2, *size, 3)))
    assert list(maps) == [info.level for info in model.feature_info]
    for info in model.feature_info:
        height, width = (s // info.stride for s in size)
        assert maps[info.level].shape == (2, height, width, info.channels)
        assert info.stride <= output_stride
    assert len({info.name for info in model.feature_info}) == len(maps)


@pytest.mark.parametrize("output_stride", [16, 8])
def test_output_stride_keeps_every_parameter(output_stride):
    shapes = [
        jax.tree.map(lambda p: p.shape, nnx.to_pure_dict(nnx.state(abstract("nfnet_f0", **how))))
        for how in ({}, {"output_stride": output_stride})
    ]
    assert shapes[0] == shapes[1]


@pytest.mark.slow
def test_a_dilated_network_sees_the_same_neighbours():
    """With dilations in place of strides the receptive field in pixels is nearly the same."""
    spec = nfflax.load_spec(
        {
            "extends": "nf_resnet",
            "name": "dilated",
            "stem": {"width": 8, "kernel": 3, "stride": 2, "pool": "none"},
            "stages": {"depth": 2, "width": [16] * 5, "stride": [1, 2, 2, 2, 2], "group_width": 0},
            "block": {"skip_gain": "ones"},
            "numerics": {"activation": "identity"},
            "head": {"num_classes": 0},
        }
    )
    x = jnp.zeros((1, 96, 96, 3))

    def reach(output_stride):
        model = nfflax.build(spec, rngs=nnx.Rngs(0), output_stride=output_stride)

        def centre(x):
            y = model.features(x, [6])[6]
            return jnp.sum(y[:, y.shape[1] // 2, y.shape[2] // 2])

        seen = np.abs(jax.jit(jax.grad(centre))(x)).sum((0, 2, 3)) > 0
        return int(seen.sum())

    assert abs(reach(32) - reach(8)) <= 16


def test_features_by_level(evaluated):
    _, every, chosen, _ = evaluated
    assert sorted(chosen) == [1, 3]
    assert all(close(chosen[level], every[level]) for level in chosen)
    with pytest.raises(
        ValueError, match=r"no feature level \[9\]: this network has \[1, 2, 3, 4\]"
    ):
        abstract(SMALL).features(images(), levels=[9])


def test_features_are_pre_activation(evaluated):
    """They lead to the logits by the documented way: activation, pooling, classifier."""
    logits, maps, _, final = evaluated
    last = maps[4]
    assert float(last.min()) < -0.5  # a GELU never gets there
    gelu = jax.nn.gelu(last) * 1.7015043497085571
    assert close(small().forward_head(gelu), logits)
    assert close(final, gelu)


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (33, 64), 32])
def test_any_input_size(size):
    assert jax.eval_shape(lambda m, x: m(x), abstract(SMALL), images(size)).shape == (2, 7)


@pytest.mark.parametrize("channels", [1, 4])
def test_any_channel_count(channels):
    how = {"in_channels": channels, "num_classes": 3}
    model = nnx.eval_shape(lambda: nfflax.create(SMALL, **how, rngs=nnx.Rngs(0)))
    run = lambda channels: jax.eval_shape(lambda m, x: m(x), model, images(8, channels))  # noqa: E731
    assert run(channels).shape == (2, 3)
    with pytest.raises(AssertionError, match="axis"):
        run(channels + 1)


def test_without_classes_it_returns_pooled_features():
    model = tiny({"head.num_classes": 0})
    pooled, final = nnx.jit(lambda model, x: (model(x), model.forward_features(x)))(model, images())
    assert pooled.shape == (2, model.num_features)
    assert close(pooled, final.mean((1, 2)))


# --- ways to run it ----------------------------------------------------------------------------


RANDOM = {"regularization.stochastic_depth": 0.5, "head.dropout": 0.3}


@pytest.fixture(scope="module")
def plain_gradients():
    return gradients(tiny(RANDOM), images(16), jax.random.key(3))


@pytest.mark.parametrize("how", [{"remat": "block"}, {"unroll": 2, "remat": "conv"}], ids=str)
def test_unroll_and_remat_change_no_number(how, plain_gradients):
    """Stochastic depth and dropout draw the same, too."""
    found = gradients(tiny(RANDOM, **how), images(16), jax.random.key(3))
    for a, b in zip(found, plain_gradients, strict=True):
        assert close(a, b) or np.abs(b).max() < 1e-6


@pytest.mark.slow
def test_remat_saves_memory():
    def temporary(remat):
        model = small({"stages.depth": [1, 6]}, remat=remat)
        graph, state = nnx.split(model)

        def loss(state, x):
            return jnp.sum(nnx.merge(graph, state)(x))

        compiled = jax.jit(jax.grad(loss)).lower(state, images(32, batch=8)).compile()
        analysis = compiled.memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    none, conv, block = (temporary(r) for r in ("none", "conv", "block"))
    assert block < conv < none


@pytest.mark.parametrize("preset", FAMILIES)
def test_every_family_keeps_the_compute_dtype(preset):
    model = abstract(preset, dtype=jnp.bfloat16)
    maps = jax.eval_shape(lambda m, x: m.features(x, train=True, rngs=KEY), model, images(64))
    assert {m.dtype for m in maps.values()} == {jnp.dtype("bfloat16")}


def test_bfloat16_computes_in_bfloat16_and_answers_in_float32(evaluated):
    model = small(dtype=jnp.bfloat16)
    assert {p.dtype for p in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("float32")}
    logits, maps, *_ = all_of(model, images())
    _, wanted, *_ = evaluated
    assert logits.dtype == jnp.float32
    assert maps[2].dtype == jnp.bfloat16
    assert close(maps[4].astype(jnp.float32), wanted[4], 0.05)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="unroll = 0"):
        small(unroll=0)
    with pytest.raises(ValueError, match="remat = 'all'"):
        small(remat="all")
    with pytest.raises(ValueError, match="output_stride = 4"):
        small(output_stride=4)


# --- modes and randomness ----------------------------------------------------------------------


CHANCES = {"regularization.stochastic_depth": 0.5, "head.dropout": 0.5, "block.skip_gain": "ones"}


def test_eval_is_the_default_and_draws_nothing():
    model = tiny(CHANCES)
    both = nnx.jit(lambda model, x: (model(x), model(x, train=False)))
    evaluated, explicit = both(model, images())
    assert close(evaluated, explicit, 0)
    model.train()
    with pytest.raises(ValueError, match=r"rngs=nnx\.Rngs"):
        model(images())
    model.eval()
    assert close(both(model, images())[0], evaluated, 0)


def test_training_draws_from_the_key_alone():
    model = tiny(CHANCES)
    model.train()
    run = nnx.jit(lambda model, rngs: model(images(), rngs=rngs))
    streams = nnx.Rngs(0)
    first, next_of_stream, again = (run(model, rngs) for rngs in (streams, streams, nnx.Rngs(0)))
    assert close(first, again, 0)
    assert not close(first, next_of_stream, 1e-3)  # each call draws anew from the stream


@pytest.mark.parametrize("scale_by_keep", [False, True])
def test_stochastic_depth_drops_whole_branches_at_the_planned_rate(scale_by_keep):
    changes = {
        "regularization.stochastic_depth": 0.8,
        "regularization.scale_by_keep": scale_by_keep,
        "stages.depth": [1, 1],
        "block.skip_gain": "ones",
    }
    model = small(changes)
    rate = model.plan.blocks[1].drop_rate
    assert rate == pytest.approx(0.4)
    x = jnp.broadcast_to(images(8, batch=1), (512, 8, 8, 3))

    @nnx.jit
    def maps(model, x, key):
        trained = model.features(x, [3], train=True, rngs=key)
        return model.features(x[:1], [3])[3], trained[3]

    before, after = maps(model, x, jax.random.key(0))
    kinds = np.unique(np.asarray(after).reshape(512, -1).round(4), axis=0)
    assert len(kinds) == 2  # each image keeps its branch or loses all of it
    is_eval = np.abs(np.asarray(after) - before).max((1, 2, 3)) < 1e-4
    if scale_by_keep:
        assert not is_eval.any()
    else:
        assert is_eval.mean() == pytest.approx(1 - rate, abs=0.07)


# --- initial values and roles ------------------------------------------------------------------


def parameters(model):
    return {
        ".".join(map(str, path)): variable
        for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }


def test_initial_values_follow_the_official_distributions():
    model = nfflax.build("nfnet_mini", rngs=nnx.Rngs(0))
    for name, variable in parameters(model).items():
        value = np.asarray(variable[...], np.float64)
        if name.endswith(("bias", "skip_gain")):
            assert not value.any(), name
        elif name.endswith("gain"):
            assert (value == 1).all(), name
        else:
            stacked = ".rest." in name
            fan_in = np.prod(value.shape[1:-1] if stacked else value.shape[:-1])
            std = 0.01 if name.startswith("classifier") else fan_in**-0.5
            if ".attention." in name:  # Haiku's linear layers: a normal cut at two deviations
                assert np.abs(value).max() <= 2 * std + 1e-6, name
                std *= 0.8796256610342398
            count = value.size
            assert value.std() == pytest.approx(std, rel=5 / np.sqrt(2 * count) + 1e-3), name
            assert abs(value.mean()) <= 5 * std / np.sqrt(count), name
            if count > 10_000 and ".attention." not in name:
                kurtosis = np.mean((value - value.mean()) ** 4) / value.var() ** 2
                assert kurtosis == pytest.approx(3, abs=0.25), name


def test_initial_values_differ_between_layers_and_seeds():
    first, second = (parameters(nfflax.build(SMALL, rngs=nnx.Rngs(s))) for s in (0, 1))
    kernels = [k for k in first if k.endswith("kernel")]
    assert all(not np.array_equal(first[k][...], second[k][...]) for k in kernels)
    stacked = first["stages.1.rest.conv1.kernel"][...]
    assert not np.array_equal(stacked[0], stacked[1])


@pytest.mark.parametrize(
    ("changes", "name", "value"),
    [
        ({"head.init": "zeros"}, "classifier.kernel", 0),
        ({"block.skip_gain": "ones"}, "stages.0.first.skip_gain", 1),
        ({"block.last_gain": "zeros"}, "stages.1.rest.conv2.gain", 0),
    ],
)
def test_initial_values_that_specs_choose(changes, name, value):
    assert (np.asarray(parameters(small(changes))[name][...]) == value).all()


@pytest.mark.parametrize("preset", FAMILIES)
def test_every_parameter_has_a_role(preset):
    for name, variable in parameters(abstract(preset)).items():
        role = role_of(variable)
        assert role is not None, name
        stacked = ".rest." in name
        rank = variable.ndim - stacked
        assert len(role.axes) == rank, name
        assert role.clip == (name != "classifier.kernel"), name
        assert role.decay == name.endswith("kernel"), name
        per_unit = np.prod(variable.shape[stacked:-1]) if rank else 1
        if rank >= 2 and per_unit > 1:
            assert role.unit_axes == tuple(range(-rank, -1)), name
        else:
            assert role.unit_axes == tuple(range(-rank, 0)), name


# --- batch normalisation -----------------------------------------------------------------------


NORMED = {"norm.kind": "batch", "numerics.gamma": "none", "block.skip_gain": "none"}
NORMED |= {"regularization.stochastic_depth": 0.0, "head.dropout": 0.0}


def test_batch_normalisation_tracks_statistics_through_the_scan():
    models = [tiny(NORMED, unroll=u) for u in (1, 2)]
    x = images(batch=8) * 3 + 1
    train = nnx.jit(lambda model, x: model(x, train=True))
    logits = [train(model, x) for model in models]
    assert np.isfinite(logits).all()
    first, second = (nnx.to_pure_dict(nnx.state(m, nnx.BatchStat)) for m in models)
    assert all(jax.tree.leaves(jax.tree.map(close, first, second)))
    stage = first["stages"][0]
    assert stage["rest"]["act0"]["norm"]["mean"].shape == (2, 16)
    for layer in range(2):  # every layer of the stack has seen its own input
        assert np.abs(stage["rest"]["act0"]["norm"]["mean"][layer]).min() > 0
    entering = models[0].stem(x, train=True)[0]
    np.testing.assert_allclose(
        stage["first"]["act0"]["norm"]["mean"], 0.1 * entering.mean((0, 1, 2)), atol=1e-4
    )
    # A normalised network forgets the scale of its input.
    assert close(train(models[0], 10 * x), logits[0], 1e-2)
