"""Evaluation: exact sums over whole sets, answers by generation, early stopping."""

import math

import jax
import numpy as np

from sftjax import generate as generate_lib
from sftjax import losses
from sftjax.errors import ConfigError, DataError
from sftjax.step import eval_step


def loss_over(step, params, batches) -> dict[str, float]:
    """{"loss", "perplexity", <metrics>} token-weighted over all batches.

    step(params, batch) -> Loss, jitted. The sums are added in float64 on the host and divided once,
    so neither the batch size nor a last partial batch changes the result.
    """
    total = None
    for batch in batches:
        loss = jax.tree.map(np.float64, jax.device_get(step(params, batch)))
        total = loss if total is None else jax.tree.map(np.add, total, loss)
    if total is None or total.weight == 0:
        raise DataError(
            "the evaluation set has no trained token to measure", kind="nothing_trained"
        )
    loss = float(total.sum / total.weight)
    out = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
    divide = lambda s, w: float(s if w is None else s / w if w else 0)  # noqa: E731
    return out | {k: divide(*v) for k, v in total.metrics.items()}


def answer(model, params, examples, tokenizer, **options) -> tuple[float, list[str]]:
    """(exact match, generated texts) for (prompt token ids, reference answer) pairs.

    Exact match is the share of texts equal to the answer, leading and trailing blanks aside.
    options: those of generate.generate.
    """
    out = generate_lib.generate(model, params, [prompt for prompt, _ in examples], **options)
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in out]
    hits = [t.strip() == a.strip() for t, (_, a) in zip(texts, examples, strict=True)]
    return sum(hits) / max(len(hits), 1), texts


class Evaluator:
    """Evaluates parameters on the validation sets and the test questions of a Feed."""

    def __init__(self, config, model, tokenizer, stop_ids, feed, mesh):
        self.model, self.tokenizer, self.feed = model, tokenizer, feed
        loss_fn = losses.causal_lm(model, accuracy=True, chunk_tokens=config.loss.chunk_tokens)
        self.step = jax.jit(lambda params, batch: eval_step(params, batch, loss_fn=loss_fn))
        g = config.generate
        self.options = dict(stop_ids=stop_ids, mesh=mesh, seed=config.seed, **g.to_dict())

    def losses(self, params) -> dict[str, float]:
        """{"<set>/loss", "<set>/perplexity", "<set>/accuracy"} of every validation set."""
        out = {}
        for name in self.feed.sets:
            values = loss_over(self.step, params, self.feed.eval_batches(name))
            out |= {f"{name}/{k}": v for k, v in values.items()}
        return out

    def full(self, params) -> dict:
        """The losses, and for the test questions exact match and every generated text."""
        out = {"losses": self.losses(params)}
        if self.feed.test:
            out["exact_match"], out["answers"] = answer(
                self.model, params, self.feed.test, self.tokenizer, **self.options
            )
        return out


class EarlyStop:
    """Stop after `patience` evaluations without a better value of `metric`.

    Better is lower for a loss or perplexity, else higher. state is JSON-able and goes into the
    checkpoint, so that a resumed run stops where it would have.
    """

    def __init__(self, metric: str, patience: int, state=None):
        if patience and not metric:
            raise ConfigError("eval.patience needs eval.best, the metric to watch")
        self.metric, self.patience = metric, patience
        self.state = state or {"best": None, "bad": 0}

    def update(self, values: dict[str, float]) -> None:
        if not self.metric:
            return
        if self.metric not in values:
            raise ConfigError(f"eval.best={self.metric!r} is not measured; there is {list(values)}")
        new, best = values[self.metric], self.state["best"]
        better = best is None or (new < best if lower_is_better(self.metric) else new > best)
        self.state = {
            "best": new if better else best,
            "bad": 0 if better else self.state["bad"] + 1,
        }

    @property
    def stop(self) -> bool:
        return bool(self.patience) and self.state["bad"] >= self.patience


def lower_is_better(metric: str) -> bool:
    return metric.endswith(("loss", "perplexity"))
