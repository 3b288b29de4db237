"""How likely a model finds given texts: for choices between answers, and for lm-eval."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sftjax.data.packing.pack import pad_to_multiple
from sftjax.evaluation.generation import BUCKET, in_batches, replicated
from sftjax.models import decoder
from sftjax.parallel import processes


@functools.partial(jax.jit, static_argnums=0)
def _scored(model, params, tokens, weights, lengths):
    """Of int32 [B, S], float32 [B, S], the weight of a token, and [B]: (float32 [B], bool [B])."""
    segments = (jnp.arange(tokens.shape[1]) < lengths[:, None]).astype(jnp.int32)
    targets = jnp.pad(weights[:, 1:], ((0, 0), (0, 1)))  # what is before the first of them is a prompt
    hidden = model.hidden(params, {"tokens": tokens, "segments": segments, "weights": targets})

    def row(of):  # one at a time: [B, S, V] would not fit
        hidden, tokens, weights = of
        logits = model.logits(params, hidden[:-1])
        right = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[1:, None], -1)[:, 0]
        first = jnp.argmax(logits, -1) == tokens[1:]
        return jnp.sum(right * weights[1:]), jnp.all(first | (weights[1:] == 0))

    return jax.lax.map(row, (hidden, tokens, weights))


def log_likelihoods(
    model: decoder.Model,
    params: Any,
    pairs: Sequence[tuple[Sequence[int] | np.ndarray, Sequence[int] | np.ndarray]],
    **options: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """(float64 [N], bool [N]) of pairs of token ids, a context of one or more and what follows it.

    The first is the natural logarithm of the probability of all that follows; the second is
    whether each of its tokens is the model's first choice. options: as of `weighted`.
    """
    docs = [(np.array([*a, *b]), np.repeat([0, 1], [len(a), len(b)])) for a, b in pairs]
    return weighted(model, params, docs, **options)


def weighted(
    model: decoder.Model,
    params: Any,
    docs: Sequence[tuple[np.ndarray, np.ndarray]],
    *,
    batch_size: int = 64,
    mesh: Mesh | None = None,
    said: Callable[[int, int], None] = lambda done, of: None,
) -> tuple[np.ndarray, np.ndarray]:
    """As `log_likelihoods`, of documents: pairs (tokens, the weight of each in the sum).

    said: as of generation.generate. Every process must call this with the same documents.
    """
    sums, greedy = np.zeros(len(docs)), np.ones(len(docs), bool)
    sizes = [len(tokens) for tokens, _ in docs]
    if docs:
        model.check_length(max(sizes), f"a text of {max(sizes)} tokens")
    size, batches = in_batches(sizes, batch_size, mesh)
    for n, rows in enumerate(batches):
        width = pad_to_multiple(sizes[rows[-1]], BUCKET)
        tokens, weights = np.zeros((size, width), np.int32), np.zeros((size, width), np.float32)
        lengths = np.zeros(size, np.int32)
        for j, i in enumerate(rows):
            lengths[j] = sizes[i]
            tokens[j, : sizes[i]], weights[j, : sizes[i]] = docs[i]
        arrays = (replicated(mesh, x) for x in (tokens, weights, lengths))
        found = map(processes.to_host, _scored(model, params, *arrays))
        sums[rows], greedy[rows] = (x[: len(rows)] for x in found)
        said(n * size + len(rows), len(docs))
    return sums, greedy
