"""Run files: inheritance, the network inside, the numbers that follow, mistakes, presets."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nfflax.spec.errors import Problem, SpecError
from nfflax.spec.load import load_run, load_spec
from nfflax.spec.presets import preset_root, shipped
from nfflax.spec.run import Model, Run, Schedule, Train
from nfflax.spec.schema import file_schema

PRESETS = list(shipped("runs"))
IMAGENET = 1_281_167
PAGE = Path(__file__).resolve().parents[2] / "docs" / "run-format.md"
MICRO = {"name": "micro", "model": {"spec": "nfnet_micro"}}


@pytest.fixture
def mistakes() -> Callable[..., dict[str, Problem]]:
    """The problems that loading a run raises, by key."""

    def load_and_fail(source: Any, overrides: Any = None) -> dict[str, Problem]:
        with pytest.raises(SpecError) as caught:
            load_run(source, overrides)
        problems = {problem.key: problem for problem in caught.value.problems}
        assert len(problems) == len(caught.value.problems)
        return problems

    return load_and_fail


# Files


def test_toml_json_and_dict_say_the_same(write):
    text = 'name = "micro"\n[model]\nspec = "nfnet_micro"\n'
    runs = [load_run(write("a.toml", text)), load_run(write("b.json", MICRO)), load_run(MICRO)]
    assert all(run == runs[0] and hash(run) == hash(runs[0]) for run in runs)
    assert runs[0].spec == load_spec("nfnet_micro")


@pytest.mark.parametrize("name", PRESETS)
def test_a_resolved_run_stands_alone(name, write, monkeypatch, tmp_path):
    """Its file holds the network, so that it needs no other."""
    run = load_run(name, {"model.set.head.num_classes": 7})
    path = write("deep/resolved.json", run.model_dump_json())
    monkeypatch.chdir(tmp_path)
    for copy in (load_run(path), load_run(run), load_run(run.model_dump())):
        assert copy == run
        assert hash(copy) == hash(run)
    assert load_run(path, {"model.set.head.num_classes": 8}).spec.head.num_classes == 8


def test_tables_merge_and_lists_replace(write):
    write("base.toml", 'extends = "nfnet"\nsummary = "x"\n[optimizer]\nfreeze = ["stem"]\nb1 = 0.5')
    heir = load_run(write("heir.toml", 'extends = "base.toml"\n[optimizer]\nfreeze = ["a", "b"]'))
    assert (heir.name, heir.summary) == ("heir", "")
    assert (heir.optimizer.freeze, heir.optimizer.b1) == (("a", "b"), 0.5)
    assert heir.train == load_run("nfnet").train


def test_rules_are_tables_in_order(write):
    path = write(
        "a.toml",
        'extends = "nfnet"\n[[optimizer.rules]]\nmatch = "head.*"\nlearning_rate = 10\n'
        '[[optimizer.rules]]\nmatch = "*.bias"\ndecay = true\nclip = false\nunit_axes = [-1]\n',
    )
    first, second = load_run(path).optimizer.rules
    assert (first.match, first.learning_rate, first.decay, first.unit_axes) == (
        *("head.*", 10, None, None),
    )
    assert (second.decay, second.clip, second.unit_axes) == (True, False, (-1,))


# The network inside


def test_the_network_is_found_beside_the_file_that_names_it(write, monkeypatch, tmp_path):
    write("nets/tiny.toml", 'extends = "nfnet_micro"\n[head]\nnum_classes = 3')
    write("runs/base.toml", 'name = "base"\n[model]\nspec = "../nets/tiny.toml"')
    path = write("mine/deep/heir.toml", 'extends = "../../runs/base.toml"\n[train]\nepochs = 9')
    monkeypatch.chdir(tmp_path / "nets")
    assert load_run(path).spec.name == "tiny"
    assert load_run("nfnet", {"model.spec": "tiny.toml"}).spec.head.num_classes == 3
    assert load_run({"name": "a", "model": {"spec": Path("tiny.toml")}}).spec.name == "tiny"
    assert load_run({"name": "a", "model": {"spec": load_spec("nfnet_f1")}}).spec.name == "nfnet_f1"


def test_changes_of_the_network_merge_through_all_layers(write):
    write("base.toml", 'extends = "nfnet"\n[model.set]\nhead.dropout = 0.5\nstages.depth = 1')
    heir = write("heir.toml", 'extends = "base.toml"\n[model.set.head]\nnum_classes = 10')
    run = load_run(heir, {"model.set.head.dropout": 0.1, "model.set": {"block.alpha": 0.3}})
    assert run.spec == load_spec(
        "nfnet_f0",
        {"head.dropout": 0.1, "head.num_classes": 10, "stages.depth": 1, "block.alpha": 0.3},
    )


def test_mistakes_in_the_network_keep_their_own_place(write, mistakes):
    net = write("net.toml", 'extends = "nfnet_micro"\n[head]\npol = "max"\ndropout = 2')
    base = write("base.toml", 'name = "base"\n[model]\nspec = "net.toml"\nset.norm.eps = -1')
    heir = write(
        "heir.toml", 'extends = "base.toml"\n[model.set]\nhed.dropout = 0\n[ema]\ndecy = 1'
    )
    found = mistakes(heir, {"model.set.stages.dept": 3, "train.batch_size": 0})
    assert {key: problem.file for key, problem in found.items()} == {
        "head.pol": str(net),
        "head.dropout": str(net),
        "model.set.norm.eps": str(base),
        "model.set.hed": str(heir),
        "ema.decy": str(heir),
        "model.set.stages.dept": "override",
        "train.batch_size": "override",
    }
    assert found["model.set.stages.dept"].nearest == "model.set.stages.depth"
    assert found["head.pol"].nearest == "head.pool"


def test_rules_that_join_a_change_with_the_file_below(mistakes):
    found = mistakes("nfnet", {"model.set.stages.depth": [1, 1]})
    message = "has 4 entries, but stages.depth has 2 (model.set.stages.depth is set in override)"
    assert found["stages.width"].message == message
    assert found["stages.width"].file == "preset nfnet"


@pytest.mark.parametrize(
    ("spec", "message", "near"),
    [
        ("nfnet_f00", "no preset has this name", "nfnet_f0"),
        ("nf_regnet", "is a family base, not a network", ""),
        ("gone.toml", "cannot be read: No such file", ""),
        ("net.yaml/", "is not called .toml or .json", ""),
        (3, "is no name or path", ""),
        (None, "is no name or path", ""),
    ],
)
def test_networks_that_are_not_there(mistakes, write, spec, message, near):
    path = write("a.json", {"extends": "nfnet", "model": {"spec": spec}, "train": {"sed": 1}})
    found = mistakes(path)
    assert set(found) == {"model.spec", "train.sed"}
    problem = found["model.spec"]
    assert (problem.file, problem.value, problem.nearest) == (str(path), spec, near)
    assert problem.message.startswith(message)


def test_a_run_needs_a_network(mistakes):
    assert mistakes({"name": "a"})["model.spec"].message == "is required"
    assert mistakes({"name": "a", "model": {"set": {"x": 1}}})["model.spec"].allowed.endswith(
        'e.g. "nfnet_f0" or "my_net.toml"'
    )
    assert set(mistakes({"name": "a", "model": 3})) == {"model"}
    assert mistakes(MICRO, {"model.set": 3})["model.set"].message == "must be a table"


# What follows


def test_the_length_of_a_run_counts_whole_steps():
    run = load_run(MICRO, {"train": {"examples": 1000, "batch_size": 300, "epochs": 10}})
    assert (run.steps_per_epoch, run.steps) == (1000 / 300, 33)
    assert load_run(run, {"train.epochs": 0.9, "schedule.warmup_epochs": 0}).steps == 3
    assert load_run(run, {"train.epochs": 0}).steps == 0


def test_the_nearest_of_epochs_and_steps_counts(write):
    path = write("a.toml", 'extends = "nfnet"\n[train]\nsteps = 20_000')
    assert load_run(path).steps == 20_000
    assert load_run(write("b.toml", 'extends = "a.toml"\n[train]\nepochs = 90')).steps == 28150
    assert load_run(path, {"train.epochs": 90, "train.steps": 9999}).steps == 9999
    assert load_run("finetune", {"schedule.warmup_epochs": 2}).warmup == 2 * IMAGENET / 2048
    assert load_run("nfnet", {"schedule.warmup_steps": 10.5}).warmup == 10.5
    assert Train(steps=5).length == 5
    assert Train(steps=5).epochs == 0


def test_without_a_number_of_images_epochs_have_no_length():
    run = load_run(MICRO)
    for name in ("steps_per_epoch", "steps", "warmup"):
        with pytest.raises(SpecError) as caught:
            getattr(run, name)
        (problem,) = caught.value.problems
        assert (problem.file, problem.key) == ("run micro", "train.examples")
    assert load_run(run, {"train.examples": 4096}).steps == 360
    in_steps = load_run(run, {"train.steps": 7, "schedule.warmup_epochs": 0})
    assert (in_steps.steps, in_steps.warmup) == (7, 0)


def test_partners_are_drawn_only_for_mixing():
    def draws(**augment: Any) -> bool:
        return load_run(MICRO, {"augment": augment}).augment.draws_partners

    assert draws()
    assert draws(mixup=0)
    assert draws(cutmix=False)
    assert not draws(mixup=0, cutmix=False)
    assert not draws(partners="batch")


@pytest.mark.parametrize(
    ("changes", "needs"),
    [
        ({}, True),
        ({"train.examples": 100_000}, False),
        ({"train.steps": 7}, True),  # the warm-up is in epochs
        ({"train.steps": 7, "schedule.warmup_steps": 1}, False),
        ({"train.steps": 7, "schedule.warmup_steps": 1, "schedule.kind": "exponential"}, True),
    ],
)
def test_which_runs_need_to_know_how_long_an_epoch_is(changes, needs):
    assert load_run(MICRO, changes).needs_examples is needs


def test_data_and_augmentation_in_words():
    run = load_run("nfnet")
    assert run.data.in_words == "imagenet (train) · crops of 8% to 100% · flips"
    mixing = "MixUp 0.2 and CutMix with fresh partners"
    assert run.augment.in_words == f"{mixing} · RandAugment, 4 layers of magnitude 5"
    changes = {"data.crop_area": 1, "data.flip": False, "augment.cutmix": False}
    changes |= {"augment.layers": 1, "augment.numerics": "pillow", "augment.partners": "batch"}
    run = load_run("nfnet", changes)
    assert run.data.in_words == "imagenet (train) · whole images, squashed"
    assert run.augment.in_words == (
        "MixUp 0.2 with partners of the same batch · "
        "RandAugment, 1 layer of magnitude 5, pillow numerics"
    )
    assert load_run("nf_resnet").augment.in_words == "no mixing, no RandAugment"


def test_the_peak_follows_the_batch():
    def peak(**schedule: Any) -> float:
        return load_run(MICRO, {"train.batch_size": 1000, "schedule": schedule}).peak_learning_rate

    assert peak(learning_rate=0.3) == 0.3 * 1000 / 256
    assert peak(learning_rate=0.3, reference_batch=0) == 0.3


# Mistakes


@pytest.mark.parametrize(
    ("key", "value", "message", "near"),
    [
        ("train.epoch", 3, "no such key", "train.epochs"),
        ("train.lr", 3, "no such key", "schedule.learning_rate"),
        ("lr", 3, "no such key", "schedule.learning_rate"),
        ("wd", 3, "no such key", "optimizer.weight_decay"),
        ("optimizer.opt", "sgd", "no such key", "optimizer.kind"),
        ("loss.smoothing", 0.1, "no such key", "loss.label_smoothing"),
        ("ema.model_ema_decay", 0.1, "no such key", "ema.decay"),
        ("model.sets", {}, "no such key", "model.set"),
        ("stages.depth", 3, "no such key", ""),
        ("model.dtype", "float16", "is none of the allowed values", "bfloat16"),
        ("model.unroll", 0, "must be at least 1", ""),
        ("train.batch_size", 4096.0, "must be a whole number", "4096"),
        ("train.steps", -1, "must be at least 0", ""),
        ("train.seed", -1, "must be at least 0", ""),
        ("loss.label_smoothing", 1, "must be less than 1", ""),
        ("optimizer.kind", "SGD", "is none of the allowed values", "sgd"),
        ("optimizer.layer_decay", 0, "must be greater than 0", ""),
        ("optimizer.freeze", "stem", "must be a list", ""),
        ("sam.fraction", 0, "must be greater than 0", ""),
        ("schedule.learning_rate", 0, "must be greater than 0", ""),
        ("ema.decay", 1, "must be less than 1", ""),
        ("guard.patience", 0, "must be at least 1", ""),
        ("agc.eps", 0, "must be greater than 0", ""),
        ("data.sorce", "x", "no such key", "data.source"),
        ("data.source", "", "must not be empty", ""),
        ("data.crop_area", 0, "must be greater than 0", ""),
        ("augment.mixup", -0.1, "must be at least 0", ""),
        ("augment.cutmix", 1, "must be true or false", ""),
        ("augment.partners", "fresch", "is none of the allowed values", "fresh"),
        ("augment.layers", 4.0, "must be a whole number", "4"),
        ("augment.magnitude", 31, "must be at most 30", ""),
        ("augment.numerics", "pilow", "is none of the allowed values", "pillow"),
        # several keys together
        ("train.accumulate", 3, "does not divide train.batch_size = 4096", ""),
        ("schedule.end", 2, "is above the peak learning rate, 1.6 for a batch of 4096", ""),
        ("schedule.start", 1.7, "is above the peak learning rate", ""),
        ("schedule.warmup_epochs", 361, "the warm-up of 112915.3533 steps is longer", ""),
        ("schedule.warmup_steps", 112_603, "the warm-up of 112603 steps is longer", ""),
    ],
)
def test_values(mistakes, key, value, message, near):
    ((place, problem),) = mistakes("nfnet", {key: value}).items()
    assert (place, problem.file, problem.value, problem.nearest) == (key, "override", value, near)
    assert problem.message.startswith(message)


def test_a_batch_of_one_has_no_partner_in_it(mistakes):
    alone = {"train.batch_size": 1, "augment.partners": "batch"}
    problem = mistakes("nfnet", alone)["augment.partners"]
    assert problem.message == "a batch of one image has no partner in it"
    unmixed = {"augment.mixup": 0, "augment.cutmix": False}
    for changes in (alone | unmixed, {"train.batch_size": 1}):
        assert load_run("nfnet", changes).train.batch_size == 1


def test_mistakes_in_rules(mistakes):
    rules = [{"mach": "x", "lr": 2}, 3, {"match": "", "unit_axes": [1.5], "decay": "true"}]
    found = mistakes(MICRO, {"optimizer.rules": rules})
    assert {key.removeprefix("optimizer.rules"): p.message for key, p in found.items()} == {
        "[0].match": "is required",
        "[0].mach": "no such key",
        "[0].lr": "no such key",
        "[1]": "must be a table",
        "[2].match": "must not be empty",
        "[2].unit_axes[0]": "must be a whole number",
        "[2].decay": "must be true or false",
    }
    assert found["optimizer.rules[0].lr"].nearest == "optimizer.rules[0].learning_rate"
    assert found["optimizer.rules[1]"].allowed == "match, decay, clip, learning_rate, unit_axes"
    assert found["optimizer.rules[2].unit_axes[0]"].value == 1.5
    assert found["optimizer.rules[2].decay"].nearest == "true"


def test_one_file_says_a_thing_in_one_unit(mistakes):
    found = mistakes(MICRO | {"train": {"steps": 20, "epochs": 3}})
    assert found["train.steps"].message == "train.epochs = 3 says the same in another unit"
    assert load_run(MICRO | {"train": {"steps": 20, "epochs": 0}}).steps == 20


def test_a_warm_up_that_is_longer_than_the_run_names_both_files(mistakes):
    problem = mistakes("nfnet", {"train.steps": 1000})["schedule.warmup_epochs"]
    assert (problem.file, problem.value) == ("run preset nfnet", 5)
    assert "the warm-up of 1563.924561 steps is longer than the run of 1000" in problem.message
    assert "(train.steps is set in override)" in problem.message
    problem = mistakes(MICRO, {"train.epochs": 4})["schedule.warmup_epochs"]
    assert "the warm-up of 5 epochs is longer than the run of 4" in problem.message
    assert load_run(MICRO, {"train.epochs": 5}).train.epochs == 5


def test_runs_built_in_python_keep_the_rules():
    model = Model(spec=load_spec("nfnet_micro"))
    assert Run(name="a", model=model, train=Train(steps=9)).train.steps == 9
    with pytest.raises(ValueError, match="is above the peak"):
        Run(name="a", model=model, schedule=Schedule(end=2))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nfnet_f0", "is a model, not a run: a run names it as model.spec"),
        ("nfnett", "no run preset has this name; there are digits, finetune,"),
    ],
)
def test_unknown_runs(mistakes, name, message):
    assert mistakes(name)[""].message.startswith(message)
    assert mistakes({"extends": name})["extends"].nearest == ("nfnet" if name == "nfnett" else "")


def test_repeated_json_keys_at_any_depth(write, mistakes):
    path = write(
        "a.json",
        '{"model": {"set": {"head": {"pool": 1, "pool": 2}}},'
        ' "optimizer": {"rules": [{}, {"match": "a", "match": "b"}]}}',
    )
    assert set(mistakes(path)) == {"model.set.head.pool", "optimizer.rules[1].match"}


# Presets: the numbers of the papers and of the official release (deepmind-research, nfnets/)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_called_what_its_file_is_called(name):
    assert load_run(name).name == name


@pytest.mark.parametrize("name", sorted({*PRESETS} - {"digits"}))
def test_every_recipe_cites_its_source(name):
    run = load_run(name)
    assert "arXiv:" in run.summary
    first, *_ = shipped("runs")[name].read_text().splitlines()
    assert re.match(r"# .*arXiv:210\d\.\d{5}, section", first)


def summary(run: Run) -> dict[str, Any]:
    """What a recipe comes to."""
    return {
        "spec": run.spec.name,
        "dtype": run.model.dtype,
        "batch": run.train.batch_size,
        "steps": run.steps,
        "warmup": run.warmup,
        "peak": run.peak_learning_rate,
        "end": run.schedule.end,
        "decay": run.optimizer.weight_decay,
        "agc": run.agc.clipping,
        "sam": run.sam.rho,
        "ema": run.ema.decay,
        "mixing": (run.augment.mixup, run.augment.cutmix),
        "randaugment": (run.augment.layers, run.augment.magnitude) if run.augment.layers else None,
    }


NFNET = {
    "spec": "nfnet_f0",
    "dtype": "bfloat16",
    "batch": 4096,
    "steps": 112_602,  # (1281167 * 360) // 4096
    "warmup": 1563.924560546875,
    "peak": 1.6,
    "end": 0.0,
    "decay": 2e-5,
    "agc": 0.01,
    "sam": 0.0,
    "ema": 0.99999,
    "mixing": (0.2, True),
    "randaugment": (4, 5),  # level 405
}
PLAIN = {"mixing": (0, False), "randaugment": None}  # crops and flips only
SMALL_BATCH = {"dtype": "float32", "batch": 1024, "warmup": 6255.6982421875, "peak": 0.4}
RECIPES = {
    "nfnet": NFNET,
    **{  # levels 410 and 415
        f"nfnet_f{size}": NFNET
        | {"spec": f"nfnet_f{size}", "randaugment": (4, 10 if size < 3 else 15)}
        for size in range(1, 8)
    },
    "nfnet_sam": NFNET | {"spec": "nfnet_f6", "sam": 0.05, "randaugment": (4, 15)},
    "nf_regnet": NFNET
    | SMALL_BATCH
    | {"spec": "nf_regnet_b0", "steps": 450_410, "end": 1e-3, "decay": 5e-5, "agc": 0}
    | {"randaugment": None},
    "nf_resnet": NFNET | SMALL_BATCH | PLAIN | {"spec": "nf_resnet50", "decay": 1e-4, "ema": 0},
    "pretrain": NFNET
    | PLAIN
    | {"spec": "nfnet_f4_plus", "steps": 1_464_843, "warmup": 5000, "decay": 1e-6, "ema": 0},
    "finetune": NFNET
    | {"spec": "nfnet_f4_plus", "batch": 2048, "steps": 15_000, "warmup": 5000, "peak": 0.1}
    | {"decay": 1e-5, "sam": 0.05, "randaugment": (4, 15)},
}


@pytest.mark.parametrize("name", RECIPES)
def test_presets_are_the_published_recipes(name):
    run = load_run(name)
    assert run.train.examples == (0 if name == "pretrain" else IMAGENET)
    jft = {"train.examples": 300_000_000} if name == "pretrain" else {}
    run = load_run(run, jft)
    assert summary(run) == RECIPES[name]
    assert run.data.source == ("images" if name == "pretrain" else "imagenet")
    assert (run.data.crop_area, run.data.crop_ratio, run.data.flip) == (0.08, 4 / 3, True)
    assert (run.augment.partners, run.augment.numerics) == ("fresh", "official")
    assert run.loss.label_smoothing == 0.1
    assert (run.optimizer.kind, run.optimizer.momentum, run.optimizer.nesterov) == (
        *("sgd", 0.9, True),
    )
    assert (run.schedule.kind, run.schedule.start, run.agc.eps) == ("cosine", 0, 1e-3)
    assert (run.sam.fraction, run.sam.synchronize, run.ema.warmup) == (0.2, False, True)


def test_presets_change_their_networks_as_published():
    assert load_run("pretrain").spec == load_spec("nfnet_f4_plus", {"resolution.train": 224})
    changes = {"head.dropout": 0.25, "regularization.stochastic_depth": 0.1}
    assert load_run("finetune").spec == load_spec("nfnet_f4_plus", changes)
    assert load_run("nfnet").spec == load_spec("nfnet_f0")


# The schema for editors, and the page


def test_the_schema_describes_every_key():
    schema = file_schema(Run)
    assert {"extends", "$schema", *Run.model_fields} == set(schema["properties"])
    assert schema["title"] == "nfflax run spec"
    for title, table in schema["$defs"].items():
        assert table["additionalProperties"] is False, title
        assert "required" not in table, title
        for key, field in table["properties"].items():
            assert "description" in field or "$ref" in field or "default" in field, (title, key)
    model = schema["$defs"]["Model"]["properties"]
    assert model["spec"]["anyOf"] == [{"type": "string"}, {"$ref": "#/$defs/Spec"}]
    assert model["set"]["$ref"] == "#/$defs/Spec"


def test_the_shipped_schema_is_the_generated_one():
    shipped_schema = json.loads((preset_root() / "run_schema.json").read_text())
    assert shipped_schema == file_schema(Run), "nfflax spec schema --run > specs/run_schema.json"


def test_the_page_shows_runs_that_load(write, monkeypatch, tmp_path):
    blocks = re.findall(r"(?ms)^```toml run\n(.*?)^```", PAGE.read_text("utf-8"))
    assert blocks
    write("my_net.toml", 'extends = "nfnet_micro"')
    monkeypatch.chdir(tmp_path)
    for text in blocks:
        assert load_run(write("my_run.toml", text)).name == "my_run"
