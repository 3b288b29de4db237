"""Regression: a number that is wanted of a text, or of a pair of texts.

The model learns it in units of the training rows' standard deviation, from their mean; these two are its model_state,
and an export has them in its head.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from sftjax import losses
from sftjax.data.token_store import Tally
from sftjax.errors import DataError
from sftjax.evaluation import metrics
from sftjax.hf.heads import stored_labels
from sftjax.models.base import Model
from sftjax.params import Param
from sftjax.tasks.base import EvalFn, Scores, read_model
from sftjax.tasks.texts import LABELS, TEXTS, Texts

LARGEST = float(np.finfo(np.float32).max)
NUMBERS = ("score", "target", "value", *LABELS)


class NumberTally(Tally):
    """Sums the numbers too, and their squares."""

    sums: Any = (0.0, 0.0, 0.0)  # of 1, the numbers and their squares

    def count(self, pieces: Sequence[tuple[np.ndarray, ...]]) -> None:
        """As of Tally; adds the number of each document."""
        super().count(pieces)
        numbers = [targets[weights > 0] for _, weights, targets, *_ in pieces]
        x = np.concatenate([np.zeros(0), *numbers]).astype(np.float64)
        self.sums = np.add(self.sums, (len(x), x.sum(), (x**2).sum()))

    def report(self, skipped: Mapping[str, int]) -> dict:
        """As of Tally, with numbers: [how many, their sum, that of their squares]."""
        return super().report(skipped) | dict(numbers=np.asarray(self.sums).tolist())


class Regression(Texts):
    """See Texts."""

    usual: ClassVar = {"text": TEXTS, "label": NUMBERS}
    target = np.float32
    loss = staticmethod(losses.regression)
    tallies = NumberTally
    options = ("kind", "huber_delta")
    metrics = ("mae", "rmse", "r2", "pearson", "spearman")
    mean, std = 0.0, 1.0  # of the training rows' numbers, once they are known

    def read_wanted(self, record: dict, where: str) -> float:
        """The record's number."""
        given = self.field(record, "label", where)
        try:
            number = math.nan if isinstance(given, bool) else float(given)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not abs(number) <= LARGEST:  # NaN too
            raise DataError(
                f"field {self.name(record, 'label')!r} is {given!r:.200}, expected a finite number",
                where=where,
                kind="wrong_value",
            )
        return number

    def facts(self, report: dict) -> dict[str, str]:
        """Mean and standard deviation of the numbers."""
        mean, std = _moments([report])
        return {"numbers": f"mean {mean:.4g}, standard deviation {std:.4g}"}

    def saw(self, reports: Sequence[dict]) -> None:
        """The reports of the training stores: what the numbers are measured by."""
        self.mean, self.std = _moments(reports)

    def load_model(self, section: ConfigDict, **changes: Any) -> Model:
        """The body of model.path with a head of one number, and its model_state."""
        own: Any = dict(labels=("number",), head="document", problem="regression")
        model: Any = read_model(section, **own, **changes)
        # A head that the files hold gives the number itself, and goes on doing so. Else the units are known when this
        # is drawn, and not before.
        own_head = section.init != "random" and stored_labels(model.source.config)

        def drawn(name: str, plain: float) -> Callable:
            # Without a bias, as a decoder's head is, an export could not add the mean.
            known = own_head or (name == "mean" and "b" not in model.abstract["score"])
            return lambda _, *of: jnp.full(of[0], plain if known else getattr(self, name), of[1])

        state = {k: Param((), (), drawn(k, v)) for k, v in {"mean": 0.0, "std": 1.0}.items()}
        return dataclasses.replace(model, kept=state)

    def exported(self, params: Any, model_state: Any) -> Any:
        """The head gives the number itself, without a model_state."""
        mean, std = (np.float32(model_state[k]) for k in ("mean", "std"))
        score = {name: x * std for name, x in params["score"].items()}
        if "b" in score:
            return params | {"score": score | {"b": score["b"] + mean}}
        return params | {"score": score}

    def eval_fn(self, model: Model, options: dict) -> EvalFn:
        """The same loss, and what is wanted and given."""
        loss_fn = self.loss(model, predictions=True, **self.own(options))
        return lambda params, batch, model_state=None: loss_fn(params, batch, None, model_state)

    def score(self, loss: float, predictions: dict[str, np.ndarray], **how: Any) -> Scores:
        """What METRICS has for numbers."""
        real = predictions["weights"] > 0
        wanted, given = (predictions[k][real] for k in ("wanted", "given"))
        return metrics.numbers(wanted, given, **how)


def _moments(reports) -> tuple[float, float]:
    """Mean and standard deviation; 1 for numbers that are all equal."""
    n, total, squares = np.sum([r["numbers"] for r in reports], 0)
    mean = total / max(n, 1)
    variance = squares / max(n, 1) - mean**2
    return float(mean), float(variance**0.5 if variance > 1e-12 * max(squares, 1e-30) else 1.0)
