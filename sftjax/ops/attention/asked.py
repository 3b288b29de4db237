"""What every backend of attention is asked: which keys a query sees, and what its scores are."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

NEG_INF = -0.7 * float(jnp.finfo(jnp.float32).max)  # the score of a key that is not seen


class Where(NamedTuple):
    """Segments and positions, int32: of the queries [B, S], and of the keys [B, T].

    sees [B, S]: the last position that a query sees, where that is not its own.
    """

    q_seg: jax.Array
    kv_seg: jax.Array
    q_pos: jax.Array
    kv_pos: jax.Array
    sees: Any = None


class Options(NamedTuple):
    """What the scores and the mask are; see ops.attention.attention."""

    causal: bool
    window: int
    softcap: float
    scale: float
    furthest: int = 0  # the distance from which on all are in one bucket


class Extra(NamedTuple):
    """Arrays that the scores are made with, beside queries and keys; see ops.attention.attention.

    sinks [N]. distances [N, buckets]: what is added to a score by how far the key lies away. relative: (keys, queries)
    [R, N, H] of the distances, see ops.attention.of_distances.
    """

    sinks: Any = None
    distances: Any = None
    relative: Any = None


def bucket(ahead: jax.Array, buckets: int, o: Options) -> jax.Array:
    """Which bucket of T5's a distance is in: int32, of `ahead`, how far the key lies behind.

    Half of the buckets hold one distance each, the others ever more, up to o.furthest (Raffel et al. 2020, arXiv
    1910.10683). Where a query sees both sides, each has half of the buckets.
    """
    n = buckets if o.causal else buckets // 2
    one = n // 2
    ratio = math.log(o.furthest / one) / (n - one)
    # The first distance of each of the wider buckets: compared, so that no rounding decides.
    starts = [math.ceil(one * math.exp(ratio * i) - 1e-9) for i in range(1, n - one)]
    d = jnp.maximum(ahead, 0) if o.causal else jnp.abs(ahead)
    found = jnp.minimum(d, one) + sum((d >= start).astype(jnp.int32) for start in starts)
    return found if o.causal else found + n * (ahead < 0)


def by_distance(table: jax.Array, where: Where, o: Options) -> jax.Array:
    """[B, ..., S, T]: of a table [..., buckets] what is added to the scores by the distance of each key."""
    ahead = where.q_pos[:, :, None] - where.kv_pos[:, None]
    return jnp.moveaxis(table[..., bucket(ahead, table.shape[-1], o)], -3, 0)


def mask(where: Where, causal: bool, window: int) -> jax.Array:
    """Which keys each query sees: bool [B, S, T]."""
    seen = where.q_seg[:, :, None] == where.kv_seg[:, None, :]
    ahead = where.q_pos[:, :, None] - where.kv_pos[:, None, :]  # how far the key lies behind
    if causal:
        seen &= (ahead if where.sees is None else where.sees[:, :, None] - where.kv_pos[:, None, :]) >= 0
    if window:
        seen &= (ahead if causal else jnp.abs(ahead)) < window
    return seen
