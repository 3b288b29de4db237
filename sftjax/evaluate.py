"""Evaluation: exact sums over a set, and answers by generation."""

import math

import jax
import numpy as np

from sftjax import generate as generate_lib


def finish(loss) -> dict[str, float]:
    """{"loss", "perplexity", "tokens", <metrics>} of a summed Loss; one division, on the host."""
    loss = jax.device_get(loss)
    weight = float(loss.weight)
    value = float(loss.sum) / weight if weight else 0.0
    out = {"loss": value, "perplexity": math.exp(min(value, 700.0)), "weight": weight}
    out |= {k: float(s) / float(w) if w else 0.0 for k, (s, w) in loss.metrics.items()}
    return out


def loss_over(step, params, batches) -> dict[str, float]:
    """Token-weighted loss, perplexity and metrics over all batches.

    step(params, batch) -> Loss, jitted. Sums stay on the device until the end; each batch's sum is
    added in float32 pairs of at most 2^24 tokens, then in float64 on the host.
    """
    total = None
    for batch in batches:
        loss = step(params, batch)
        total = loss if total is None else jax.tree.map(np.add, _f64(total), _f64(loss))
    if total is None:
        raise ValueError("the evaluation set has no rows")
    return finish(total)


def _f64(tree):
    return jax.tree.map(lambda x: np.float64(jax.device_get(x)), tree)


def exact_match(model, params, examples, tokenizer, *, stop_ids, mesh=None, **options):
    """(share of examples whose generated text equals the answer, list of generated texts).

    examples: (prompt token ids, answer text) pairs. Texts are compared without leading and trailing
    blanks. options: those of generate.generate.
    """
    prompts = [prompt for prompt, _ in examples]
    out = generate_lib.generate(model, params, prompts, stop_ids=stop_ids, mesh=mesh, **options)
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in out]
    hits = [t.strip() == a.strip() for t, (_, a) in zip(texts, examples, strict=True)]
    return sum(hits) / max(len(hits), 1), texts
