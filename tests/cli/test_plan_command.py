"""`nfflax plan`: on paper, by search, compiled for CPU devices and for TPUs; what it refuses."""

import importlib.util
import json

import pytest

from nfflax.insight import rehearsal
from nfflax.insight.rehearsal import Rehearsal, rehearse

TINY = {
    "model": {
        "spec": "nfnet_nano",
        "dtype": "float32",
        "set": {
            "stages": {"depth": [1, 3], "width": [16, 32], "stride": [1, 2], "group_width": 8},
            "head": {"width_mult": 1, "num_classes": 4},
            "resolution": {"train": 16, "test": 16},
        },
    },
    "augment": {"mixup": 0, "cutmix": False, "layers": 0},
    "train": {"batch_size": 32, "steps": 8},
    "schedule": {"warmup_epochs": 0},
}


@pytest.fixture
def tiny(write):
    return write("tiny.json", **TINY)


@pytest.fixture
def rehearsed(monkeypatch):
    """Stands in for compilers: says what one would, of what it was asked."""
    asked = []

    def answer(run, place, *, optimize=False):
        asked.append((run, place, optimize))
        state = {"params": 10**9, "opt": 10**9}
        return Rehearsal(
            devices=16,
            mesh={"data": 16, "fsdp": 1, "tensor": 1, "spatial": 1},
            state=state,
            fits=len(asked) == 1,
            memory=4 * 10**9,
            capacity=17 * 10**9,
            seconds=1.0,
            optimized=optimize,
            arguments=3 * 10**9,
            temporary=10**9,
        )

    monkeypatch.setattr(rehearsal, "rehearse", answer)
    return asked


def test_on_paper(run):
    words = ("plan", "nfnet_f6", "--topology", "v5p:8x8x16", "--on-paper")
    ran = run(*words)
    assert (ran.code, ran.err) == (0, "")
    assert "estimated from the published rates of 1,024 v5p, not measured" in ran.out
    assert "compiled" not in ran.out
    data = json.loads(run(*words, "--json").out)
    assert data["compiled"] is None
    seconds = data["estimated"]["seconds"]
    assert seconds["at_peak"] <= seconds["expected"]
    per_epoch = 1_281_167 / data["estimated"]["images_per_second"] / 3600
    assert data["estimated"]["hours_per_epoch"] == pytest.approx(per_epoch)


def test_what_does_not_fit_on_paper_ends_with_1(run):
    ran = run("plan", "nfnet_f6", "--topology", "v5e:4x4", "--on-paper")
    assert ran.code == 1
    assert "does not fit" in ran.out


def test_a_compiled_step_is_shown_with_its_estimate(run, rehearsed):
    words = ("plan", "nfnet", "--topology", "v5e:4x4", "--set", "train.batch_size=512")
    ran = run(*words, "--optimize")
    assert ran.code == 0
    assert [(p.name, optimize) for _, p, optimize in rehearsed] == [("v5e:4x4", True)]
    assert "4.0GB of 17.0GB: fits" in ran.out
    assert "no faster than" in ran.out
    assert "to expect" in ran.out


def test_a_search_compiles_the_best_as_many_as_asked(run, rehearsed):
    words = ("plan", "nfnet_f6", "--topology", "v5e:16x16", "--search", "--compile", "2")
    ran = run(*words)
    assert ran.code == 0
    assert len(rehearsed) == 2
    assert ran.out.count("4.0GB, fits") == ran.out.count("4.0GB, does not fit") == 1
    assert "next: nfflax plan nfnet_f6 --topology v5e:16x16 --set mesh.fsdp=" in ran.out
    ways = json.loads(run(*words, "--json").out)["ways"]
    assert [("compiled" in way) for way in ways[:3]] == [True, True, False]
    tried = [each.mesh.fsdp for each, _, _ in rehearsed[2:]]
    assert tried == [way["settings"]["mesh.fsdp"] for way in ways[:2]]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--topology", "v5f:4x4"], "did you mean: v5"),
        (["--topology", "h100:8"], "there is no compiler for this chip without the chip"),
        (["--topology", "v5e:4x4", "--set", "mesh.fsdp=3"], "does not make the 16 chips"),
        (["--devices", "cpu:8", "--search"], "needs a pod"),
        (["--topology", "v5e:4x4", "--compile", "2"], "with --search"),
        (["--devices", "gpu:8"], "'gpu:8' is not cpu:N"),
        ([], "one of the arguments --topology --devices is required"),
    ],
)
def test_what_cannot_be_planned_ends_with_2(run, words, said):
    ran = run("plan", "nfnet", *words)
    assert ran.code == 2
    assert said in ran.err


def test_without_libtpu_it_says_what_to_install(run, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    ran = run("plan", "nfnet", "--topology", "v5e:4x4")
    assert ran.code == 2
    assert "pip install nfflax[tpu]" in ran.err


@pytest.mark.slow
def test_compiled_for_cpu_devices_in_a_process(run, tiny):
    ran = run("plan", tiny, "--devices", "cpu:8", "--set", "mesh.fsdp=2", "--json")
    assert ran.code == 0
    data = json.loads(ran.out)["compiled"]
    assert (data["devices"], data["mesh"]["data"], data["mesh"]["fsdp"]) == (8, 4, 2)
    assert data["arguments"] > sum(data["state"].values()) > 0
    kinds = {each["kind"] for each in data["exchanges"]}
    assert {"all-reduce", "all-gather"} <= kinds


@pytest.mark.slow
def test_what_devices_and_batch_disagree_on_comes_back_from_the_process(run, tiny):
    ran = run("plan", tiny, "--devices", "cpu:3")
    assert ran.code == 2
    assert "train.batch_size = 32" in ran.err


@pytest.mark.slow
def test_compiled_for_a_tpu_pod_and_gradients_cross_in_bfloat16(run, tiny):
    pytest.importorskip("libtpu")
    words = ("--set", "model.dtype=bfloat16", "--json")
    ran = run("plan", tiny, "--topology", "v5e:2x2", *words)
    assert ran.code == 0
    compiled = json.loads(ran.out)["compiled"]
    [reduced] = [each for each in compiled["exchanges"] if each["devices"] == 4]
    weights = compiled["state"]["params"] / 4
    assert reduced["kind"] == "all-reduce"
    # 2 bytes for each, but 4 for the classifier's, which computes in float32.
    assert 1.9 * weights < reduced["bytes"] < 2.3 * weights


@pytest.mark.slow
def test_a_step_that_does_not_fit_a_tpu_says_how_much_it_needs():
    pytest.importorskip("libtpu")
    from nfflax.insight.chips import pod
    from nfflax.spec.load import load_run

    sizes = {"train.batch_size": 1 << 20, "model.set.resolution.train": 64}
    found = rehearse(load_run({"name": "tiny", **TINY}, sizes), pod("v5e:2x2"))
    assert not found.fits
    assert found.memory > found.capacity > 15 << 30
