"""Beam search with a key/value cache, by the rules of transformers' `num_beams`.

The likeliest answers so far, `beams` of each prompt, go on by one token a step. One that ends is kept with its
log-likelihood divided by the power `length_penalty` of its length; a prompt is done when none of those that go on, at
their length now, can be better than all that are kept.
"""

from typing import Any

import jax
import jax.numpy as jnp

from sftjax.models import decoder

NEVER = -1e9  # the score of what is no answer


def _take(x, index):
    """What x [B, n, ...] has at index [B, m]."""
    return jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 2)), axis=1)


def _rows(cache, change):
    """The cache with `change` done to the rows of each array: change(array, axis of the rows)."""

    def of(axis, part):
        return jax.tree.map(lambda x: change(x, axis) if x.ndim else x, part)

    return {k: of(1 if k in ("kv", "first") else 0, part) for k, part in cache.items()}


def search(
    model: decoder.Model,
    params: Any,
    cache: dict[str, Any],
    last: jax.Array,
    first: jax.Array,
    stops: jax.Array,
    new: int,
    beams: int,
    penalty: float,
) -> tuple[jax.Array, jax.Array]:
    """(ids int32 [B, new], how many of them are the answer [B]) of the best answers.

    cache, last [B, D]: as generation begins with them; first: int32 [B], the position of the first new token; stops:
    int32 [n], the tokens that end an answer.
    """
    B, K = len(last), beams
    cache, last = _rows(cache, lambda x, a: jnp.repeat(x, K, a)), jnp.repeat(last, K, 0)
    some = max(2, 1 + len(stops)) * K  # so many that K of them have not ended

    def body(carry):
        i, last, cache, ids, scores, kept, open_, _ = carry
        logs = jax.nn.log_softmax(model.logits(params, last)).reshape(B, K, -1)
        vocab = logs.shape[-1]
        found, at = jax.lax.top_k((logs + scores[..., None]).reshape(B, -1), min(some, K * vocab))
        beam, token = at // vocab, (at % vocab).astype(jnp.int32)
        grown = _take(ids, beam).at[:, :, i].set(token)
        ends = jnp.any(token[..., None] == stops, -1) | (i == new - 1)

        scores, go = jax.lax.top_k(found + NEVER * ends, K)
        ids, going = _take(grown, go), _take(beam, go)
        found = found / (i + 1.0) ** penalty
        counts = ends & (jnp.arange(ends.shape[1]) < K) & open_[:, None]
        fresh = (grown, found + NEVER * ~counts, counts)
        every = [jnp.concatenate(pair, 1) for pair in zip(kept, fresh, strict=True)]
        best = jax.lax.top_k(every[1], K)[1]
        kept = tuple(_take(x, best) for x in every)

        worst = jnp.where(kept[2], kept[1].min(1, keepdims=True), NEVER)
        open_ &= jnp.any(scores[:, :1] / (i + 1.0) ** penalty > worst, -1)
        rows = (jnp.arange(B)[:, None] * K + going).reshape(-1)
        cache = _rows(cache, lambda x, a: jnp.take(x, rows, a))
        following = dict(tokens=_take(token, go).reshape(-1, 1), positions=jnp.repeat(first + i, K)[:, None])
        hidden, cache = model.decode(params, cache, following)
        return i + 1, hidden[:, 0], cache, ids, scores, kept, open_, jnp.all(ends)

    scores = jnp.where(jnp.arange(K) == 0, 0.0, jnp.full((B, K), NEVER))
    ids = jnp.zeros((B, K, new), jnp.int32)
    # Of the best answers that have ended: ids [B, K, new], scores [B, K], and whether there is one [B, K].
    kept = (ids, jnp.full((B, K), NEVER), jnp.zeros((B, K), bool))
    start = (jnp.int32(0), last, cache, ids, scores, kept, jnp.ones(B, bool), jnp.bool_(False))
    *_, kept, _, _ = jax.lax.while_loop(lambda c: jnp.any(c[-2]) & ~c[-1], body, start)
    ids = kept[0][:, 0]
    ended = jnp.any(ids[..., None] == stops, -1)
    return ids, jnp.where(jnp.any(ended, 1), jnp.argmax(ended, 1), new)
