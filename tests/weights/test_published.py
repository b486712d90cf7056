"""The table of published weights: networks of ours, ImageNet's classes, and what the docs say."""

import re
from pathlib import Path

import nfflax
from nfflax.weights.published import all_published, imagenet_classes, published

PAGE = Path(__file__).parents[2] / "docs" / "weights.md"


def test_classes_are_imagenets_in_order():
    names = imagenet_classes()
    assert len(names) == len(set(names)) == 1000
    assert names[0] == "n01440764 tench, Tinca tinca"
    assert names[281] == "n02123045 tabby, tabby cat"
    assert names[999].startswith("n15075141 toilet tissue")
    synsets = [name.split()[0] for name in names]
    assert synsets == sorted(synsets)
    assert all(re.fullmatch(r"n\d{8}", synset) for synset in synsets)


def test_every_entry_is_a_preset_with_those_classes():
    for entry in all_published():
        spec = nfflax.load_spec(entry.preset)
        assert spec.head.num_classes == len(entry.class_names)
        assert spec.resolution.test == entry.resolution
        assert published(entry.preset) is entry
    assert len({entry.place for entry in all_published()}) == 21
    assert published("nfnet_f7") is None


def test_the_page_lists_what_the_table_has():
    row = re.compile(r"^\| `(\w+)` \| ([\d.]+) \| (\d+) px \| `?(\S+?)`? \|$", re.MULTILINE)
    listed = [
        (name, float(top1), int(px), place)
        for name, top1, px, place in row.findall(PAGE.read_text("utf-8"))
    ]
    assert listed == [(e.preset, e.top1, e.resolution, e.place) for e in all_published()]
