"""Flax NNX modules: what a Plan becomes. Images and maps are NHWC, kernels HWIO."""

from nfflax.nn.activations import gamma_of as gamma_of
from nfflax.nn.activations import register_activation as register_activation
from nfflax.nn.attention import EfficientChannelAttention as EfficientChannelAttention
from nfflax.nn.attention import SqueezeExcite as SqueezeExcite
from nfflax.nn.backbone import Backbone as Backbone
from nfflax.nn.builder import build as build
from nfflax.nn.builder import create as create
from nfflax.nn.frozen import Frozen as Frozen
from nfflax.nn.net import NFNet as NFNet
from nfflax.nn.roles import Role as Role
from nfflax.nn.roles import role_of as role_of
from nfflax.nn.wsconv import WSConv as WSConv
from nfflax.nn.wsconv import WSConvTranspose as WSConvTranspose
