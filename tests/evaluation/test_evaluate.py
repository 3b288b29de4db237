"""Evaluation sums over whole sets and divides once."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import sftjax
from sftjax import losses, parallel
from sftjax.evaluation.evaluator import measure
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
    out, _ = measure(scripted([(2, 1), (90, 9)]), None, [None, None])
    assert out["loss"] == pytest.approx(9.2) and out["accuracy"] == 0.5
    assert CausalLM(None).score(9.2, {}).values["perplexity"] == pytest.approx(np.exp(9.2))


def test_blank_rows_of_a_last_batch_count_for_nothing():
    out, _ = measure(scripted([(2, 1), (0, 0)]), None, [None, None])
    assert out["loss"] == 2.0


def test_a_set_with_nothing_to_measure_is_an_error():
    for pairs in ([], [(0, 0)]):
        with pytest.raises(ValueError, match="no trained token to measure"):
            measure(scripted(pairs), None, [None] * len(pairs))


def test_the_table_shows_before_and_after():
    before = {"losses": {"v/loss": 2.0, "v/accuracy": 0.25}, "exact_match": 0.0}
    after = {"losses": {"v/loss": 1.0, "v/accuracy": 0.75}, "exact_match": 0.905}
    text = report.table(before, after).splitlines()
    assert text[1].split() == ["answers/exact_match", "0.0%", "90.5%"]
    assert text[2].split() == ["v/loss", "2.0000", "1.0000"]
    assert text[3].split() == ["v/accuracy", "25.0%", "75.0%"]


@pytest.mark.parametrize("axes", [None, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_what_each_document_adds_to_the_loss(axes):
    model, batch = tiny.model(), tiny.batch(rows=4, length=32)
    params = tiny.params(model)
    mesh = parallel.make_mesh(axes) if axes else contextlib.nullcontext()
    with jax.set_mesh(mesh) if axes else mesh:
        loss, found = jax.jit(losses.causal_lm(model, documents=True))(params, batch, None)
    plain = jax.jit(losses.causal_lm(model))
    for r, n in ((0, 1), (1, 2), (3, batch["segments"][3].max())):
        own = np.zeros_like(batch["weights"])
        own[r] = np.where(batch["segments"][r] == n, batch["weights"][r], 0)
        alone = plain(params, batch | {"weights": own}, None)
        assert found["losses"][r, n - 1] == pytest.approx(float(alone.sum), rel=1e-5)
        assert found["weights"][r, n - 1] == own.sum()
        assert found["tokens"][r, n - 1] == (batch["segments"][r] == n).sum()
    assert float(found["losses"].sum()) == pytest.approx(float(loss.sum), rel=1e-6)
    documents = batch["segments"].max(axis=1)
    assert ((found["tokens"] > 0).sum(axis=1) == documents).all()


def test_the_error_of_a_loss_is_of_documents():
    task = CausalLM(None)
    predictions = dict(
        losses=np.array([[2.0, 0.0], [8.0, 0.0]]),
        weights=np.array([[1.0, 0.0], [4.0, 0.0]]),
        tokens=np.array([[3.0, 0.0], [5.0, 2.0]]),
    )
    found = task.score(2.0, predictions, errors=True)
    assert found.rows["loss"].tolist() == [2.0, 2.0, 0.0] and found.errors["loss"] == 0.0
    off = task.score(2.0, predictions | {"losses": np.array([[3.0, 0.0], [7.0, 0.0]])}, errors=True)
    assert off.errors["loss"] == pytest.approx((2 * 3 / 2) ** 0.5 / 5)
