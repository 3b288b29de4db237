"""Evaluation: exact sums over whole sets, predictions and their scores, early stopping."""

import dataclasses
import functools
import math
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from sftjax.errors import ConfigError, DataError
from sftjax.evaluation.sets import ANSWERS, Sets
from sftjax.models.base import Model
from sftjax.step import Loss
from sftjax.tasks import Task
from sftjax.terminal import show

BESIDE = ("tables", "errors", "baselines", "rows")  # what a result has beside values
# (params, batch, *state) -> Loss, or (Loss, predictions), jitted
EvalStep = Callable[..., Loss | tuple[Loss, dict[str, jax.Array]]]


def measure(
    step: EvalStep,
    params: Any,
    batches: Iterable[Any],
    *state: Any,
    held: Callable[[dict], dict] = lambda predictions: predictions,
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """({"loss", <metrics>}, predictions of all rows) of a set. held: what is kept of a batch's.

    The sums are added in float64 on the host and divided once, so neither the batch size nor a last partial batch
    changes the result. Raises: DataError for a set without anything to measure.
    """
    total, found = None, []
    for batch in batches:
        out = step(params, batch, *state)
        loss, predictions = (out, {}) if isinstance(out, Loss) else out
        loss = jax.tree.map(np.float64, jax.device_get(dataclasses.replace(loss, state=None)))
        total = loss if total is None else jax.tree.map(np.add, total, loss)
        found.append(held(predictions))
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
        parts = [x.reshape(-1, *x.shape[2:]) for x in parts]
    return np.concatenate(parts)


class Evaluator:
    """Evaluates parameters on the validation sets and the test set of a Feed, or of other Sets."""

    def __init__(self, task: Task, model: Model, sets: Sets, config: ConfigDict) -> None:
        self.task, self.model, self.sets = task, model, sets
        self.step = jax.jit(task.eval_fn(model, config.loss.to_dict()))
        self.generation = dict(mesh=sets.mesh, seed=config.seed, **config.generate.to_dict())
        self.generation["said"] = progress()
        # Answers cost more than losses: only where the best checkpoint is chosen by them.
        self.asks = bool(sets.questions) and config.eval.best.startswith(f"{ANSWERS}/")
        self.measures = bool(sets.sets) or self.asks  # is there anything for `losses`

    def losses(self, params: Any, model_state: Any = None) -> dict[str, float]:
        """{"<set>/<metric>": value} of validation sets; of "answers" where eval.best is of them."""
        values = self._measured(self.sets.sets, params, model_state, final=False)["losses"]
        if self.asks:
            found = self._answers(params)
            values |= {f"{ANSWERS}/{k}": v for k, v in found.items() if isinstance(v, float)}
        return values

    def full(self, params: Any, model_state: Any = None, rows: bool = False) -> dict:
        """What the sets, the test sets and the answers to questions score.

        {"losses": {"<set>/<metric>": value}, "n": {"<set>": documents}, "tables": {"<set>/<table>"}, "errors":
        {"<set>/<metric>": standard error}, "baselines": {"<set>": {name: {metric: value}}}}, with "answers" for the
        name of a set; and of the questions {"<metric>": value, "answers": texts}. rows: also "rows": {"<set>":
        {"record": their numbers in the file, "<metric>": values}}, one for each row of it, with "about": {"of": a hash
        of the set's files, "lower": those of which less is better, "weight" and "group" of each row, if it has them}.
        """
        sets = self.sets.sets | self.sets.tests
        out = self._measured(sets, params, model_state)
        if self.sets.questions:
            found = self._answers(params)
            n = len(self.sets.questions)
            beside = {k: found.pop(k, {}) for k in BESIDE}
            self._add(out, ANSWERS, n, np.arange(n), self.sets.groups, **beside)
            out |= found
        if not rows:
            out["rows"] = {}
        return {k: v for k, v in out.items() if v != {} or k == "losses"}

    def _answers(self, params):
        own = dict(groups=self.sets.groups) if self.sets.groups else {}
        return self.task.answers(self.model, params, self.sets.questions, **own, **self.generation)

    def _measured(self, sets, params, model_state, final=True):
        out: dict[str, Any] = {k: {} for k in ("losses", "n", *BESIDE)}
        for name, store in sets.items():
            batches = self.sets.eval_batches(store)
            held = functools.partial(self.task.held, final=final)
            found, predictions = measure(self.step, params, batches, model_state, held=held)
            if final:
                groups = self.sets.groups_of(name, store)
                scores = self.task.score(found["loss"], predictions, groups=groups or None, errors=True)
                records = self.sets.record_order(store) if scores.rows else None
                beside = {k: getattr(scores, k) for k in BESIDE}
                self._add(out, name, len(store), records, groups, **beside)
            else:
                scores = self.task.score(found["loss"], predictions)
            found = {k: v for k, v in found.items() if k not in self.task.counts}
            out["losses"] |= {f"{name}/{k}": v for k, v in (found | scores.values).items()}
        return out

    def _add(self, out, name, n, records, groups, tables, errors, baselines, rows) -> None:
        """Put what stands beside the values of a set into a result, under its name."""
        out["n"][name] = n
        if rows and records is not None:
            order = np.argsort(records, kind="stable")
            sort = lambda values: np.asarray(values)[order].tolist()  # noqa: E731
            lower = [k for k in rows if self.task.lower_is_better(k)]
            about = {"of": self.sets.file_hash(name), "lower": lower}
            about |= {"weight": sort(rows["weight"])} if "weight" in rows else {}
            about |= {"group": [groups[i] for i in order]} if groups else {}
            values = {k: sort(v) for k, v in rows.items() if k != "weight"}
            out["rows"][name] = {"record": sort(records), **values, "about": about}
        out["tables"] |= {f"{name}/{k}": v for k, v in tables.items()}
        out["errors"] |= {f"{name}/{k}": v for k, v in errors.items()}
        if baselines:
            out["baselines"][name] = {k: dict(v) for k, v in baselines.items()}


def progress() -> Callable[[int, int], None]:
    """What says on standard error how many questions are answered, every few seconds."""
    last = time.monotonic()

    def said(done: int, of: int) -> None:
        nonlocal last
        if jax.process_index() == 0 and (time.monotonic() - last > 2 or done == of > 1):
            last = time.monotonic()
            show(f"testing {done}/{of}", file=sys.stderr)

    return said


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
        if better and math.isfinite(new):  # else nothing would ever be better
            self.state = {"best": new, "bad": 0}
        else:
            self.state = {"best": best, "bad": self.state["bad"] + 1}

    @property
    def stop(self) -> bool:
        """Have there been `patience` evaluations without a better value; never for 0."""
        return bool(self.patience) and self.state["bad"] >= self.patience
