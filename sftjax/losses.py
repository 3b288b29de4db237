"""Loss functions: (params, batch, rng) -> Loss(sum, weight, metrics). One function each."""

import jax
import jax.numpy as jnp

from sftjax.ops.cross_entropy import CHUNK_TOKENS, linear_cross_entropy
from sftjax.step import Loss


def causal_lm(
    model,
    *,
    normalise="tokens",
    label_smoothing=0.0,
    z_loss=0.0,
    accuracy=False,
    chunk_tokens=CHUNK_TOKENS,
):
    """Masked cross-entropy of a decoder over the trained tokens of a Batch.

    normalise: "tokens" weighs every trained token alike; "documents" every document alike, whatever
    its length. accuracy adds the share of trained tokens that the model's first choice gets right.
    """
    if normalise not in ("tokens", "documents"):
        raise ValueError(f"normalise={normalise!r}; expected 'tokens' or 'documents'")

    def loss_fn(params, batch, rng) -> Loss:
        del rng  # no dropout in this model
        weights = batch["weights"].astype(jnp.float32)
        if normalise == "documents":
            weights = _per_document(weights, batch["segments"])
        total, hits = linear_cross_entropy(
            model.hidden(params, batch),
            model.head(params),
            batch["targets"],
            weights,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            accuracy=accuracy,
            chunk_tokens=chunk_tokens,
        )
        metrics = {}
        if accuracy:
            metrics["accuracy"] = (hits, jnp.sum(weights != 0, dtype=jnp.float32))
        return Loss(total, jnp.sum(weights), metrics)

    return loss_fn


def _per_document(weights, segments):
    """Scale each document's weights to add up to 1 (0 for one that has none)."""
    S = weights.shape[1]
    sums = jax.vmap(lambda w, s: jax.ops.segment_sum(w, s, S + 1))(weights, segments)
    total = jnp.take_along_axis(sums, segments, axis=1)
    return jnp.where(total > 0, weights / jnp.where(total > 0, total, 1), 0.0)
