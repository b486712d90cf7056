"""Places on Hugging Face's hub: its own package, and a server on this machine in its stead."""

import sys

import pytest
from file_server import COMMIT, CONTENT, files_in, serving

from nfflax.weights import WeightsError
from nfflax.weights.hub import parse_hub_place
from nfflax.weights.places import fetch


def problem_of(place) -> str:
    with pytest.raises(WeightsError) as caught:
        fetch(place)
    assert caught.value.source == place
    (problem,) = caught.value.problems
    return problem


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A server that is a hub with a few repositories."""
    from huggingface_hub import constants, hf_hub_url

    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with serving() as server:
        template = "/{repo_id}/resolve/{revision}/{filename}"  # both are made from HF_ENDPOINT
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.address + template)
        assert hf_hub_url("me/net", "a").startswith(server.address)  # never another server
        server.hub = {
            "me/net/resolve/main/config.json": b"{}",
            "me/net/resolve/main/model.safetensors": CONTENT,
            "me/net/resolve/v1/config.json": b"{}",
            "me/net/resolve/v1/pytorch_model.bin": CONTENT,
            "me/bare/resolve/main/model.safetensors": CONTENT,
            "me/net/resolve/main/nets/a.pth": CONTENT,
            "me/private/resolve/main/config.json": "RepoNotFound",
            "me/gated/resolve/main/config.json": "GatedRepo",
            "me/net/resolve/v9/config.json": "RevisionNotFound",
        }
        yield server


def test_a_repository_is_a_folder_with_its_config(hub):
    heard = []
    found = fetch("hf://me/net", progress=lambda done, total: heard.append((done, total)))
    assert files_in(found.path) == ["config.json", "model.safetensors"]
    assert found.path.joinpath("model.safetensors").read_bytes() == CONTENT
    assert found.notes == (f"hf://me/net at commit {COMMIT}",)
    assert heard[-1] == (len(CONTENT), len(CONTENT))
    asked = len(hub.asked)
    assert fetch("hf://me/net").path == found.path
    assert len(hub.asked) == asked


def test_a_revision_a_file_and_a_repository_without_config(hub):
    assert files_in(fetch("hf://me/net@v1").path) == ["config.json", "pytorch_model.bin"]
    assert fetch("hf://me/net/nets/a.pth").path.read_bytes() == CONTENT
    assert fetch("hf://me/bare").path.name == "model.safetensors"


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("hf://me/private", "no repository me/private, or it is private: `hf auth login`"),
        ("hf://me/gated", "wants terms accepted first: at https://huggingface.co/me/gated"),
        ("hf://me/net@v9", "me/net has no revision v9"),
        ("hf://me/net/none.bin", "me/net has no file none.bin"),
        ("hf://me/empty", "me/empty has neither model.safetensors nor pytorch_model.bin"),
        ("hf://me/-net-", "cannot be a file of the hub"),
        ("hf://me/net/../../etc", "cannot be a file of the hub"),
    ],
)
def test_what_the_hub_does_not_have(hub, place, message):
    assert message in problem_of(place)


def test_without_a_network_the_hubs_cache_serves(hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "not in the local cache, and HF_HUB_OFFLINE is set" in problem_of("hf://me/net")
    places = ["hf://me/net", "hf://me/net@v1", "hf://me/bare", "hf://me/net/nets/a.pth"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    paths = [fetch(place).path for place in places]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert [fetch(place).path for place in places] == paths


def test_without_the_package_the_extra_and_another_way_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert 'pip install "nfflax[hub]"' in problem_of("hf://me/net")
    with pytest.raises(WeightsError, match=r"The same weights are at https://github.com/.*\.pth"):
        fetch("timm_nfnet_l0")


@pytest.mark.parametrize(
    ("place", "parts"),
    [
        ("hf://a/b", ("a/b", None, None)),
        ("hf://a/b@main", ("a/b", "main", None)),
        ("hf://a/b@refs/pr/1/c/d.bin", ("a/b", "refs/pr/1", "c/d.bin")),
        ("hf://a/b@v1.0/c@2.bin", ("a/b", "v1.0", "c@2.bin")),
        (
            "hf://timm/nfnet_l0.ra2_in1k/x.safetensors",
            ("timm/nfnet_l0.ra2_in1k", None, "x.safetensors"),
        ),
    ],
)
def test_the_parts_of_a_hub_place(place, parts):
    assert parse_hub_place(place) == parts
