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
def rehearsed(monkeypatch, request):
    """Stands in for compilers: refuses as many steps as its parameter says, then finds room."""
    asked, refused = [], getattr(request, "param", 0)

    def answer(run, place, *, optimize=False):
        asked.append((run, place, optimize))
        state = {"params": 10**9, "opt": 10**9}
        return Rehearsal(
            devices=16,
            mesh={"data": 16, "fsdp": 1, "tensor": 1, "spatial": 1},
            state=state,
            fits=len(asked) > refused,
            memory=4 * 10**9 if len(asked) > refused else 20 * 10**9,
            capacity=17 * 10**9,
            seconds=1.0,
            optimized=optimize,
            arguments=3 * 10**9,
            temporary=10**9,
        )

    monkeypatch.setattr(rehearsal, "rehearse", answer)
    monkeypatch.setattr(rehearsal, "check_compiler", lambda pod: None)
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


SEARCH = ("plan", "nfnet_f6", "--topology", "v5e:16x16", "--search")


@pytest.mark.parametrize("rehearsed", [1], indirect=True)
def test_a_search_compiles_until_one_fits_and_recommends_that_one(run, rehearsed):
    ran = run(*SEARCH)
    assert ran.code == 0
    assert ran.out.count("20.0GB, does not fit") == ran.out.count("4.0GB, fits") == 1
    refused, fitting = (asked for asked, _, _ in rehearsed)
    assert refused.model_dump() != fitting.model_dump()
    said = ran.out.split("checked by the compiler: ")[1].replace("\n", " ").split()
    for key, value in {
        "mesh.fsdp": fitting.mesh.fsdp,
        "model.remat": fitting.model.remat,
        "train.accumulate": fitting.train.accumulate,
    }.items():
        assert f"{key}={value}" in said


@pytest.mark.parametrize("rehearsed", [0], indirect=True)
def test_a_search_says_in_json_what_was_compiled(run, rehearsed):
    ran = run(*SEARCH, "--json")
    assert (ran.code, len(rehearsed)) == (0, 1)
    first, *others = json.loads(ran.out)["ways"]
    assert first["compiled"]["fits"]
    assert first["settings"]["mesh.fsdp"] == rehearsed[0][0].mesh.fsdp
    assert not any("compiled" in way for way in others)


@pytest.mark.parametrize("rehearsed", [1000], indirect=True)
def test_a_search_in_which_the_compiler_refuses_all_ends_with_1(run, rehearsed):
    ran = run(*SEARCH)
    assert ran.code == 1
    assert "no way is left" in ran.out
    assert 1 < len(rehearsed) < 20  # those that count no less are not tried


def test_a_search_on_paper_compiles_nothing(run, rehearsed):
    ran = run("plan", "nfnet", "--topology", "h100:64", "--search", "--on-paper")
    assert (ran.code, rehearsed) == (0, [])
    assert "on paper, not checked by the compiler: nfflax plan nfnet --topology h100:64" in ran.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--topology", "v5f:4x4"], "did you mean: v5"),
        (["--topology", "h100:8"], "there is no compiler for this chip without the chip"),
        (["--topology", "v5e:4x4", "--set", "mesh.fsdp=3"], "does not make the 16 chips"),
        (["--devices", "cpu:8", "--search"], "needs a pod"),
        (["--topology", "h100:64", "--search"], "others on paper (--on-paper)"),
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
    for words in ([], ["--search"]):
        ran = run("plan", "nfnet", "--topology", "v5e:4x4", *words)
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
def test_on_a_tpu_kernels_come_to_the_maps_and_no_map_is_gathered():
    pytest.importorskip("libtpu")
    from nfflax.insight.chips import pod
    from nfflax.spec.load import load_run

    stage = {"depth": [2], "width": [256], "stride": [1], "group_width": 128}
    sizes = {"model.dtype": "bfloat16", "model.set.stages": stage, "mesh.fsdp": 4}
    images = {"train.batch_size": 256, "model.set.resolution.train": 96}
    found = rehearse(load_run({"name": "tiny", **TINY}, sizes | images), pod("v5e:4x4"))
    # Kernels are gathered twice, gradients summed: 5.6 MB. Where maps follow the kernels: 3.5 GB.
    assert sum(each.bytes for each in found.exchanges) < 10 * found.state["params"]


@pytest.mark.slow
def test_a_step_that_does_not_fit_a_tpu_says_how_much_it_needs():
    pytest.importorskip("libtpu")
    from nfflax.insight.chips import pod
    from nfflax.spec.load import load_run

    sizes = {"train.batch_size": 1 << 20, "model.set.resolution.train": 64}
    found = rehearse(load_run({"name": "tiny", **TINY}, sizes), pod("v5e:2x2"))
    assert not found.fits
    assert found.memory > found.capacity > 15 << 30
