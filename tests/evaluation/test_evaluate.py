"""Evaluation sums over whole sets and divides once."""

import jax.numpy as jnp
import numpy as np
import pytest

import sftjax
from sftjax.evaluation.evaluator import loss_over
from sftjax.reports import run as report
from sftjax.tasks.causal_lm import CausalLM


def scripted(pairs):
    """A step that returns the given (sum, weight) pairs, one a batch."""
    rest = iter(pairs)

    def step(params, batch):
        total, weight = next(rest)
        hits = (jnp.float32(weight / 2), jnp.float32(weight))
        return sftjax.Loss(jnp.float32(total), jnp.float32(weight), {"accuracy": hits})

    return step


def test_x5_the_mean_is_over_tokens_not_over_batches():
    out = loss_over(scripted([(2, 1), (90, 9)]), None, [None, None])
    assert out["loss"] == pytest.approx(9.2) and out["accuracy"] == 0.5
    assert CausalLM(None).score(9.2, {}).values["perplexity"] == pytest.approx(np.exp(9.2))


def test_blank_rows_of_a_last_batch_count_for_nothing():
    out = loss_over(scripted([(2, 1), (0, 0)]), None, [None, None])
    assert out["loss"] == 2.0


def test_a_set_with_nothing_to_measure_is_an_error():
    for pairs in ([], [(0, 0)]):
        with pytest.raises(ValueError, match="no trained token to measure"):
            loss_over(scripted(pairs), None, [None] * len(pairs))


def test_the_table_shows_before_and_after():
    before = {"losses": {"v/loss": 2.0, "v/accuracy": 0.25}, "exact_match": 0.0}
    after = {"losses": {"v/loss": 1.0, "v/accuracy": 0.75}, "exact_match": 0.905}
    text = report.table(before, after).splitlines()
    assert text[1].split() == ["test", "exact", "match", "0.0%", "90.5%"]
    assert text[2].split() == ["v/loss", "2.0000", "1.0000"]
    assert text[3].split() == ["v/accuracy", "25.0%", "75.0%"]
