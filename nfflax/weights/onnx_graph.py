"""An ONNX graph in the making, and the nonlinearities as ONNX has them.

Maps are NCHW, ONNX's only layout. Everything is float32.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

# Opset 20 is the first with Gelu; ONNX 1.15 (November 2023) brought it with the file format 9.
OPSET, IR_VERSION = 20, 9


class Map(NamedTuple):
    """A tensor (batch, channels, height, width) of the graph."""

    name: str
    space: tuple[int, int]
    """Height and width: paddings are worked out when the graph is made."""


class Graph:
    """Collects nodes and constants; names say which part of the network each belongs to."""

    def __init__(self):
        self._nodes: list[NodeProto] = []
        self._constants: dict[str, TensorProto] = {}
        self._taken: dict[str, int] = {}

    def add(self, kind: str, *inputs: str, at: str, **attributes: Any) -> str:
        """A node of part `at`; returns the name of its output."""
        name = self._unused(f"{at}/{kind}")
        self._nodes.append(helper.make_node(kind, list(inputs), [name], name, **attributes))
        return name

    def constant(self, name: str, value: ArrayLike) -> str:
        """An array in the file, under a name of its own."""
        name = self._unused(name)
        self._constants[name] = numpy_helper.from_array(np.asarray(value, order="C"), name)
        return name

    def scaled(self, x: str, factor: float, *, at: str) -> str:
        """`x` times a number."""
        if factor == 1:
            return x
        return self.add("Mul", x, self.constant(f"{at}.factor", np.float32(factor)), at=at)

    def model(
        self,
        source: tuple[str, Sequence[int | str]],
        result: tuple[str, str, Sequence[int | str]],
        about: dict[str, str],
    ) -> ModelProto:
        """The finished file. `source` is (name, shape); `result` (name, what it is here, shape)."""
        name, tensor, shape = result
        self._nodes.append(helper.make_node("Identity", [tensor], [name], name))
        described = (
            helper.make_tensor_value_info(what, TensorProto.FLOAT, list(size))
            for what, size in (source, (name, shape))
        )
        inputs, outputs = ([value] for value in described)
        constants = list(self._constants.values())
        graph = helper.make_graph(self._nodes, "network", inputs, outputs, constants)
        opset = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(
            graph, opset_imports=opset, ir_version=IR_VERSION, producer_name="nfflax"
        )
        helper.set_model_props(model, about)
        return model

    def _unused(self, name: str) -> str:
        count = self._taken[name] = self._taken.get(name, 0) + 1
        return name if count == 1 else f"{name}_{count}"


Emit = Callable[[Graph, str, str], str]


def _native(kind: str, **attributes: Any) -> Emit:
    return lambda graph, x, at: graph.add(kind, x, at=at, **attributes)


def _relu6(graph: Graph, x: str, at: str) -> str:
    bounds = (graph.constant(f"{at}.bound", np.float32(bound)) for bound in (0, 6))
    return graph.add("Clip", x, *bounds, at=at)


def _silu(graph: Graph, x: str, at: str) -> str:
    return graph.add("Mul", x, graph.add("Sigmoid", x, at=at), at=at)


def _log_sigmoid(graph: Graph, x: str, at: str) -> str:
    softplus = graph.add("Softplus", graph.add("Neg", x, at=at), at=at)
    return graph.add("Neg", softplus, at=at)


# By the names of nfflax/nn/activations.py.
ACTIVATIONS: dict[str, Emit] = {
    "identity": lambda _, x, __: x,
    "celu": _native("Celu"),
    "elu": _native("Elu"),
    "gelu": _native("Gelu", approximate="tanh"),
    "gelu_exact": _native("Gelu", approximate="none"),
    "hard_swish": _native("HardSwish"),
    "leaky_relu": _native("LeakyRelu", alpha=0.01),
    "log_sigmoid": _log_sigmoid,
    "log_softmax": _native("LogSoftmax", axis=1),
    "mish": _native("Mish"),
    "relu": _native("Relu"),
    "relu6": _relu6,
    "selu": _native("Selu"),
    "sigmoid": _native("Sigmoid"),
    "silu": _silu,
    "soft_sign": _native("Softsign"),
    "softplus": _native("Softplus"),
    "tanh": _native("Tanh"),
}
