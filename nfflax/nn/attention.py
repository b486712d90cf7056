"""Channel attention: gates in (0, 1) per image and channel, computed from the pooled map."""

import jax
import jax.numpy as jnp
from flax import nnx

from nfflax.nn.init import ZEROS, Init
from nfflax.nn.roles import Role, kernel_role, param, vector_role


class SqueezeExcite(nnx.Module):
    """Squeeze-and-excitation (arXiv:1709.01507): pool, two linear layers, sigmoid.

    The layer between is ReLU in both public implementations (arXiv:2102.06171 prints GELU).
    """

    def __init__(self, channels: int, hidden: int, *, rngs: nnx.Rngs):
        self.fc0 = Linear(channels, hidden, in_axis="in", out_axis="mid_out", rngs=rngs)
        self.fc1 = Linear(hidden, channels, in_axis="mid_in", out_axis="out", rngs=rngs)

    def __call__(self, x_NHWC: jax.Array) -> jax.Array:
        pooled_NC = jnp.mean(x_NHWC, axis=(1, 2))
        gate_NC = jax.nn.sigmoid(self.fc1(jax.nn.relu(self.fc0(pooled_NC))))
        return gate_NC[:, None, None, :]


class EfficientChannelAttention(nnx.Module):
    """ECA (arXiv:1910.03151): a 1-D convolution over the pooled channels, sigmoid.

    Written as a sum of shifted channels. As a convolution its spatial axis would be the channels,
    and XLA partitions a convolution wrongly where that axis is sharded (see conv.py).
    """

    def __init__(self, kernel_size: int, *, rngs: nnx.Rngs):
        # PyTorch's default for a Conv1d, which timm leaves in place.
        init = Init("uniform", kernel_size**-0.5)
        role = Role(unit_axes=(-1,), decay=True, clip=True, axes=(None,))
        self.kernel = param(rngs, (kernel_size,), init, role)

    def __call__(self, x_NHWC: jax.Array) -> jax.Array:
        pooled_NC = jnp.mean(x_NHWC, axis=(1, 2))
        w_K = self.kernel[...].astype(x_NHWC.dtype)
        size, channels = len(w_K), pooled_NC.shape[-1]
        padded_NC = jnp.pad(pooled_NC, ((0, 0), (size // 2, size // 2)))
        shifted_KNC = [padded_NC[:, k : k + channels] for k in range(size)]
        gate_NC = jax.nn.sigmoid(sum(w_K[k] * shifted_KNC[k] for k in range(size)))
        return gate_NC[:, None, None, :]


class Linear(nnx.Module):
    """A linear layer with roles; `clip` is off for the classifier's weight."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        in_axis: str,
        out_axis: str,
        clip: bool = True,
        kernel_init: Init | None = None,
        rngs: nnx.Rngs,
    ):
        shape = (in_features, out_features)
        # Haiku's default for linear layers, which the official squeeze-and-excitation leaves in
        # place: a normal of std 1 / sqrt(fan_in) cut at two of those, the cut not corrected for.
        init = kernel_init or Init("truncated", in_features**-0.5)
        role = kernel_role(shape, in_axis, out_axis, clip=clip)
        self.kernel = param(rngs, shape, init, role)
        self.bias = param(rngs, (out_features,), ZEROS, vector_role(out_axis))

    def __call__(self, x_NC: jax.Array) -> jax.Array:
        kernel_IO, bias_O = self.kernel[...], self.bias[...]
        return x_NC @ kernel_IO.astype(x_NC.dtype) + bias_O.astype(x_NC.dtype)
