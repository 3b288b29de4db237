"""Loss functions: (params, batch, rng) -> Loss(sum, weight, metrics). One function each.

rng is None in evaluation: nothing random then, no dropout.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax

from sftjax.errors import ConfigError
from sftjax.ops import moe
from sftjax.ops.cross_entropy import CHUNK_TOKENS, group_sums, linear_cross_entropy
from sftjax.step import Loss

if TYPE_CHECKING:
    from sftjax.models import base, decoder


def causal_lm(
    model: "decoder.Model",
    *,
    normalise: str = "tokens",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    dft: bool = False,
    load_balance: float = 0.0,
    accuracy: bool = False,
    chunk_tokens: int = CHUNK_TOKENS,
    sources: Sequence[str] = (),
    documents: bool = False,
) -> Callable[..., Any]:
    """Masked cross-entropy of a decoder over the trained tokens of a Batch.

    normalise: "tokens" weighs every trained token alike; "documents" every document alike, whatever
    its length. dft: weigh each token's loss by its own probability (Dynamic Fine-Tuning).
    load_balance: coefficient of a mixture of experts' load-balancing loss, which is a metric in any
    case and weighs as much as the batch's trained tokens do. accuracy adds the share of trained
    tokens that the model's first choice gets right. sources: names, to which the batch's `sources`
    int32 [B, S] are indices; adds loss/<name> and the number trained_tokens/<name>. documents:
    return (Loss, {"losses", "weights", "tokens" float32 [B, S]}) in place of the Loss: what the
    n-th document of a row adds up to stands at its n-th place; not beside sources.
    """
    if normalise not in ("tokens", "documents"):
        raise ConfigError(f"normalise={normalise!r}; expected 'tokens' or 'documents'")

    def loss_fn(params, batch, rng) -> Any:
        del rng  # no dropout in this model
        weights = batch["weights"].astype(jnp.float32)
        if normalise == "documents":
            weights = _per_document(weights, batch["segments"])
        hidden, routing = model.outputs(params, batch)
        groups, n_groups = (batch["sources"], len(sources)) if sources else (None, 0)
        if documents:
            groups, n_groups = _places(batch["segments"]), weights.size
        total, hits, *by_source = linear_cross_entropy(
            hidden,
            model.head(params),
            batch["targets"],
            weights,
            bias=model.vocab_bias(params),
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            dft=dft,
            accuracy=accuracy,
            chunk_tokens=chunk_tokens,
            groups=groups,
            n_groups=n_groups,
            **model.logit_options,
        )
        weight, metrics = jnp.sum(weights), token_counts(batch)
        if routing is not None:
            balance = moe.load_balance(routing) * weight
            total = total + load_balance * balance
            metrics["load_balance"] = (balance, weight)
        if accuracy:
            metrics["accuracy"] = (hits, jnp.sum(weights != 0, dtype=jnp.float32))
        if sources:
            metrics |= _by_source(sources, by_source[0], weights, groups)
        loss = Loss(total, weight, metrics)
        if not documents:
            return loss
        held: Any = (by_source[0], weights, batch["segments"] > 0)
        sums = (held[0], *(group_sums(jnp.float32(x), groups, n_groups) for x in held[1:]))
        names = ("losses", "weights", "tokens")
        return loss, {k: v.reshape(weights.shape) for k, v in zip(names, sums, strict=True)}

    return loss_fn


def _places(segments):
    """int32 [B, S]: for each position the place, in all rows, of the document that it is of."""
    first = jnp.arange(segments.shape[0])[:, None] * segments.shape[1]
    return first + jnp.maximum(segments - 1, 0)


def classification(
    model: "base.Model",
    *,
    label_smoothing: float = 0.0,
    class_weights: tuple[float, ...] = (),
    predictions: bool = False,
    sources: Sequence[str] = (),
) -> Callable[..., Any]:
    """Cross-entropy of a classifier over the documents of a Batch (see tasks.classification).

    A document's class is read where its weight is not 0. class_weights: a factor for each class, ()
    for none; the loss is divided by the sum of the weights that counted. predictions: return
    (Loss, {"wanted", "given" int32 [B, S], "weights", "scores" [B, S, C]}) in place of the Loss;
    "given" is -1 where a logit is not finite, scores are probabilities. sources: as of causal_lm.
    """

    def loss_fn(params, batch, rng):
        hidden, _ = model.outputs(params, batch, rng)
        logits = model.class_logits(params, hidden, rng, batch["segments"])  # float32 [B, S, C]
        targets, weights = batch["targets"], batch["weights"].astype(jnp.float32)
        if class_weights:
            weights = weights * jnp.asarray(class_weights, jnp.float32)[targets]
        trained = weights != 0
        losses = optax.softmax_cross_entropy(
            jnp.where(trained[..., None], logits, 0.0),
            optax.smooth_labels(jax.nn.one_hot(targets, logits.shape[-1]), label_smoothing),
        )
        losses, weight = losses * weights, jnp.sum(weights)
        given = jnp.argmax(logits, -1).astype(jnp.int32)
        given = jnp.where(jnp.all(jnp.isfinite(logits), -1), given, -1)
        hits = jnp.sum(trained & (given == targets), dtype=jnp.float32)
        metrics = token_counts(batch)
        metrics["accuracy"] = (hits, jnp.sum(trained, dtype=jnp.float32))
        if sources:
            sums = group_sums(losses, batch["sources"], len(sources))
            metrics |= _by_source(sources, sums, weights, batch["sources"])
        loss = Loss(jnp.sum(losses), weight, metrics)
        if not predictions:
            return loss
        out = {"wanted": targets, "given": given, "weights": batch["weights"]}
        return loss, out | {"scores": jax.nn.softmax(logits)}

    return loss_fn


def token_counts(
    batch: Mapping[str, jax.Array],
) -> dict[str, tuple[jax.Array, jax.Array | None]]:
    """How many positions a Batch has, how many hold a token, and how many of them are trained.

    {} for a batch that does not say which of its positions hold tokens.
    """
    if "segments" not in batch:
        return {}
    return {
        "cells": (jnp.float32(batch["segments"].size), None),
        "tokens": (jnp.sum(batch["segments"] > 0, dtype=jnp.float32), None),
        "trained_tokens": (jnp.sum(batch["weights"] != 0, dtype=jnp.float32), None),
    }


def _by_source(sources, sums, weights, groups):
    """Metrics of each source: its loss, and the number of its trained tokens."""
    shares: Any = group_sums(weights, groups, len(sources))
    counts: Any = group_sums(jnp.float32(weights != 0), groups, len(sources))
    metrics = {}
    for i, name in enumerate(sources):
        metrics[f"loss/{name}"] = (sums[i], shares[i])
        metrics[f"trained_tokens/{name}"] = (counts[i], None)
    return metrics


def _per_document(weights, segments):
    """Scale each document's weights to add up to 1 (0 for one that has none)."""
    S = weights.shape[1]
    sums = jax.vmap(lambda w, s: jax.ops.segment_sum(w, s, S + 1))(weights, segments)
    total = jnp.take_along_axis(sums, segments, axis=1)
    return jnp.where(total > 0, weights / jnp.where(total > 0, total, 1), 0.0)
