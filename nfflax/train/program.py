"""A run made ready for its devices: state, steps and feeds that fit each other and one mesh."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from nfflax.data.feed import train_feed
from nfflax.data.pipeline import Batches, eval_batches
from nfflax.data.sources import Source
from nfflax.data.views import EvalView
from nfflax.optim.factory import Recipe
from nfflax.spec.errors import Problem, SpecError
from nfflax.spec.run import Run
from nfflax.train.distributed import one_at_a_time
from nfflax.train.mesh import batch_sharding, check_fits, feed_rows, param_shardings
from nfflax.train.state import (
    State,
    abstract_model,
    abstract_state,
    make_state,
    recipe_of,
    shardings_of,
)
from nfflax.train.step import Batch, Metrics, eval_step, train_step
from nfflax.weights.fold import fold


@dataclasses.dataclass(frozen=True)
class Program:
    """What a run computes on one mesh. Call its functions inside `jax.set_mesh(program.mesh)`."""

    run: Run
    mesh: jax.sharding.Mesh
    recipe: Recipe
    model: nnx.Module
    """The network without arrays."""
    abstract: State
    """Shape, type and sharding of every array of the state."""
    init: Callable[[], State]
    """The state at step 0."""
    train_step: Callable[[State, Batch], tuple[State, Metrics]]
    """One update; uses up the state that it is given."""

    def fold(self, params: Any, stats: Any) -> Any:
        """The network folded for `eval_step`, from its parameters and BatchNorm's statistics."""
        return self._evaluation[0](params, stats)

    def eval_step(self, folded: Any, batch: Batch) -> Metrics:
        """Sums over the valid rows of a batch, of the network that `fold` made."""
        return self._evaluation[1](folded, batch)

    @functools.cached_property
    def _evaluation(self) -> tuple[Callable[[Any, Any], Any], Callable[[Any, Batch], Metrics]]:
        """Both programs, made on first use: not every run evaluates."""
        graph, folded = nnx.graphdef(self.model), nnx.eval_shape(fold, self.model)
        places = param_shardings(nnx.state(folded), self.mesh)

        def folding(params: Any, stats: Any) -> Any:
            return nnx.to_pure_dict(nnx.state(fold(nnx.merge(graph, params, stats))))

        state = shardings_of(self.abstract)
        make = jax.jit(
            folding, in_shardings=(state["params"], state["stats"]), out_shardings=places
        )
        step = jax.jit(
            eval_step(self.run, nnx.graphdef(folded), self.mesh),
            in_shardings=(places, batch_sharding(self.mesh)),
            out_shardings=NamedSharding(self.mesh, PartitionSpec()),
        )
        return one_at_a_time(make, self.mesh), one_at_a_time(step, self.mesh)

    def put(self, batch: Mapping[str, np.ndarray], batch_size: int) -> Batch:
        """This process's rows of a batch of `batch_size`, as arrays on the devices."""
        sharding = batch_sharding(self.mesh)
        return {
            key: jax.make_array_from_process_local_data(
                sharding, rows, (batch_size, *rows.shape[1:])
            )
            for key, rows in batch.items()
        }

    def feed(self, source: Source, step: int) -> Batches:
        """This process's part of the training batches from `step` on."""
        host, hosts = feed_rows(self.mesh, self.run.train.batch_size)
        return train_feed(self.run, source, step=step, host=host, hosts=hosts)

    @property
    def eval_batch_size(self) -> int:
        """Images per evaluation step."""
        return self.run.eval.batch_size or self.run.train.batch_size

    def eval_steps(self, source: Source) -> int:
        """Steps of one pass over a source."""
        return -(-len(source) // self.eval_batch_size)

    def eval_feed(self, source: Source) -> Batches:
        """This process's part of one pass over a source."""
        host, hosts = feed_rows(self.mesh, self.eval_batch_size)
        view, size = EvalView.of(self.run.spec), self.eval_batch_size
        return eval_batches(
            source, view, batch_size=size, host=host, hosts=hosts, data=self.run.data
        )


def make_program(run: Run, mesh: jax.sharding.Mesh) -> Program:
    """The program of a run whose length is known (`nfflax.data.sized`). Compiles nothing yet."""
    if not run.spec.head.num_classes:
        message = "leaves nothing to train: the loss needs classes"
        key = "model.set.head.num_classes"
        raise SpecError([Problem(f"run {run.name}", key, message, 0, "1 or more")])
    check_fits(run, mesh)
    model = abstract_model(run)
    recipe = recipe_of(run, model)
    abstract = abstract_state(run, recipe, model, mesh)
    state, rows = shardings_of(abstract), batch_sharding(mesh)
    whole = NamedSharding(mesh, PartitionSpec())
    train = jax.jit(
        train_step(run, recipe, model, mesh),
        donate_argnums=0,
        in_shardings=(state, rows),
        out_shardings=(state, whole),
    )
    return Program(
        run=run,
        mesh=mesh,
        recipe=recipe,
        model=model,
        abstract=abstract,
        init=make_state(run, recipe, abstract),
        train_step=one_at_a_time(train, mesh),
    )
