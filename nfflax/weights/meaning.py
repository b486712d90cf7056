"""What weights mean: the keys of a spec in which the same numbers make another network."""

import re

from nfflax.spec.schema import Spec
from nfflax.weights.adapt import CHANNELS, CLASSES

# Keys that leave the meaning of weights as it is: what only training does, what only initial values
# are, and how large images are.
_FREE = re.compile(
    r"regularization\..*|resolution\..*|head\.(dropout|init)|norm\.momentum"
    r"|block\.last_gain|preprocess\.(interpolation|crop|crop_fraction|crop_margin)"
)
OF_CHANNELS = ("preprocess.mean", "preprocess.std")
"""Keys that belong to the channels of the images: with others they are others."""


def differing(theirs: Spec, ours: Spec, *, same_classes: bool = False) -> list[str]:
    """The keys in which two specs make different networks of the same weights.

    Classes and channels, in which weights can be adapted, count only with `same_classes`.
    """
    before, now = theirs.values_by_key(), ours.values_by_key()
    free = set() if same_classes else {CLASSES, CHANNELS}
    if not same_classes and before[CHANNELS] != now[CHANNELS]:
        free |= set(OF_CHANNELS)
    keys = [key for key, value in now.items() if before[key] != value and key not in free]
    return [key for key in keys if not _FREE.fullmatch(key)]
