"""Which networks have published weights: where they are, who says what of them.

DeepMind released NFNet-F0 to F6 (github.com/google-deepmind/deepmind-research, nfnets/README.md).
timm 1.0.31 (timm/models/nfnet.py) names the others, and has the same seven in its own format. There
are no others: none for F7, for NFNet-F4+, for the NF-ResNets and NF-RegNets of the papers, and none
trained on JFT.
"""

import functools
from dataclasses import dataclass
from importlib import resources

_DEEPMIND = "DeepMind (google-deepmind/deepmind-research, nfnets)"
_TIMM = "timm (huggingface/pytorch-image-models)"


@dataclass(frozen=True)
class Published:
    """Weights that anyone can download, for one preset."""

    preset: str
    place: str
    """An address, or `hf://owner/repo`."""
    source: str
    """Who published them."""
    top1: float
    """ImageNet top-1 accuracy in percent, as published: not measured here."""
    resolution: int
    """Side of the images behind `top1`."""
    licence: str
    """As the source states it."""
    md5: str = ""
    """Of the file, as another public repository lists it; the source lists none."""
    mirror: str = ""
    """The same weights elsewhere: a file whose name ends in the first digits of its sha256."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """What the outputs stand for: all published networks tell ImageNet's classes apart."""
        return imagenet_classes()


def published(preset: str) -> Published | None:
    """The published weights of a preset, if there are any."""
    return _TABLE.get(preset)


def all_published() -> tuple[Published, ...]:
    """Everything that is known to be published."""
    return tuple(_TABLE.values())


def preset_of(architecture: str) -> str:
    """Our name of a network that timm calls `architecture`."""
    return f"timm_{architecture}"


@functools.cache
def imagenet_classes() -> tuple[str, ...]:
    """ImageNet's 1000 classes in the order of the outputs: "n02123045 tabby, tabby cat"."""
    text = resources.files("nfflax.weights").joinpath("imagenet_classes.txt").read_text("utf-8")
    return tuple(line for line in text.splitlines() if not line.startswith("#"))


# Top-1 of nfnets/README.md; at the test resolutions of arXiv:2102.06171, table 1. The md5 sums are
# listed in a public port of the weights; no official list exists to check them against.
_OFFICIAL = (
    ("f0", 83.6, 256, "0a41039da1cb43adf47f1b7d86ddfe0f"),
    ("f1", 84.7, 320, "c9126bbfaf855f9ddb7ff3b902558781"),
    ("f2", 85.1, 352, "7a018d8d1498020e2f5a8719a1e7f53f"),
    ("f3", 85.7, 416, "d8e1e78d26db659c486150dbaccbe78a"),
    ("f4", 85.9, 512, "f5974a7e3388aa81b91a9f1403e759a4"),
    ("f5", 86.0, 544, "8639e925de951030651ac775b9f915c3"),
    ("f6", 86.5, 576, "b16cca40ac1ecec2bd5e3273866da0c1"),  # trained with SAM
)

# Architecture and tag, and its file among the project's GitHub releases, from timm/models/nfnet.py;
# top-1 and resolution from results/results-imagenet.csv, each at its larger resolution.
_RELEASES = "https://github.com/rwightman/pytorch-image-models/releases/download"
_IN_TIMM = (
    ("dm_nfnet_f0", "dm_in1k", 83.468, 256, "v0.1-dnf-weights/dm_nfnet_f0-604f9c3a.pth"),
    ("dm_nfnet_f1", "dm_in1k", 84.700, 320, "v0.1-dnf-weights/dm_nfnet_f1-fc540f82.pth"),
    ("dm_nfnet_f2", "dm_in1k", 85.184, 352, "v0.1-dnf-weights/dm_nfnet_f2-89875923.pth"),
    ("dm_nfnet_f3", "dm_in1k", 85.676, 416, "v0.1-dnf-weights/dm_nfnet_f3-d74ab3aa.pth"),
    ("dm_nfnet_f4", "dm_in1k", 85.838, 512, "v0.1-dnf-weights/dm_nfnet_f4-0ac5b10b.pth"),
    ("dm_nfnet_f5", "dm_in1k", 86.102, 544, "v0.1-dnf-weights/dm_nfnet_f5-ecb20ab1.pth"),
    ("dm_nfnet_f6", "dm_in1k", 86.364, 576, "v0.1-dnf-weights/dm_nfnet_f6-e0f12116.pth"),
    ("nfnet_l0", "ra2_in1k", 82.766, 288, "v0.1-weights/nfnet_l0_ra2-45c6688d.pth"),
    ("eca_nfnet_l0", "ra2_in1k", 82.590, 288, "v0.1-weights/ecanfnet_l0_ra2-e3e9ac50.pth"),
    ("eca_nfnet_l1", "ra2_in1k", 84.062, 320, "v0.1-weights/ecanfnet_l1_ra2-7dce93cd.pth"),
    ("eca_nfnet_l2", "ra3_in1k", 84.710, 384, "v0.1-weights/ecanfnet_l2_ra3-da781a61.pth"),
    ("nf_regnet_b1", "ra2_in1k", 79.368, 288, "v0.1-weights/nf_regnet_b1_256_ra2-ad85cfef.pth"),
    ("nf_resnet50", "ra2_in1k", 80.658, 288, "v0.1-weights/nf_resnet50_ra2-9f236009.pth"),
    ("test_nfnet", "r160_in1k", 47.634, 160, ""),  # never released as a file
)

_TABLE = {
    entry.preset: entry
    for entry in (
        *(
            Published(
                preset=f"nfnet_{size}",
                place=f"https://storage.googleapis.com/dm-nfnets/{size.upper()}_haiku.npz",
                source=_DEEPMIND,
                top1=top1,
                resolution=resolution,
                # The repository's LICENSE; its README says nothing else of the weights.
                licence="Apache-2.0",
                md5=md5,
            )
            for size, top1, resolution, md5 in _OFFICIAL
        ),
        *(
            Published(
                preset=preset_of(architecture),
                place=f"hf://timm/{architecture}.{tag}",
                source=_TIMM,
                top1=top1,
                resolution=resolution,
                licence="Apache-2.0",  # `license` in timm's pretrained_cfg
                mirror=file and f"{_RELEASES}/{file}",
            )
            for architecture, tag, top1, resolution, file in _IN_TIMM
        ),
    )
}
