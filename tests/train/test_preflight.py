"""The check before training passes on every mesh, and finds gradients that a mesh has spoilt."""

import jax
import pytest

from nfflax.nn.conv import conv
from nfflax.spec.execution import Mesh as MeshTable
from nfflax.train import preflight as module
from nfflax.train.errors import MeshError
from nfflax.train.mesh import make_mesh
from nfflax.train.preflight import preflight

MESHES = {
    "data": MeshTable(),
    "fsdp": MeshTable(fsdp=4),
    "all but spatial": MeshTable(fsdp=2, tensor=2),
    "an axis that idles": MeshTable(tensor=2),
    "only tensor": MeshTable(tensor=8),
    "spatial": MeshTable(spatial=4),
    "all": MeshTable(fsdp=2, tensor=2, spatial=2),
}


@pytest.mark.parametrize(
    "name",
    [
        "all but spatial",
        *(pytest.param(name, marks=pytest.mark.slow) for name in MESHES if name[:5] != "all b"),
    ],
)
def test_passes(name):
    preflight(make_mesh(MESHES[name]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["data", "all but spatial", "only tensor"])
def test_passes_with_the_operations_of_accelerators(name, monkeypatch):
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *a, cpu, default: default(*a))
    preflight(make_mesh(MESHES[name]))


def test_passes_on_one_device():
    preflight(make_mesh(MeshTable(), jax.devices()[:1]))


@jax.custom_vjp
def doubled(w):
    return w


doubled.defvjp(lambda w: (w, None), lambda _, dw: (2 * dw,))


def test_refuses_a_wrong_gradient(monkeypatch):
    monkeypatch.setattr(module, "conv", lambda x, w, groups: conv(x, doubled(w), groups=groups))
    with pytest.raises(MeshError) as caught:
        preflight(make_mesh(MeshTable(tensor=2)))
    (problem,) = caught.value.problems
    assert "mesh data 4 x fsdp 1 x tensor 2 x spatial 1" in problem.message
    assert "the gradient of the kernel of a grouped convolution" in problem.message
    assert "2 times the right one, relative error 1." in problem.message


def test_refuses_what_is_no_number(monkeypatch):
    monkeypatch.setattr(
        module, "conv", lambda x, w, groups: conv(x, w, groups=groups) * float("nan")
    )
    with pytest.raises(MeshError) as caught:
        preflight(make_mesh(MeshTable(), jax.devices()[:1]))
    assert len(caught.value.problems) == 3
