"""Places of weights: local paths, and addresses that a server on this machine stands for."""

import json
import resource
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from email.message import Message

import pytest
from file_server import CONTENT, MD5, SHA256, files_in, serving

from nfflax.weights import WeightsError, download, places
from nfflax.weights.places import fetch
from nfflax.weights.published import Published


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    with serving() as running:
        yield running


def problem_of(place) -> str:
    with pytest.raises(WeightsError) as caught:
        fetch(place)
    assert caught.value.source == place
    (problem,) = caught.value.problems
    return problem


# On this machine


def test_a_local_path_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("nfnet_f0", "timm"):
        tmp_path.joinpath(name).mkdir()
    found = fetch(tmp_path)
    assert (found.path, found.notes, found.published) == (tmp_path, (), None)
    found = fetch("nfnet_f0")
    assert found.published is None
    assert found.notes[0].endswith("not the published weights")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert fetch("~/timm").path == tmp_path / "timm"


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("runs/none", "no such file or folder. Allowed: a local path, https://"),
        ("nfnet_l0", "Did you mean timm_nfnet_l0?"),
        ("eca_nfnet_l2.ra3_in1k", "Did you mean timm_eca_nfnet_l2?"),
        ("nfnet-f0", "Did you mean nfnet_f0?"),
        ("timm/nfnet_l0.ra2_in1k", "Did you mean hf://timm/nfnet_l0.ra2_in1k?"),
        ("hf-hub:owner/net@v1", "Did you mean hf://owner/net@v1?"),
        ("nfnet_f7", "The preset nfnet_f7 has no published weights."),
        ("timm_nfnet_f0", "The preset timm_nfnet_f0 has no published weights."),
        ("file:///etc/passwd", "file:// is no way to weights."),
        ("ftp://host/file", "ftp:// is no way to weights."),
        ("hf://nfnet_l0", "not of the form hf://owner/repo"),
        ("hf://owner/repo@", "not of the form hf://owner/repo"),
        ("https://", "no host"),
        ("http://host:port/file", "The address cannot be used: nonnumeric port"),
    ],
)
def test_what_is_no_place(place, message, server):
    assert message in problem_of(place)


def test_nothing_is_no_place():
    with pytest.raises(WeightsError, match="No place is given"):
        fetch("")


# Addresses


def test_an_address_is_fetched_once(server, tmp_path):
    heard = []
    url = f"{server.address}/some/weights.npz"
    found = fetch(url, progress=lambda done, total: heard.append((done, total)))
    assert found.path.read_bytes() == CONTENT
    assert found.path.is_relative_to(tmp_path / "cache" / "nfflax" / "weights")
    assert found.path.name == "weights.npz"
    assert found.sha256 == SHA256
    assert f"sha256 {SHA256}, md5 {MD5}" in found.notes
    assert heard[-1] == (len(CONTENT), len(CONTENT))
    assert [done for done, _ in heard] == sorted({done for done, _ in heard})
    again = fetch(url)
    assert (again.path, again.sha256) == (found.path, SHA256)
    assert "from the cache" in again.notes[0]
    assert server.asked == ["/some/weights.npz"]
    fetch(f"{server.address}/other/weights.npz")  # another file of that name
    assert len(server.asked) == 2


def test_a_cached_file_of_another_size_is_fetched_again(server):
    url = f"{server.address}/weights.npz"
    path = fetch(url).path
    path.write_bytes(CONTENT[:100])
    assert fetch(url).path.read_bytes() == CONTENT
    path.with_name("weights.npz.json").write_text("[]")
    assert fetch(url).sha256 == SHA256
    assert len(server.asked) == 3


def test_redirections_are_followed(server):
    assert fetch(f"{server.address}/to-good").sha256 == SHA256


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gone", "answers 404: it has no such file"),
        ("secret", "answers 403: it refuses access"),
        ("broken", "answers 500"),
        ("page", "a web page, not with a file"),
        ("short", f"Only {len(CONTENT) - 1000:,} of {len(CONTENT):,} bytes came"),
        ("empty", "file is empty"),
        ("silent", "cannot be reached"),
        ("to-itself", "infinite loop"),
        ("to-file", "not allowed"),
    ],
)
def test_a_failed_download_leaves_nothing(server, tmp_path, name, message):
    assert message in problem_of(f"{server.address}/{name}")
    assert files_in(tmp_path) == []


def test_no_server(server, tmp_path):
    server.server_close()
    assert "cannot be reached" in problem_of(f"{server.address}/weights.npz")
    assert files_in(tmp_path) == []


def test_https_never_becomes_http():
    request = urllib.request.Request("https://host/file")
    with pytest.raises(WeightsError, match="not https: refused"):
        download._Redirects().redirect_request(
            request, None, 302, "Found", Message(), "http://host/file"
        )


def test_a_disk_without_room(server, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(WeightsError, match="cannot be written: File too large"):
            fetch(f"{server.address}/weights.npz")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files_in(tmp_path) == []


def test_several_may_fetch_the_same_file_at_once(server, tmp_path):
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(fetch, [f"{server.address}/weights.npz"] * 8))
    assert {(each.path, each.sha256) for each in found} == {(found[0].path, SHA256)}
    assert found[0].path.read_bytes() == CONTENT
    assert files_in(tmp_path) == ["weights.npz", "weights.npz.json"]


# Checksums


def published_at(place, **options) -> Published:
    return Published("nfnet_f0", place, "someone", 83.6, 256, "a licence", **options)


@pytest.mark.parametrize(("md5", "said"), [(MD5, "is the one"), ("0" * 32, "is not 000")])
def test_a_listed_md5_is_compared_and_never_an_error(server, monkeypatch, md5, said):
    entry = published_at(f"{server.address}/F0_haiku.npz", md5=md5)
    monkeypatch.setattr(places, "published", {"nfnet_f0": entry}.get)
    found = fetch("nfnet_f0")
    assert found.published is entry
    assert found.notes[0] == "nfnet_f0: published by someone, licence a licence"
    assert said in found.notes[-1]
    assert fetch("nfnet_f0").notes[-1] == found.notes[-1]  # from the cache too


@pytest.mark.parametrize(("digits", "said"), [(SHA256[:8], "agrees"), ("00000000", "NOT agree")])
def test_a_checksum_in_the_files_name_is_compared(server, digits, said):
    assert said in fetch(f"{server.address}/net-{digits}.pth").notes[-1]


def test_the_record_of_a_download_is_plain_json(server):
    path = fetch(f"{server.address}/weights.npz").path
    record = json.loads(path.with_name("weights.npz.json").read_text())
    assert record == {
        "url": f"{server.address}/weights.npz",
        "size": len(CONTENT),
        "sha256": SHA256,
        "md5": MD5,
    }
