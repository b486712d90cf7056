"""The papers' augmentation, on the device and inside the train step: one call, `augment`."""

from nfflax.data.augment.batch import augment as augment
from nfflax.data.augment.batch import normalize as normalize
from nfflax.data.augment.mix import Mix as Mix
from nfflax.data.augment.randaugment import RandAugment as RandAugment
