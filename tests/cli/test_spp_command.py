"""`nfflax spp`: curves and a verdict, as text, JSON and a picture; what scripts can rely on."""

import json

import pytest

SMALL = {
    "extends": "nf_resnet",
    "stem": {"width": 8, "kernel": 3, "stride": 1, "pool": "none"},
    "stages": {"depth": [1, 1], "width": [16, 16], "stride": [1, 2]},
    "resolution": {"train": 16, "test": 16},
}


@pytest.fixture
def small(write):
    return write("small.json", **SMALL)


def test_a_fault_is_named_and_ends_a_check_with_code_1(run, small):
    ran = run("spp", small, "--set", "numerics.gamma=none", "--check")
    assert (ran.code, ran.err) == (1, "")
    assert f"{small}  8 images of N(0, 1) noise, 16 px" in ran.out
    assert "fault: the branch of stages.1.blocks.0 ends with " in ran.out
    assert 'gamma of `relu` is not applied (numerics.gamma = "none")' in ran.out
    assert "note: gains that start at zero are taken as ones" in ran.out
    head, rule, stem, *stages = ran.out.splitlines()[1:6]
    assert head.split() == ["stage", "blocks", "variance", "planned", "squared", "mean", "branch"]
    assert [line.split()[0] for line in (stem, *stages)] == ["stem", "0", "1"]
    assert set(rule) == {"─"}
    assert sum(line.startswith(("variance ", "squared mean ", "branch ")) for line in
               ran.out.splitlines()) == 3  # fmt: skip


@pytest.mark.slow
def test_several_networks_as_json_and_picture(run, small, tmp_path):
    pytest.importorskip("matplotlib")
    plot = tmp_path / "spp.png"
    words = ("--vary", "norm.kind=none,batch", "--batch", "2", "--plot", plot, "--json")
    ran = run("spp", small, "--check", *words)
    found = json.loads(ran.out)
    assert (ran.code, found["plot"]) == (0, str(plot))
    planned, normed = found["networks"]
    assert [planned["label"], normed["label"]] == [f"{small} kind={k}" for k in ("none", "batch")]
    assert planned["images"] == "2 images of N(0, 1) noise, 16 px"
    assert planned["blocks"] == ["stages.0.blocks.0", "stages.1.blocks.0"]
    assert planned["planned"] == pytest.approx([1, 1.04, 1.04])
    assert planned["curves"]["avg_var"] == pytest.approx(planned["planned"], rel=0.25)
    assert (planned["healthy"], planned["faults"], normed["planned"]) == (True, [], None)
    assert "batch normalisation" in " ".join(normed["notes"])
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert plot.stat().st_size < 100_000


@pytest.mark.slow
def test_images_of_a_run(run, small):
    pytest.importorskip("sklearn")
    ran = run("spp", small, "--data", "digits", "--batch", "3")
    assert ran.code == 0
    assert "3 images of digits, 16 px" in ran.out
    assert "ok: every part does as planned" in ran.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["spp"], "the following arguments are required: SPEC"),
        (["spp", "nfnet_g0"], "did you mean: nfnet_"),
        (["spp", "nfnet_f0", "--set", "block.alfa=1"], "block.alpha"),
        (["spp", "nfnet_f0", "--vary", "block.alpha"], "is not KEY=A,B,..."),
        (["spp", "nfnet_f0", "--vary", "block.alpha=0.2,x"], "block.alpha"),
        (["spp", "nfnet_f0", "--batch", "0"], "'0' is no whole number from 1"),
        (["spp", "nfnet_f0", "--resolution", "99999"], "99999 is more than 2048 pixels"),
        (["spp", "nfnet_f0", "--data", "digit"], "did you mean: digits"),
        (["spp", "nfnet_f0", "--plot", "spp.jpg"], "is not called .png"),
        (["spp", "nfnet_f0", "--plot", "nowhere/spp.png"], "in a folder that is not there"),
    ],
)
def test_mistakes_end_with_code_2(run, words, said):
    ran = run(*words)
    assert (ran.code, ran.out) == (2, "")
    assert said in ran.err


def test_a_plot_without_matplotlib_is_refused_before_any_work(run, monkeypatch):
    found = "nfflax.cli.spp.importlib.util.find_spec"
    monkeypatch.setattr(found, lambda name: None)
    ran = run("spp", "nfnet_f7", "--plot", "spp.png")
    assert (ran.code, ran.out) == (2, "")
    assert 'needs matplotlib; the extra "plot" brings it' in ran.err
