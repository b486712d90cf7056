"""One update: kernels are standardised once in it, whatever it loops over."""

from collections.abc import Iterator

import jax
import pytest
from jax.extend import core
from trained import tiny_run

from nfflax.insight.aot import abstract_batch
from nfflax.train.mesh import make_mesh
from nfflax.train.program import make_program

WAYS = {
    "plain": {},
    "remat": {"model__remat": "block"},
    "microbatches": {"train__accumulate": 4},
    "both": {"model__remat": "conv", "train__accumulate": 2},
}
LOOPS = ("scan", "while", "checkpoint", "remat2")


SPEC = {"extends": "nfnet_tiny", "stages": {"depth": [1, 2, 1, 1]}}


def primitives(jaxpr: core.Jaxpr, in_loop: bool = False) -> Iterator[tuple[str, bool]]:
    """The name of every primitive in a program, and whether a loop or a recomputation holds it."""
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        yield name, in_loop
        for inner in core.jaxprs_in_params(equation.params):
            yield from primitives(inner, in_loop or name in LOOPS)


@pytest.mark.parametrize("way", WAYS)
def test_kernels_are_standardised_outside_loops_and_recomputations(way):
    run = tiny_run(model__spec=SPEC, **WAYS[way])
    program = make_program(run, make_mesh(run.mesh))
    with jax.set_mesh(program.mesh):
        traced = program.train_step.trace(program.abstract, abstract_batch(program))
    places = [in_loop for name, in_loop in primitives(traced.jaxpr.jaxpr) if name == "rsqrt"]
    assert places
    assert not any(places)
