"""The papers' augmentation, on the device and inside the train step: one call, `augment`."""

from nfflax.data.augment.batch import augment as augment
from nfflax.data.augment.mix import Mix as Mix
from nfflax.data.augment.randaugment import RandAugment as RandAugment
from nfflax.pixels import normalize as normalize
