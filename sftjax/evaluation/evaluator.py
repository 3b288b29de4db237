"""Evaluation: exact sums over whole sets, predictions and their scores, early stopping."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from sftjax.errors import ConfigError, DataError
from sftjax.parallel.processes import to_host
from sftjax.step import Loss

if TYPE_CHECKING:
    from sftjax.models.base import Model
    from sftjax.tasks import Task
    from sftjax.training.data import Feed

# (params, batch, *state) -> Loss, or (Loss, predictions), jitted
EvalStep = Callable[..., Loss | tuple[Loss, dict[str, jax.Array]]]


def loss_over(step: EvalStep, params: Any, batches: Iterable[Any], *state: Any) -> dict[str, float]:
    """{"loss", <metrics>} weighted over all batches; see `measure`."""
    return measure(step, params, batches, *state)[0]


def measure(
    step: EvalStep, params: Any, batches: Iterable[Any], *state: Any
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """({"loss", <metrics>}, predictions of all rows) of a set.

    step(params, batch, *state) -> Loss, or (Loss, predictions), jitted. The sums are added in
    float64 on the host and divided once, so neither the batch size nor a last partial batch changes
    the result. Raises: DataError for a set without anything to measure.
    """
    total, found = None, []
    for batch in batches:
        out = step(params, batch, *state)
        loss, predictions = (out, {}) if isinstance(out, Loss) else out
        loss = jax.tree.map(np.float64, jax.device_get(dataclasses.replace(loss, state=None)))
        total = loss if total is None else jax.tree.map(np.add, total, loss)
        found.append({k: to_host(v) for k, v in predictions.items()})
    if total is None or total.weight == 0:
        problem = "the evaluation set has no trained token to measure"
        raise DataError(problem, kind="nothing_trained")
    divide = lambda s, w: float(s if w is None else s / w if w else 0)  # noqa: E731
    values = {"loss": divide(total.sum, total.weight)}
    values |= {k: divide(*v) for k, v in total.metrics.items()}
    return values, {k: _joined([part[k] for part in found]) for k in found[0]}


def _joined(parts) -> np.ndarray:
    """All batches' rows, flat where widths differ: what belongs together stays at one place."""
    if len({x.shape[1:] for x in parts}) > 1:
        parts = [np.ravel(x) for x in parts]
    return np.concatenate(parts)


class Evaluator:
    """Evaluates parameters on the validation sets and the test set of a Feed."""

    def __init__(
        self, task: "Task", model: "Model", feed: "Feed", loss_options: dict, **generation: Any
    ) -> None:
        """generation: the options of generate.generate."""
        self.task, self.model, self.feed, self.generation = task, model, feed, generation
        self.step = jax.jit(task.eval_fn(model, loss_options))

    def losses(self, params: Any, model_state: Any = None) -> dict[str, float]:
        """{"<set>/loss", "<set>/<metric>"} of every validation set."""
        return self._measured(self.feed.sets, params, model_state)[0]

    def full(self, params: Any, model_state: Any = None) -> dict:
        """{"losses": of all sets, "tables": {"<set>/<table>"}, and the test set's answers}."""
        values, tables = self._measured(self.feed.sets | self.feed.tests, params, model_state)
        out = {"losses": values} | ({"tables": tables} if tables else {})
        if self.feed.questions:
            asked = self.feed.questions
            out |= self.task.answers(self.model, params, asked, **self.generation)
        return out

    def _measured(self, sets, params, model_state):
        values, tables = dict[str, float](), dict[str, Any]()
        for name, store in sets.items():
            batches = self.feed.eval_batches(store)
            found, predictions = measure(self.step, params, batches, model_state)
            scores = self.task.score(found["loss"], predictions)
            found = {k: v for k, v in found.items() if k not in self.task.counts}
            values |= {f"{name}/{k}": v for k, v in (found | scores.values).items()}
            tables |= {f"{name}/{k}": v for k, v in scores.tables.items()}
        return values, tables


class EarlyStop:
    """Stop after `patience` evaluations without a better value of `metric`.

    state is JSON-able and goes into the checkpoint: a resumed run stops where it would have.
    """

    def __init__(self, metric: str, patience: int, lower: bool, state: dict | None = None) -> None:
        """lower: is a lower value of the metric the better one."""
        if patience and not metric:
            raise ConfigError("eval.patience needs eval.best, the metric to watch")
        self.metric, self.patience, self.lower = metric, patience, lower
        self.state = state or {"best": None, "bad": 0}

    def update(self, values: dict[str, float]) -> None:
        """Take the values of one evaluation. Raises: ConfigError where the metric is not there."""
        if not self.metric:
            return
        if self.metric not in values:
            raise ConfigError(f"eval.best={self.metric!r} is not measured; there is {list(values)}")
        new, best = values[self.metric], self.state["best"]
        better = best is None or (new < best if self.lower else new > best)
        better = better and math.isfinite(new)  # else nothing would ever be better
        self.state = {
            "best": new if better else best,
            "bad": 0 if better else self.state["bad"] + 1,
        }

    @property
    def stop(self) -> bool:
        """Have there been `patience` evaluations without a better value; never for 0."""
        return bool(self.patience) and self.state["bad"] >= self.patience
