"""Names of the activations a spec may use, with the published gammas. The functions are in nn.

Gamma is 1 / std(f(z)) for z ~ N(0, 1) (arXiv:2101.08692, section 4.2). The numbers are those of the
official release (`nfnets/base.py`), used verbatim so that results agree to the last bit; names
without a published number get theirs by quadrature. The release also lists `glu`, which halves the
channels and therefore fits no block here.
"""

PUBLISHED_GAMMAS: dict[str, float] = {
    "identity": 1.0,
    "celu": 1.270926833152771,
    "elu": 1.2716004848480225,
    "gelu": 1.7015043497085571,  # the tanh approximation, as the official code
    "gelu_exact": 1.7015043497085571,  # erf; timm pairs it with the same number
    "leaky_relu": 1.70590341091156,
    "log_sigmoid": 1.9193484783172607,
    "log_softmax": 1.0002083778381348,
    "relu": 1.7139588594436646,
    "relu6": 1.7131484746932983,
    "selu": 1.0008515119552612,
    "sigmoid": 4.803835391998291,
    "silu": 1.7881293296813965,
    "soft_sign": 2.338853120803833,
    "softplus": 1.9203323125839233,
    "tanh": 1.5939117670059204,
}

# The same for names that have no published number: `nfflax.gamma_of` of each.
QUADRATURE_GAMMAS: dict[str, float] = {
    "hard_swish": 1.8138714738131827,
    "mish": 1.592025381099446,
}

# Other names under which people look for the same function.
SYNONYMS = {"swish": "silu", "gelu_tanh": "gelu", "gelu_erf": "gelu_exact", "softsign": "soft_sign"}

_names = {*PUBLISHED_GAMMAS, *QUADRATURE_GAMMAS}


def activation_names() -> tuple[str, ...]:
    """Every name that `numerics.activation` accepts now, registered ones included."""
    return tuple(sorted(_names))


def add_activation_name(name: str) -> None:
    """Make `name` valid in specs; `nfflax.register_activation` calls this."""
    _names.add(name)
