"""Optimisers for normalizer-free networks, as optax transforms.

`nfflax.agc` is the clipping alone, `sgd` the optimiser that trained the published networks, and
`from_spec` gives all that a run spec asks for.
"""

from nfflax.optim.accumulate import with_accumulation as with_accumulation
from nfflax.optim.directions import sgd as sgd
from nfflax.optim.ema import update_ema as update_ema
from nfflax.optim.factory import Recipe as Recipe
from nfflax.optim.factory import RecipeWarning as RecipeWarning
from nfflax.optim.factory import from_spec as from_spec
from nfflax.optim.groups import Group as Group
from nfflax.optim.guard import DivergedError as DivergedError
from nfflax.optim.guard import guard as guard
from nfflax.optim.guard import raise_if_diverged as raise_if_diverged
from nfflax.optim.loss import cross_entropy as cross_entropy
from nfflax.optim.metrics import metrics as metrics
from nfflax.optim.sam import with_sam as with_sam
from nfflax.optim.schedules import warmup_constant as warmup_constant
from nfflax.optim.schedules import warmup_cosine as warmup_cosine
from nfflax.optim.schedules import warmup_exponential as warmup_exponential
