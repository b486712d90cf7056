"""A folded network as an ONNX graph: the same parts in the same order as nn/body.py and block.py.

Folding has left plain convolutions with a bias and nonlinearities between them, so that every part
has an operator of ONNX. Stacked blocks are taken apart; padding, which depends on the size of a
map, is worked out for one resolution and written as numbers.
"""

import jax
import numpy as np
from flax import nnx

from nfflax.nn.activations import get_activation
from nfflax.nn.attention import EfficientChannelAttention, Linear, SqueezeExcite
from nfflax.nn.block import Activate, Block
from nfflax.nn.body import Stem
from nfflax.nn.conv import Padding, resolve_padding
from nfflax.nn.net import NFNet
from nfflax.nn.stage import Stage
from nfflax.nn.wsconv import Conv
from nfflax.weights.fold import ScaledGate
from nfflax.weights.onnx_graph import ACTIVATIONS, Graph, Map


def add_network(graph: Graph, model: NFNet, images: str, side: int) -> str:
    """Add a folded network; returns the name of its logits, or features without a classifier."""
    x = _stem(graph, model.stem, Map(images, (side, side)))
    for number, stage in enumerate(model.stages):
        for index, block in enumerate(_unstacked(stage)):
            x = _block(graph, block, x, f"stages.{number}.blocks.{index}")
    if model.final_conv is not None:
        x = _conv(graph, model.final_conv, x, "final_conv")
    x = _activate(graph, model.final_act, x, "final_act")
    pool = "GlobalAveragePool" if model.spec.head.pool == "avg" else "GlobalMaxPool"
    pooled = graph.add("Flatten", graph.add(pool, x.name, at="head"), at="head")
    if model.classifier is None:
        return pooled
    weight = graph.constant("classifier.kernel", _array(model.classifier.kernel))
    bias = graph.constant("classifier.bias", _array(model.classifier.bias))
    return graph.add("Gemm", pooled, weight, bias, at="classifier")


def _unstacked(stage: Stage) -> list[Block]:
    """The blocks of a stage, one by one."""
    blocks = [stage.first]
    if stage.rest is not None:
        parts, state = nnx.split(stage.rest)
        state = jax.device_get(state)
        for index in range(len(stage.betas) - 1):
            blocks.append(nnx.merge(parts, jax.tree.map(lambda stack, i=index: stack[i], state)))
    return blocks


def _stem(graph: Graph, stem: Stem, x: Map) -> Map:
    for i, conv in enumerate(stem.convs):
        if i > 0:
            x = _activate(graph, stem.acts[i - 1], x, f"stem.acts.{i - 1}")
        x = _conv(graph, conv, x, f"stem.convs.{i}")
    if stem.pool == "max":
        x = _pool(graph, "MaxPool", x, stem.padding, 3, 2, "stem")
    return x


def _block(graph: Graph, block: Block, x: Map, at: str) -> Map:
    h = _activate(graph, block.act0, x, f"{at}.act0")
    shortcut = x
    if block.has_projection:
        shortcut, window = h, block.pool_window
        if window > 1:  # the mean over the pixels of the map alone
            how = ("same", window, block.pool_stride, f"{at}.shortcut")
            shortcut = _pool(graph, "AveragePool", h, *how, count_include_pad=0)
        shortcut = _conv(graph, block.conv_shortcut, shortcut, f"{at}.conv_shortcut")
    h = _conv(graph, block.conv0, h, f"{at}.conv0")
    h = _conv(graph, block.conv1, _activate(graph, block.act1, h, f"{at}.act1"), f"{at}.conv1")
    if block.has_second_conv:
        h = _activate(graph, block.act1b, h, f"{at}.act1b")
        h = _conv(graph, block.conv1b, h, f"{at}.conv1b")
    if block.attention_place == "inside":
        h = _attend(graph, block, h, f"{at}.attention")
    h = _conv(graph, block.conv2, _activate(graph, block.act2, h, f"{at}.act2"), f"{at}.conv2")
    if block.attention_place == "after":
        h = _attend(graph, block, h, f"{at}.attention")
    return Map(graph.add("Add", h.name, shortcut.name, at=at), h.space)


def _conv(graph: Graph, conv: Conv, x: Map, at: str) -> Map:
    assert conv.bias is not None, "folding gives every convolution a bias"
    w_HWIO = _array(conv.kernel)
    window = w_HWIO.shape[:2]
    strides, dilations = _pair(conv.strides), _pair(conv.kernel_dilation)
    pads = resolve_padding(conv.padding, x.space, window, strides, dilations)
    name = graph.add(
        "Conv",
        x.name,
        graph.constant(f"{at}.kernel", w_HWIO.transpose(3, 2, 0, 1)),
        graph.constant(f"{at}.bias", _array(conv.bias)),
        at=at,
        kernel_shape=window,
        strides=strides,
        dilations=dilations,
        pads=_flat(pads),
        group=conv.feature_group_count,
    )
    reach = [(k - 1) * d + 1 for k, d in zip(window, dilations, strict=True)]
    return Map(name, _space(x, pads, reach, strides))


def _pool(
    graph: Graph, kind: str, x: Map, padding: Padding, window: int, stride: int, at: str, **how: int
) -> Map:
    windows, strides = (window, window), (stride, stride)
    pads = resolve_padding(padding, x.space, windows, strides, (1, 1))
    shape = {"kernel_shape": windows, "strides": strides, "pads": _flat(pads)}
    return Map(graph.add(kind, x.name, at=at, **shape, **how), _space(x, pads, windows, strides))


def _activate(graph: Graph, act: Activate, x: Map, at: str) -> Map:
    name = x.name
    if act.norm is not None:  # what folding left of a BatchNorm
        for kind, part in (("Mul", "scale"), ("Add", "bias")):
            values_C11 = _array(getattr(act.norm, part))[:, None, None]
            name = graph.add(kind, name, graph.constant(f"{at}.norm.{part}", values_C11), at=at)
    name = ACTIVATIONS[act.name](graph, name, at)
    gamma = get_activation(act.name).gamma if act.scaled else 1.0
    return Map(graph.scaled(name, gamma, at=at), x.space)


def _attend(graph: Graph, block: Block, x: Map, at: str) -> Map:
    gate, factor = block.attention, float(block.attention_gain)
    if isinstance(gate, ScaledGate):
        factor, gate = factor * float(_array(gate.factor)), gate.gate
    assert isinstance(gate, SqueezeExcite | EfficientChannelAttention)
    pooled = graph.add("GlobalAveragePool", x.name, at=at)
    if isinstance(gate, SqueezeExcite):
        hidden = graph.add("Relu", _pointwise(graph, gate.fc0, pooled, f"{at}.fc0"), at=at)
        scores = _pointwise(graph, gate.fc1, hidden, f"{at}.fc1")
    else:
        scores = _along_channels(graph, gate, pooled, at)
    opened = graph.scaled(graph.add("Sigmoid", scores, at=at), factor, at=at)
    return Map(graph.add("Mul", x.name, opened, at=at), x.space)


def _pointwise(graph: Graph, linear: Linear, x: str, at: str) -> str:
    """A linear layer on (batch, channels, 1, 1)."""
    weight_OI11 = _array(linear.kernel).T[:, :, None, None]
    weight = graph.constant(f"{at}.kernel", weight_OI11)
    return graph.add("Conv", x, weight, graph.constant(f"{at}.bias", _array(linear.bias)), at=at)


def _along_channels(graph: Graph, gate: EfficientChannelAttention, x: str, at: str) -> str:
    """A 1-D convolution whose space is the channels of (batch, channels, 1, 1)."""
    w_K = _array(gate.kernel)
    reach = len(w_K) // 2
    row, column = (
        graph.constant(f"{at}.shape", np.array(shape)) for shape in ((0, 1, -1), (0, -1, 1, 1))
    )
    row_N1C = graph.add("Reshape", x, row, at=at)
    weight = graph.constant(f"{at}.kernel", w_K[None, None])
    mixed_N1C = graph.add("Conv", row_N1C, weight, at=at, pads=(reach, reach))
    return graph.add("Reshape", mixed_N1C, column, at=at)


def _array(variable: nnx.Variable) -> np.ndarray:
    return np.asarray(variable[...], np.float32)


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _flat(pads: tuple[tuple[int, int], ...]) -> list[int]:
    """All before, then all after, as ONNX has it."""
    return [*(before for before, _ in pads), *(after for _, after in pads)]


def _space(x: Map, pads, reach, strides) -> tuple[int, int]:
    height, width = (
        (size + before + after - window) // stride + 1
        for size, (before, after), window, stride in zip(x.space, pads, reach, strides, strict=True)
    )
    return height, width
