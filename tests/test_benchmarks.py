"""The comparison with peers, without running them: medians, ratios, tables, the page, arguments."""

import importlib
import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def _importable():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        yield


def part(name):
    return importlib.import_module(name)


def measured(key, seconds, *, macs=1e9, peer="nfflax", failure=""):
    """A contestant with a turn per pair of wall and CPU seconds."""
    driver, job = part("peers.driver"), part("peers.job")
    contestant = part("peers.contestants").Contestant(key, f"the {key}", peer)
    ready = job.Ready(12.0, 15.0, 1.0, 2 * 10**9, 71_489_284, macs, "cpu", {"jax": "0.10"})
    turns = [driver.Turn(*each) for each in seconds]
    return driver.Measured(contestant, None if failure else ready, turns, failure)


@pytest.fixture
def table():
    """Two that finished, one that did not, and the floor; a machine that slows down on the way."""
    found = [
        measured("ours", [(1.0, 2.0), (2.0, 4.0), (10.0, 20.0)]),
        measured("peer", [(3.0, 5.0), (6.0, 10.0), (30.0, 50.0)], peer="timm"),
        measured("broken", [], failure="no C++ compiler"),
        measured("matmul", [(0.5, 1.0), (1.0, 2.0), (5.0, 10.0)], macs=24e9),
    ]
    return part("peers.results").rows(found, what="step", batch=8, device="cpu")


def test_rows_are_medians_and_ratios_within_a_round(table):
    ours, peer, broken = table
    assert (ours.wall, ours.cpu) == (2.0, 4.0)
    assert (ours.wall_ratio, ours.cpu_ratio) == (1.0, 1.0)
    assert (peer.wall_ratio, peer.cpu_ratio) == (3.0, 2.5)
    assert ours.images == 4.0
    assert broken.failure == "no C++ compiler"
    # 8 images, three passes of 1e9 multiply-adds, at 2 s: as much as the floor does at 1 s.
    assert ours.rate == pytest.approx(2 * 3 * 8 * 1e9 / 2.0)
    assert ours.share == pytest.approx(0.5)
    assert peer.share == pytest.approx(0.2)


def test_a_gpu_is_judged_by_the_clock():
    found = [measured("ours", [(2.0, 0.1)]), measured("matmul", [(1.0, 0.3)], macs=8e9)]
    [ours] = part("peers.results").rows(found, what="forward", batch=8, device="cuda")
    assert ours.share == pytest.approx(0.5)


def test_another_network_is_called_that():
    found = [measured(key, [(1.0, 1.0)], macs=m) for key, m in (("a", 1e9), ("b", 1.01e9))]
    found += [measured("c", [(1.0, 1.0)], macs=2e9), measured("matmul", [(1.0, 1.0)])]
    rows = part("peers.results").rows(found, what="step", batch=8, device="cpu")
    assert [row.label for row in rows] == ["the a", "the b", "the c, another network"]


@pytest.mark.parametrize("broken", ["ours", "matmul"])
def test_rows_without_the_first_or_the_floor(broken):
    found = [
        measured(key, [] if key == broken else [(1.0, 1.0)], failure="gone" * (key == broken))
        for key in ("ours", "peer", "matmul")
    ]
    peer = part("peers.results").rows(found, what="step", batch=8, device="cpu")[1]
    assert bool(peer.cpu_ratio) == (broken != "ours")
    assert bool(peer.share) == (broken != "matmul")


def test_markdown(table):
    lines = part("peers.page").contest(table, device="cpu", peak=0.0).splitlines()
    header, _, ours, peer, _, note = lines
    cells = dict(zip(header.split(" | "), peer.split(" | "), strict=True))
    assert cells["s"] == "6.00"
    assert cells["in CPU s"] == "2.50"
    assert cells["of a matrix product"] == "20%"
    assert ours.startswith("| the ours | 2.00 | 4.00 |")
    assert "multiply-adds" in header
    assert "peak" not in header
    assert note == "- the broken: not measured: no C++ compiler."


def test_markdown_of_a_gpu(table):
    header, _, ours, *_ = part("peers.page").contest(table, device="cuda", peak=1e11).splitlines()
    assert "CPU" not in header
    assert "| the ours | 4.0 | 2.00 |" in ours
    assert "| 24% |" in ours  # 2.4e10 operations per second


def test_the_page_keeps_all_but_the_place(tmp_path):
    page = part("peers.page")
    target = tmp_path / "page.md"
    target.write_text("before\n<!-- step: here -->\nold\n<!-- end of step -->\nafter\n")
    for _ in range(2):
        page.fill(target, "step", r"new \1")
    expected = "before\n<!-- step: here -->\n\nnew \\1\n\n<!-- end of step -->\nafter\n"
    assert target.read_text() == expected
    with pytest.raises(page.PageError, match="no place '<!-- forward"):
        page.fill(target, "forward", "new")
    with pytest.raises(page.PageError, match="No such file"):
        page.fill(tmp_path / "other.md", "step", "new")


def test_the_documentation_has_every_place(tmp_path):
    text = (FOLDER.parent / "docs" / "benchmarks.md").read_text("utf-8")
    target = tmp_path / "page.md"
    target.write_text(text, "utf-8")
    for name in ("step", "forward", "compile", "compile-tpu"):
        part("peers.page").fill(target, name, "new")
    assert target.read_text("utf-8").count("\nnew\n") == 4


def test_bars_run_from_the_quickest(table, tmp_path):
    plot = part("peers.plot")
    assert [bar[:2] for bar in plot.bars(table[::-1], device="cpu")] == [
        ("the ours", 4.0),
        ("the peer", 10.0),
    ]
    plot.draw(table, tmp_path / "bars.png", title="One train step", device="cpu")
    assert tmp_path.joinpath("bars.png").read_bytes()[1:4] == b"PNG"


def test_contestants_start_with_the_reference_and_end_with_the_floor():
    contestants = part("peers.contestants").contestants
    assert [each.key for each in contestants("step", [])][:2] == ["nfflax", "nfflax-unrolled"]
    chosen = [each.key for each in contestants("forward", ["timm*"])]
    assert chosen[0] == "nfflax-folded"
    assert chosen[-1] == "matmul"
    assert all(key.startswith("timm") for key in chosen[1:-1])
    for what in ("step", "forward"):
        found = [each.key for each in contestants(what, [])]
        assert len(set(found)) == len(found)
        assert all(
            (FOLDER / f"peers/run_{each.peer}.py").exists() for each in contestants(what, [])
        )


def test_a_job_survives_the_trip():
    job = part("peers.job")
    sent = job.Job("step", "nfnet_f0", 96, 8, "float32", "cpu", options={"unroll": 99})
    assert job.Job.read(sent.write()) == sent


TALKER = """
import json, sys
print(json.dumps({"ready": dict(compile_wall=1, compile_cpu=1, step_wall=1, memory=1, params=1,
                                macs=1.0, device="cpu", versions={})}), flush=True)
for count, line in enumerate(sys.stdin):
    if count == 2 and sys.argv[1] == "dies":
        sys.exit("out of memory")
    print(json.dumps({"wall": 10.0 * int(line.split()[1]), "cpu": 5.0}), flush=True)
"""


def test_rounds_go_on_without_one_that_dies(monkeypatch, tmp_path):
    """Real processes that only talk: the others take their turns, the dead one leaves a reason."""
    driver, job = part("peers.driver"), part("peers.job").Job
    tmp_path.joinpath("talker.py").write_text(TALKER)
    start_process = driver.subprocess.Popen

    def popen(command, **how):
        return start_process([sys.executable, str(tmp_path / "talker.py"), command[-1]], **how)

    monkeypatch.setattr(driver.subprocess, "Popen", popen)
    monkeypatch.setattr(job, "write", lambda self: self.network)

    def start(contestant):
        work = job("step", contestant.key, 96, 8, "float32", "cpu")
        return driver.Worker.start(contestant, Path(sys.executable), work)

    chosen = [measured(key, []).contestant for key in ("lives", "dies")]
    lives, dies = driver.measure(chosen, start, rounds=3, together=True, tell=lambda _: None)
    assert [turn.wall for turn in lives.turns] == [10.0] * 3
    assert lives.turns[0].cpu == 5.0
    assert dies.failure == "ended with code 1: out of memory"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "tim"], "'tim' is none of nfflax, "),
        (["--official", "."], "has no nfnets/nfnet.py"),
        (["--network", "nfnet_f9"], "nfnet_f"),
        (["--rounds", "0"], "at least 1"),
        (["--write", "page.md"], "page.md: No such file"),
        (["--what", "stop"], "neither step nor forward"),
        (["--venv", "timm=/nowhere"], "a venv's folder"),
    ],
)
def test_bad_arguments_are_named(arguments, said, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        part("against_peers").main(arguments)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_the_command_on_the_page_names_no_folder_of_this_machine(tmp_path):
    against_peers = part("against_peers")
    given = ["--timm", "--official", str(tmp_path), "--rounds", "3", "--json", "out.json"]
    args = against_peers._parser().parse_args(given)
    expected = "python benchmarks/against_peers.py --timm --official deepmind-research --what step"
    assert against_peers.command(args, "step") == f"{expected} --rounds 3"


def test_compile_time_rows():
    compile_time = part("compile_time")
    fresh = {name: {"wall": 1.0, "cpu": 1.5} for name in compile_time.PARTS}
    expected = ["nfnet_f0", "scanned", "1.00", "1.00", "1.00", "4.50"]
    assert compile_time.row("nfnet_f0", "scanned", fresh, None) == expected
    again = compile_time.row("nfnet_f0", "scanned", fresh, json.loads(json.dumps(fresh)))
    assert again == [*expected, "3.00", "4.50"]
    with pytest.raises(SystemExit, match="2"):
        compile_time.main(["--networks", "nfnet_f9"])
