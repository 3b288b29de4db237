"""A user's own task and model: features to a number, by an nnx module with batch normalisation.

The whole of `sftjax train` works with it: evaluation, checkpoints, resumption, a mesh.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sftjax.data import DataError
from sftjax.data.packing.pack import FixedRows
from sftjax.evaluation import metrics
from sftjax.params import Param
from sftjax.step import Loss
from sftjax.tasks import Example, Task

FEATURES, WIDTH = 10, 32


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.scale = nnx.BatchNorm(FEATURES, rngs=rngs)
        self.up = nnx.Linear(FEATURES, WIDTH, rngs=rngs)
        self.norm = nnx.BatchNorm(WIDTH, rngs=rngs)
        self.down = nnx.Linear(WIDTH, 1, rngs=rngs)

    def __call__(self, x, mask, training: bool):
        how = dict(use_running_average=not training, mask=mask)
        x = nnx.relu(self.norm(self.up(self.scale(x, **how)), **how))
        return self.down(x)[:, 0]


class Model:
    """The module's parameters and its batch statistics, as two abstract trees."""

    def __init__(self):
        net = nnx.eval_shape(lambda: Net(nnx.Rngs(0)))
        self.graph, params, stats = nnx.split(net, nnx.Param, nnx.BatchStat)
        self.abstract = described(nnx.to_pure_dict(params))
        self.state = described(nnx.to_pure_dict(stats))

    def apply(self, params, model_state, x, mask, training):
        """(predictions [B], the new model_state); the old one where it is not training."""
        net = nnx.merge(self.graph, nnx.State(params), nnx.State(model_state))
        y = net(x, mask, training)
        return y, nnx.to_pure_dict(nnx.state(net, nnx.BatchStat))


INIT = {
    "kernel": jax.nn.initializers.lecun_normal(),
    "scale": jax.nn.initializers.ones,
    "var": jax.nn.initializers.ones,
}


def described(tree):
    """Shapes as Params: replicated on a mesh, and drawn by what they are called."""

    def one(path, x):
        init = INIT.get(path[-1].key, jax.nn.initializers.zeros)
        return Param(x.shape, (None,) * len(x.shape), init)

    return jax.tree_util.tree_map_with_path(one, tree)


class Regression(Task):
    layout = FixedRows((("features", (FEATURES,), np.float32), ("target", (), np.float32)))
    columns = {"features": ("float32", (FEATURES,)), "target": ("float32", ())}
    metrics = ("mae", "rmse", "r2", "pearson", "spearman")
    counts = ("examples",)

    def examples(self, records, wheres):
        return [self._example(*pair) for pair in zip(records, wheres, strict=True)]

    def _example(self, record, where):
        try:
            x = np.array(record["features"], np.float32)
            y = np.float32(record["target"])
        except (KeyError, TypeError, ValueError) as e:
            problem = f"expected 'features' and 'target', numbers: {e!r}"
            raise DataError(problem, where=where, kind="wrong_type") from e
        if x.shape != (FEATURES,) or not np.isfinite([*x, y]).all():
            problem = f"expected {FEATURES} finite features and a finite target"
            raise DataError(problem, where=where, kind="wrong_value")
        return Example((x, y), text=f"{x.tolist()} -> {y}")

    def fields_read(self, record):
        return {"features", "target"} & set(record)

    def load_model(self, section, **changes):
        return Model()

    def _errors(self, model, params, batch, rng, model_state):
        mask = batch["weights"] > 0
        training = rng is not None
        y, new = model.apply(params, model_state, batch["features"], mask[:, None], training)
        errors = jnp.where(mask, (y - batch["target"]) ** 2, 0.0)
        weight = jnp.sum(batch["weights"])
        counts = {"examples": (weight, None)}
        return Loss(jnp.sum(errors), weight, counts, state=new if training else None), y

    def loss_fn(self, model, options, sources=()):
        return lambda *args: self._errors(model, *args)[0]

    def eval_fn(self, model, options):
        def evaluate(params, batch, model_state):
            loss, y = self._errors(model, params, batch, None, model_state)
            return loss, dict(given=y, wanted=batch["target"], weights=batch["weights"])

        return evaluate

    def score(self, loss, predictions, **how):
        real = predictions["weights"] > 0
        wanted, given = predictions["wanted"][real], predictions["given"][real]
        return metrics.numbers(wanted, given, **how)
