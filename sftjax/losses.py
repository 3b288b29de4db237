"""Loss functions: (params, batch, rng) -> Loss(sum, weight, metrics). One function each."""

import jax
import jax.numpy as jnp

from sftjax.errors import ConfigError
from sftjax.ops import moe
from sftjax.ops.cross_entropy import CHUNK_TOKENS, group_sums, linear_cross_entropy
from sftjax.step import Loss


def causal_lm(
    model,
    *,
    normalise="tokens",
    label_smoothing=0.0,
    z_loss=0.0,
    dft=False,
    load_balance=0.0,
    accuracy=False,
    chunk_tokens=CHUNK_TOKENS,
    sources=(),
):
    """Masked cross-entropy of a decoder over the trained tokens of a Batch.

    normalise: "tokens" weighs every trained token alike; "documents" every document alike, whatever
    its length. dft: weigh each token's loss by its own probability (Dynamic Fine-Tuning).
    load_balance: coefficient of a mixture of experts' load-balancing loss, which is a metric in any
    case and weighs as much as the batch's trained tokens do. accuracy adds the share of trained
    tokens that the model's first choice gets right. sources: names, to which the batch's `sources`
    int32 [B, S] are indices; adds loss/<name> and the number trained_tokens/<name>.
    """
    if normalise not in ("tokens", "documents"):
        raise ConfigError(f"normalise={normalise!r}; expected 'tokens' or 'documents'")

    def loss_fn(params, batch, rng) -> Loss:
        del rng  # no dropout in this model
        weights = batch["weights"].astype(jnp.float32)
        if normalise == "documents":
            weights = _per_document(weights, batch["segments"])
        hidden, routing = model.outputs(params, batch)
        groups = batch["sources"] if sources else None
        total, hits, *by_source = linear_cross_entropy(
            hidden,
            model.head(params),
            batch["targets"],
            weights,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            dft=dft,
            accuracy=accuracy,
            chunk_tokens=chunk_tokens,
            groups=groups,
            n_groups=len(sources),
            **model.logit_options,
        )
        weight, metrics = jnp.sum(weights), {}
        if routing is not None:
            balance = moe.load_balance(routing) * weight
            total = total + load_balance * balance
            metrics["load_balance"] = (balance, weight)
        if accuracy:
            metrics["accuracy"] = (hits, jnp.sum(weights != 0, dtype=jnp.float32))
        if sources:
            shares = group_sums(weights, groups, len(sources))
            counts = group_sums(jnp.float32(weights != 0), groups, len(sources))
            for i, name in enumerate(sources):
                metrics[f"loss/{name}"] = (by_source[0][i], shares[i])
                metrics[f"trained_tokens/{name}"] = (counts[i], None)
        return Loss(total, weight, metrics)

    return loss_fn


def _per_document(weights, segments):
    """Scale each document's weights to add up to 1 (0 for one that has none)."""
    S = weights.shape[1]
    sums = jax.vmap(lambda w, s: jax.ops.segment_sum(w, s, S + 1))(weights, segments)
    total = jnp.take_along_axis(sums, segments, axis=1)
    return jnp.where(total > 0, weights / jnp.where(total > 0, total, 1), 0.0)
