"""timm's config.json: of every network that both have, of variations, of what timm cannot say."""

import json

import pytest

import nfflax
from nfflax.spec.plan import plan
from nfflax.weights import WeightsError
from nfflax.weights.published import imagenet_classes
from nfflax.weights.timm_config import architectures, to_timm_config
from nfflax.weights.timm_network import read_timm_config

SMALL = {
    "stages.depth": [1, 1, 2, 1],
    "stages.width": [32, 64, 64, 96],
    "stages.group_width": 8,
    "head.num_classes": 7,
}
# Spec keys, and timm's words for them. timm 1.0.31 built each of these from the folder that
# hub_folder.py writes, and its logits were ours.
VARIED = {
    "timm_dm_nfnet_f0": (
        {**SMALL, "stem.width": [8, 16, 32, 64], "stem.in_channels": 1, "block.alpha": 0.3}
        | {"numerics.activation": "tanh", "preprocess.mean": 0.4, "preprocess.std": 0.2},
        {"depths": [1, 1, 2, 1], "channels": [32, 64, 64, 96], "stem_chs": 64, "alpha": 0.3}
        | {"group_size": 8, "num_features": 192, "act_layer": "tanh"},
    ),
    "timm_nf_regnet_b0": (
        {"stages.depth": [1, 2, 1, 1], "stages.width": [48, 96, 104, 200], "head.num_classes": 0},
        {"depths": [1, 2, 1, 1], "channels": [48, 96, 104, 200], "stem_chs": 40}
        | {"num_features": 960, "width_factor": 1.0},
    ),
    "timm_nf_seresnet26": (
        {"attention.ratio": 0.25, "head.pool": "max", "numerics.round_width": 1},
        {"attn_kwargs": {"rd_ratio": 0.25, "rd_divisor": 1}, "ch_div": 1, "global_pool": "max"},
    ),
    "timm_eca_nfnet_l0": (
        {"head.width_mult": 0.0, "attention.gain": 1.5, "stages.group_width": 0},
        {"num_features": 0, "attn_gain": 1.5, "group_size": 0},
    ),
    "timm_nf_resnet50": (
        {"stem.width": [24, 32, 64], "stem.kernel": 3, "stem.stride": [2, 1, 1]}
        | {"stem.pool": "none", "stages.stride": 2, "numerics.activation": "leaky_relu"},
        {"stem_type": "deep_tiered", "act_layer": "leaky_relu"},
    ),
}


def through_json(config):
    return json.loads(json.dumps(config))


def tables(spec):
    """A spec without what it is called."""
    return {k: v for k, v in spec.model_dump().items() if k not in ("name", "summary")}


@pytest.mark.parametrize("architecture", architectures())
def test_networks_that_timm_knows_by_name(architecture):
    spec = nfflax.load_spec(f"timm_{architecture}")
    config = through_json(to_timm_config(spec))
    assert config["architecture"] == architecture
    assert "model_args" not in config
    assert config["num_features"] == plan(spec).num_features
    found = read_timm_config(config, "config.json")
    assert (found.spec, found.preset, found.class_names) == (spec, spec.name, ())


@pytest.mark.parametrize("preset", VARIED)
def test_variations_are_keywords_of_the_nearest_architecture(preset):
    keys, arguments = VARIED[preset]
    spec = nfflax.load_spec(preset, keys)
    config = through_json(to_timm_config(spec, [str(n) for n in range(spec.head.num_classes)]))
    assert config["model_args"] == arguments
    assert config["architecture"] == preset.removeprefix("timm_")
    found = read_timm_config(config, "config.json")
    assert tables(found.spec) == tables(spec)
    assert found.preset == ""
    assert len(found.class_names) == spec.head.num_classes


def test_images():
    spec = nfflax.load_spec("timm_nfnet_f0", {"stem.in_channels": 2, "preprocess.mean": [0.1, 0.2]})
    spec = nfflax.load_spec(spec, {"preprocess.std": 0.5})
    about = to_timm_config(spec)["pretrained_cfg"]
    assert about["input_size"] == [2, 192, 192]
    assert about["test_input_size"] == [2, 256, 256]
    assert (about["mean"], about["std"]) == ([0.1, 0.2], [0.5, 0.5])
    assert (about["crop_pct"], about["crop_mode"], about["pool_size"]) == (0.9, "center", [6, 6])


def test_a_margin_becomes_the_fraction_that_resizes_to_the_same_size():
    for size in (160, 192, 224, 256, 288, 320, 512, 576):
        keys = {"resolution.test": size, "preprocess.crop_margin": 32}
        spec = nfflax.load_spec("timm_dm_nfnet_f0", keys | {"preprocess.crop_fraction": 1.0})
        crop = to_timm_config(spec)["pretrained_cfg"]["crop_pct"]
        assert int(size / crop) == size + 32


def test_what_timm_has_no_word_for_is_listed_key_by_key():
    def problems(preset, keys):
        with pytest.raises(WeightsError) as caught:
            to_timm_config(nfflax.load_spec(preset, keys))
        return [problem.partition(" = ")[0] for problem in caught.value.problems]

    official = ["numerics.activation", "numerics.ws_eps_mode"]
    assert problems("nfnet_f0", {}) == official
    assert problems("nfnet_f0_bn", {}) == [
        "norm.kind",
        "numerics.activation",
        "numerics.gamma",
        "numerics.ws_eps_mode",
    ]
    assert problems("nf_resnet50", {}) == [
        "stages.shortcut",
        "numerics.ws_eps_mode",
        "numerics.padding",
    ]
    several = {
        "stages.expansion": [0.25, 0.5, 0.5, 0.5],
        "stages.kernel": [3, 3, 5, 3],
        "stages.stride": [1, 2, 1, 2],
        "stem.kernel": 5,
        "attention.position": "inside",
        "stages.first_expansion": 1.0,
    }
    assert problems("timm_nfnet_f0", several) == [
        "stem",
        "stages.expansion",
        "stages.kernel",
        "stages.stride",
        "stages.first_expansion",
        "attention.position",
    ]
    five = {"stages.depth": [1] * 5, "stages.width": [256] * 5, "stages.stride": [1, 2, 2, 2, 2]}
    assert problems("timm_nfnet_f0", five) == ["stages.stride"]
    fractional = {"numerics.round_width": 1, "stages.expansion": 0.3, "stages.group_width": 0}
    assert problems("timm_nfnet_f0", fractional) == ["numerics.round_width"]


def config_of(arguments=None, **others):
    config = to_timm_config(nfflax.load_spec("timm_nfnet_l0"))
    return through_json(config | {"model_args": arguments or {}} | others)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (config_of(architecture="resnet50"), "'resnet50' is no normalizer-free.*nf_resnet50"),
        (config_of(architecture=None), "None is no normalizer-free"),
        (config_of(architecture=["x"]), "no normalizer-free"),
        (config_of(model_args=[]), "must be objects"),
        (config_of({"depth": [1, 1, 1, 1]}), "model_args.depth .* Did you mean depths"),
        (config_of({"depths": "1111"}), "must be whole numbers"),
        (config_of({"depths": [1, 1]}), "model_args.channels"),
        (config_of({"act_layer": "gelu_tanh"}), "model_args.act_layer"),
        (config_of({"attn_layer": "cbam"}), "model_args.attn_layer"),
        (config_of({"attn_kwargs": {"add_maxpool": True}}), "model_args.attn_kwargs"),
        (config_of({"ch_div": 1}), "model_args.attn_kwargs"),  # rounded to 8 all the same
        (config_of({"ch_div": 0}), "model_args.ch_div"),
        (config_of({"same_padding": True, "stem_type": "7x7_pool"}), "model_args.same_padding"),
        (config_of({"depths": [1] * 5, "channels": [64] * 5}), "model_args.depths"),
        (config_of({"group_size": 10**9}), "group_width"),
        (config_of({"num_classes": "many"}), "head.num_classes"),
        (config_of({"width_factor": float("inf")}), "width_factor"),
        (config_of(pretrained_cfg={"mean": ["a"]}), "preprocess.mean"),
        (config_of(pretrained_cfg={"input_size": [3, "x", "x"]}), "resolution.train"),
    ],
)
def test_configs_of_other_networks(config, message):
    with pytest.raises(WeightsError, match=message) as caught:
        read_timm_config(config, "config.json")
    assert caught.value.source == "config.json"


def test_an_older_config_without_tables():
    config = config_of()
    flat = {"architecture": "nfnet_l0.ra2_in1k", **config["pretrained_cfg"]}
    found = read_timm_config(flat, "config.json")
    assert found.spec == nfflax.load_spec("timm_nfnet_l0")
    assert found.class_names == imagenet_classes()


def test_arguments_beside_the_structure_are_known():
    """As `timm.models.save_for_hf` writes them with a model made by keywords."""
    arguments = {"in_chans": 1, "num_classes": 9, "global_pool": "max", "drop_path_rate": 0.1}
    found = read_timm_config(config_of(arguments, num_classes=5), "config.json")
    assert found.preset == "timm_nfnet_l0"
    assert (found.spec.stem.in_channels, found.spec.head.num_classes) == (1, 9)
    assert (found.spec.head.pool, found.spec.regularization.stochastic_depth) == ("max", 0.1)


def test_regnet_keywords_are_scaled_as_timm_scales_them():
    """Widths as timm writes them are before its factor 0.75, also when only some are given."""
    config = through_json(to_timm_config(nfflax.load_spec("timm_nf_regnet_b0")))
    config["model_args"] = {"depths": [1, 1, 1, 1]}
    found = read_timm_config(config, "config.json")
    assert found.spec.stages.width == nfflax.load_spec("timm_nf_regnet_b0").stages.width
    config["model_args"] = {"channels": [64, 128, 256, 512]}
    found = read_timm_config(config, "config.json")
    assert (found.spec.stem.width, found.spec.stages.width) == ((48,), (48, 96, 192, 384))
    assert plan(found.spec).num_features == 960


def test_imagenets_classes_are_said_as_timm_says_them():
    names = imagenet_classes()
    config = through_json(to_timm_config(nfflax.load_spec("timm_nfnet_l0"), names))
    assert config["label_names"][281] == "n02123045"
    assert config["label_descriptions"]["n02123045"] == "tabby, tabby cat"
    assert read_timm_config(config, "config.json").class_names == names
