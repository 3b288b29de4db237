"""Loss functions: (params, batch, rng) -> Loss(sum, weight, metrics). One function each.

rng is None in evaluation: nothing random then, no dropout.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sftjax.errors import ConfigError
from sftjax.models import base, decoder
from sftjax.ops import dropout, moe
from sftjax.ops.cross_entropy import CHUNK_TOKENS, group_sums, linear_cross_entropy
from sftjax.step import Loss


def causal_lm(
    model: decoder.Model,
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

    Of an encoder-decoder, over the targets of a Batch of pairs; see packing.pack.PairRows.

    normalise: "tokens" weighs every trained token alike; "documents" every document alike, whatever its length. dft:
    weigh each token's loss by its own probability (Dynamic Fine-Tuning). load_balance: coefficient of a mixture of
    experts' load-balancing loss, which is a metric in any case and weighs as much as the batch's trained tokens do.
    accuracy adds the share of trained tokens that the model's first choice gets right. sources: names, to which the
    batch's `sources` int32 [B, S] are indices; adds loss/<name> and the number trained_tokens/<name>. documents: return
    (Loss, {"losses", "weights", "tokens" float32 [B, S]}) in place of the Loss: what the n-th document of a row adds up
    to stands at its n-th place; not beside sources.
    """
    if normalise not in ("tokens", "documents"):
        raise ConfigError(f"normalise={normalise!r}; expected 'tokens' or 'documents'")

    def loss_fn(params, batch, rng) -> Any:
        weights = batch["weights"].astype(jnp.float32)
        segments = batch.get("target_segments", batch["segments"])
        if normalise == "documents":
            weights = _per_document(weights, segments)
        hidden, routing = model.outputs(params, batch, rng)
        groups, n_groups = (batch["sources"], len(sources)) if sources else (None, 0)
        if documents:  # the place, in all rows, of the document that each position is of
            first = jnp.arange(len(segments))[:, None] * segments.shape[1]
            groups, n_groups = first + jnp.maximum(segments - 1, 0), weights.size
        total, hits, *by_source = linear_cross_entropy(
            hidden,
            model.head(params),
            batch["targets"],
            weights,
            bias=model.vocab_bias(params) if hasattr(model, "vocab_bias") else None,
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
        sums: Any = {"losses": by_source[0], "weights": group_sums(weights, groups, n_groups)}
        sums["tokens"] = group_sums(jnp.float32(segments > 0), groups, n_groups)
        return loss, {k: v.reshape(weights.shape) for k, v in sums.items()}

    return loss_fn


class Options(NamedTuple):
    """What the loss of a label or a number is made with."""

    label_smoothing: float = 0.0
    focal_gamma: float = 2.0
    huber_delta: float = 1.0


def _cross_entropy(logits, targets, o):
    one_hot = jax.nn.one_hot(targets, logits.shape[-1])
    return optax.softmax_cross_entropy(logits, optax.smooth_labels(one_hot, o.label_smoothing))


def _focal(logits, targets, o):
    """A label's cross-entropy times (1 - p) ** gamma (Lin et al. 2017, arXiv 1708.02002)."""
    p = jnp.take_along_axis(jax.nn.softmax(logits), targets[..., None], -1)[..., 0]
    return (1 - p) ** o.focal_gamma * _cross_entropy(logits, targets, o)


LABEL = {"cross_entropy": _cross_entropy, "focal": _focal}  # of logits [..., C], targets [...]
LABELS: dict[str, Callable] = {  # of logits and targets [..., C], the same
    "bce": lambda x, t, o: optax.sigmoid_binary_cross_entropy(x, t),
    "focal": lambda x, t, o: optax.sigmoid_focal_loss(x, t, gamma=o.focal_gamma),
}
NUMBER: dict[str, Callable] = {  # of two numbers
    "mse": lambda y, t, o: (y - t) ** 2,
    "mae": lambda y, t, o: jnp.abs(y - t),
    "huber": lambda y, t, o: optax.huber_loss(y, t, delta=o.huber_delta),
}


def _loss_of(table, kind, options):
    kind = kind or next(iter(table))
    if kind not in table:
        raise ConfigError(f"loss.kind={kind!r}: of this task it is one of {', '.join(table)}")
    return functools.partial(table[kind], o=Options(**options))


def read(
    model: base.Model, params: Any, batch: dict, rng: jax.Array | None, model_state: Any = None
) -> tuple[jax.Array, jax.Array, Any]:
    """(float32 logits [B, S, C] of a head of classes, weights float32 [B, S], new model_state or None)."""
    own = () if model_state is None else (model_state,)
    hidden, new = model.outputs(params, batch, rng, *own)
    logits = model.class_logits(params, hidden, rng, batch.get("segments"))
    return logits, batch["weights"].astype(jnp.float32), new if own else None


def summed(batch: dict, losses: jax.Array, weights: jax.Array, sources: Sequence[str], **metrics: Any) -> Loss:
    """The Loss of losses float32 [B, S] with their weights [B, S]; sources as of causal_lm."""
    losses = jnp.where(weights != 0, losses, 0.0) * weights
    metrics = token_counts(batch) | metrics
    if sources:
        sums = group_sums(losses, batch["sources"], len(sources))
        metrics |= _by_source(sources, sums, weights, batch["sources"])
    return Loss(jnp.sum(losses), jnp.sum(weights), metrics)


def classification(
    model: base.Model,
    *,
    kind: str = "",
    class_weights: tuple[float, ...] = (),
    predictions: bool = False,
    sources: Sequence[str] = (),
    **options: float,
) -> Callable[..., Any]:
    """The loss of one label of several, by a row of LABEL, over what is read in a Batch.

    A label is read where its weight is not 0: once a document, or at many of its tokens. class_weights: a factor for
    each class, () for none; the loss is divided by the sum of the weights that counted. A batch with `partner` and
    `share` [B, S], of mixed images, wants of each its target for the share, and the partner for the rest. predictions:
    return (Loss, {"wanted", "given" int32 [B, S], "weights", "scores" [B, S, C]}) in place of the Loss; "given" is -1
    where a logit is not finite, scores are probabilities. sources: as of causal_lm. options: fields of Options.
    """
    loss_of = _loss_of(LABEL, kind, options)

    def loss_fn(params, batch, rng, model_state=None):
        logits, weights, state = read(model, params, batch, rng, model_state)
        targets = batch["targets"]
        if class_weights:
            weights = weights * jnp.asarray(class_weights, jnp.float32)[targets]
        trained = weights != 0
        sound = jnp.where(trained[..., None], logits, 0.0)
        losses = loss_of(sound, targets)
        if "partner" in batch:
            share = batch["share"]
            losses = share * losses + (1 - share) * loss_of(sound, batch["partner"])
        given = jnp.argmax(logits, -1).astype(jnp.int32)
        given = jnp.where(jnp.all(jnp.isfinite(logits), -1), given, -1)
        hits = jnp.sum(trained & (given == targets), dtype=jnp.float32)
        accuracy = (hits, jnp.sum(trained, dtype=jnp.float32))
        loss = dataclasses.replace(summed(batch, losses, weights, sources, accuracy=accuracy), state=state)
        if not predictions:
            return loss
        out = {"wanted": targets, "given": given, "weights": batch["weights"], "scores": jax.nn.softmax(logits)}
        return loss, out

    return loss_fn


def multi_label(
    model: base.Model,
    *,
    kind: str = "",
    class_weights: tuple[float, ...] = (),
    predictions: bool = False,
    sources: Sequence[str] = (),
    **options: float,
) -> Callable[..., Any]:
    """The loss of any number of labels, by a row of LABELS, over the documents of a Batch.

    The labels of a document are its targets less 1, in any order, 0 for none. A document's loss is the mean over all
    labels, each times its factor of class_weights. predictions: return (Loss, {"wanted", "scores" float32 [B, S, C],
    "weights"}) in place of the Loss; scores are probabilities, each label's own. sources, options: as of
    classification.
    """
    loss_of = _loss_of(LABELS, kind, options)

    def loss_fn(params, batch, rng, model_state=None):
        del model_state  # no model of texts has one
        logits, weights, _ = read(model, params, batch, rng)
        wanted = _labels_of(batch["targets"], batch["segments"], logits.shape[-1])
        losses = loss_of(jnp.where(weights[..., None] != 0, logits, 0.0), wanted)
        if class_weights:
            losses = losses * jnp.asarray(class_weights, jnp.float32)
        loss = summed(batch, jnp.mean(losses, -1), weights, sources)
        if not predictions:
            return loss
        return loss, {"wanted": wanted, "scores": jax.nn.sigmoid(logits), "weights": batch["weights"]}

    return loss_fn


def _labels_of(targets, segments, classes):
    """float32 [B, S, C]: 1 for each label that the token's document has."""
    S = targets.shape[1]

    def row(targets, segments):
        there = jnp.zeros((S + 1, classes + 1)).at[segments, targets].set(1.0)
        return there[segments, 1:]

    return jax.vmap(row)(targets, segments)


def regression(
    model: base.Model, *, kind: str = "", predictions: bool = False, sources: Sequence[str] = (), **options: float
) -> Callable[..., Any]:
    """The loss of a number, by a row of NUMBER, over the documents of a Batch.

    model_state: {"mean", "std"} of the targets, float32 scalars: the model gives a number in these units, and so is the
    loss; None: in the targets' own. predictions: return (Loss, {"wanted", "given", "weights" [B, S]}) in place of the
    Loss, numbers of the targets' own units. sources, options: as of classification.
    """
    loss_of = _loss_of(NUMBER, kind, options)

    def loss_fn(params, batch, rng, model_state=None):
        mean, std = (0.0, 1.0) if model_state is None else (model_state[k] for k in ("mean", "std"))
        logits, weights, _ = read(model, params, batch, rng)
        given, wanted = logits[..., 0], (batch["targets"] - mean) / std
        given, wanted = (jnp.where(weights != 0, x, 0.0) for x in (given, wanted))
        loss = dataclasses.replace(summed(batch, loss_of(given, wanted), weights, sources), state=model_state)
        if not predictions:
            return loss
        return loss, {"wanted": batch["targets"], "given": given * std + mean, "weights": batch["weights"]}

    return loss_fn


def masked_lm(
    model: Any,
    *,
    mask_id: int,
    mask_rate: float = 0.15,
    accuracy: bool = False,
    chunk_tokens: int = CHUNK_TOKENS,
    sources: Sequence[str] = (),
) -> Callable[..., Any]:
    """Cross-entropy of the tokens that are hidden from the model (Devlin et al. 2019).

    Of the tokens with a weight a share `mask_rate` is chosen: by rng, or in evaluation by a hash of token and position,
    so that it depends on nothing else. Of the chosen 80% become mask_id, 10% another token, and 10% stay.
    """

    def loss_fn(params, batch, rng):
        tokens, shape = batch["tokens"], (*batch["tokens"].shape, 3)
        if rng is None:
            place = dropout.hashed(tokens, batch["positions"], 3)
        else:
            place = jax.random.uniform(jax.random.fold_in(rng, 2), shape)
        chosen = (place[..., 0] < mask_rate) & (batch["weights"] != 0)
        other = (place[..., 2] * model.config.vocab).astype(jnp.int32)
        shown = jnp.where(place[..., 1] < 0.9, other, tokens)
        shown = jnp.where(place[..., 1] < 0.8, mask_id, shown)
        weights = jnp.where(chosen, batch["weights"], 0.0)
        seen = batch | {"tokens": jnp.where(chosen, shown, tokens), "weights": weights}
        head = causal_lm(model, accuracy=accuracy, chunk_tokens=chunk_tokens, sources=sources)
        return head(params, seen | {"targets": tokens}, rng)

    return loss_fn


def token_counts(batch: Mapping[str, jax.Array]) -> dict[str, tuple[jax.Array, jax.Array | None]]:
    """How many positions a Batch has, how many hold a token, and how many of them are trained.

    Of images, how many there are. {} for a batch that says neither.
    """
    if "image" in batch:
        return {"images": (jnp.sum(batch["weights"] != 0, dtype=jnp.float32), None)}
    held = [batch[name] for name in ("segments", "target_segments") if name in batch]
    if not held:
        return {}
    return {
        "cells": (jnp.float32(sum(x.size for x in held)), None),
        "tokens": (sum((jnp.sum(x > 0, dtype=jnp.float32) for x in held), jnp.float32(0)), None),
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
