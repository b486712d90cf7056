"""Other image channels and classes: the same answers to the same pictures, and what is refused."""

from typing import Any, cast

import numpy as np
import pytest
from flax import nnx
from golden_data import params, random_model, small_spec

import nfflax
from nfflax.nn.wsconv import WSConv
from nfflax.optim.roles import leaves_by_path
from nfflax.weights import WeightsError
from nfflax.weights.adapt import (
    adapted_spec,
    channel_mix,
    new_classifier,
    with_channels,
)

KERNEL, GAIN = ("stem", "convs", 0, "kernel"), ("stem", "convs", 0, "gain")
# The official floor, timm's epsilon with gamma in the kernel, and plain convolutions.
PRESETS = ["nfnet_f0", "timm_nfnet_l0", "resnet50_bn"]


def first_conv(preset: str, in_channels: int = 3):
    """(spec, arrays by path, the convolution), with one unit of each odd kind."""
    spec = small_spec(preset, {"stem.in_channels": in_channels, "stages.depth": 1})
    model = random_model(spec)
    conv = model.stem.convs[0]
    w_HWIO = np.array(conv.kernel[...])
    w_HWIO[..., 0] = 3.0  # standardises to nothing
    w_HWIO[..., 1] *= 1e-4  # below the floor
    conv.kernel[...] = w_HWIO
    if isinstance(conv, WSConv):
        conv.gain[...] = conv.gain[...].at[2].set(0.0).at[3].set(-2.0)
    return spec, leaves_by_path(params(model)), conv


def effective(conv, values) -> np.ndarray:
    """The kernel that images are convolved with."""
    if not isinstance(conv, WSConv):
        return np.asarray(values[KERNEL])
    w_HWIO = np.asarray(values[KERNEL], np.float64)
    var_O, fan_in = w_HWIO.var((0, 1, 2)), np.prod(w_HWIO.shape[:3])
    if conv.eps_mode == "floor":
        scale_O = np.maximum(var_O * fan_in, conv.eps) ** -0.5
    else:
        scale_O = (var_O + conv.eps) ** -0.5 * fan_in**-0.5
    return (w_HWIO - w_HWIO.mean((0, 1, 2))) * scale_O * values[GAIN] * conv.scale


@pytest.mark.parametrize("preset", PRESETS)
def test_the_new_kernel_is_the_old_one_after_the_mix_of_channels(preset):
    spec, values, conv = first_conv(preset)
    old_HWIO = effective(conv, values)
    for channels in (1, 2, 4, 5, 6, 8):
        new = with_channels(values, spec, channels)
        wanted_HWIO = np.einsum("hwio,ij->hwjo", old_HWIO, channel_mix(3, channels))
        found_HWIO = effective(conv, new)
        for found, wanted in zip(found_HWIO.T, wanted_HWIO.T, strict=True):
            assert np.abs(found - wanted).max() <= 1e-6 * np.abs(wanted_HWIO).max()
        if isinstance(conv, WSConv):
            assert not new[KERNEL][..., 0].any()
            assert not found_HWIO[..., 2].any()
            assert new[KERNEL][
                ..., 2
            ].any()  # a unit that was switched off keeps what it has learnt
            assert np.sign(new[GAIN][3]) == np.sign(values[GAIN][3])
            fan_in = 9 * channels
            np.testing.assert_allclose(new[KERNEL][..., 2:].var((0, 1, 2)) * fan_in, 1, rtol=1e-5)
        others = new.keys() - {KERNEL, GAIN}
        assert all(new[path] is values[path] for path in others)
        assert {array.dtype for array in new.values()} == {np.dtype(np.float32)}


def test_a_network_answers_to_grey_and_to_repeated_colours_as_it_did():
    spec = small_spec("nfnet_f0", {"stages.depth": 1, "stages.width": 8})
    model = random_model(spec)
    values, before = leaves_by_path(params(model)), cast(Any, model.stem.convs[0])
    rng = np.random.default_rng(0)
    grey_NHWC = rng.normal(size=(2, 32, 32, 1)).astype(np.float32)
    colour_NHWC = rng.normal(size=(2, 32, 32, 3)).astype(np.float32)
    for rgb_NHWC, seen_NHWC in [
        (grey_NHWC.repeat(3, -1), grey_NHWC),
        (colour_NHWC, np.tile(colour_NHWC, 2)[..., :5]),
    ]:
        channels = seen_NHWC.shape[-1]
        conv: Any = random_model(adapted_spec(spec, in_channels=channels)).stem.convs[0]
        new = with_channels(values, spec, channels)
        conv.kernel[...], conv.gain[...] = new[KERNEL], new[GAIN]
        conv.bias[...] = before.bias[...]
        wanted = np.asarray(before(rgb_NHWC))
        assert np.abs(np.asarray(conv(seen_NHWC)) - wanted).max() <= 5e-6 * np.abs(wanted).max()


def test_from_and_to_one_channel_and_what_has_no_meaning():
    for before, after in [(3, 1), (3, 2), (3, 3), (3, 7), (1, 3), (5, 1), (1, 4), (4, 4)]:
        mix = channel_mix(before, after)
        assert mix.shape == (before, after)
        np.testing.assert_allclose(mix.sum(1), 1)
    spec, values, conv = first_conv("nfnet_f0", in_channels=1)
    wanted = effective(conv, values).repeat(4, 2) / 4
    found = effective(conv, with_channels(values, spec, 4))
    assert np.abs(found - wanted).max() <= 1e-6 * np.abs(wanted).max()
    for before, after in [(4, 3), (2, 3), (6, 2)]:
        with pytest.raises(
            WeightsError, match=f"for {before} channels cannot be adapted to {after}"
        ):
            channel_mix(before, after)


def test_mean_and_std_follow_the_channels():
    spec = nfflax.load_spec("nfnet_f0")
    assert adapted_spec(spec, in_channels=1).preprocess.mean == (0.449,)
    assert adapted_spec(spec, in_channels=2).preprocess.std == (0.226,)
    assert adapted_spec(spec, in_channels=5).preprocess.mean == (0.485, 0.456, 0.406, 0.485, 0.456)
    half = nfflax.load_spec("timm_test_nfnet")
    assert adapted_spec(half, in_channels=4).preprocess == half.preprocess
    assert adapted_spec(spec, in_channels=3, num_classes=1000) == spec


def test_a_new_classifier_is_drawn_as_the_spec_says():
    spec = small_spec("nfnet_f0", {"stages.depth": 1, "head.num_classes": 300})
    drawn = new_classifier(spec, nnx.Rngs(0))
    assert drawn["kernel"].shape == (32, 300)
    assert abs(float(drawn["kernel"].std()) - 0.01) < 1e-3
    assert not drawn["bias"].any()
