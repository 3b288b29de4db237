"""Blockwise attention: the blocks of queries and keys that no document connects are never formed.

Which blocks meet is decided at run time from segments and positions, so a long packed row costs what its documents
cost. Forward, an online softmax (Milakov and Gimelshein 2018, arXiv 1805.02867) goes over the key blocks that a query
block needs; backward, each block's probabilities are formed again from the saved log-sum-exp (Dao et al. 2022, arXiv
2205.14135). Nothing of [S, T] exists.

Letters: g groups of rows, r rows of a group, i query blocks, j key blocks, k key/value heads, q the queries of a block
for all query heads of one k, t the keys of a block, h head width.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from sftjax.ops.attention.asked import NEG_INF, Extra, Options, Where, bucket, by_distance, mask

BLOCK = 128  # queries, and keys, in a block
# Rows no longer than so many blocks are taken all at once: there is little to skip in them, and
# one row's block is too little work for one turn of a loop.
TOGETHER = 4
FLOOR = NEG_INF / 2  # where a running maximum starts: exp(NEG_INF - FLOOR) is 0


class Places(NamedTuple):
    """Segments and positions of queries [g, i, r, size], and the last that they see, and of keys [g, j, r, size].

    The key blocks that a query block meets come first in order [g, i, j]; they are met [g, i].
    """

    q_seg: jax.Array
    q_pos: jax.Array
    sees: jax.Array
    kv_seg: jax.Array
    kv_pos: jax.Array
    order: jax.Array
    met: jax.Array


def blockwise(q: jax.Array, k: jax.Array, v: jax.Array, extra: Extra, where: Where, o: Options) -> jax.Array:
    """Softmax attention of tokens in any order; see ops.attention.attention. Padding gives 0."""
    B, S, N, _ = q.shape
    T, K = k.shape[1:3]
    sizes = (min(BLOCK, S), min(BLOCK, T))
    rows = B if max(S, T) <= TOGETHER * BLOCK else 1
    sees = where.q_pos if where.sees is None else where.sees
    q_seg, q_pos, sees = (_cut(x, rows, sizes[0]) for x in (where.q_seg, where.q_pos, sees))
    kv_seg, kv_pos = (_cut(x, rows, sizes[1]) for x in (where.kv_seg, where.kv_pos))
    places = _places(o, q_seg, q_pos, sees, kv_seg, kv_pos)
    extra = Extra(*(x if x is None else x.astype(jnp.float32) for x in extra))
    if extra.sinks is not None:  # a score of each query of a block
        sinks = jnp.repeat(extra.sinks.reshape(K, N // K), sizes[0], axis=1)
        extra = extra._replace(sinks=sinks)
    q = _heads(_cut(q, rows, sizes[0]), K)
    k, v = (_heads(_cut(x, rows, sizes[1]), K) for x in (k, v))
    return _whole(_attend(o, q, k, v, extra, places), N, B, S)


def _cut(x, rows, size):
    """[B, S, ...] -> [g, blocks, rows, size, ...]; the last block is filled up with 0."""
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % size)] + [(0, 0)] * (x.ndim - 2))
    x = x.reshape(-1, rows, x.shape[1] // size, size, *x.shape[2:])
    return jnp.swapaxes(x, 1, 2)


def _heads(x, K):
    """[g, i, r, size, N, H] -> [g, i, r, K, N/K * size, H]."""
    *lead, size, N, H = x.shape
    x = x.reshape(*lead, size, K, N // K, H).transpose(0, 1, 2, 4, 5, 3, 6)
    return x.reshape(*lead, K, N // K * size, H)


def _whole(x, N, B, S):
    """The inverse of _cut and _heads: [B, S, N, H]."""
    g, i, r, _, _, H = x.shape
    x = x.reshape(g, i, r, N, -1, H).transpose(0, 2, 1, 4, 3, 5)
    return x.reshape(B, -1, N, H)[:, :S]


# ---- which blocks meet -----------------------------------------------------------------------


def _places(o, q_seg, q_pos, sees, kv_seg, kv_pos) -> Places:
    """Each block as an interval of (segment, position) in lexical order.

    Blocks meet where the interval of what a block's queries see overlaps that of the keys: never too few, and none too
    many where documents lie one after the other.
    """
    last = jnp.iinfo(jnp.int32).max
    first_seen = jnp.maximum(q_pos - o.window + 1, 0) if o.window else jnp.zeros_like(q_pos)
    ahead = 0 if o.causal else o.window - 1 if o.window else None
    last_seen = jnp.full_like(q_pos, last) if ahead is None else sees + ahead
    low, high = _least(q_seg, first_seen), _greatest(q_seg, last_seen)
    keys = _least(kv_seg, kv_pos), _greatest(kv_seg, kv_pos)
    low, high = ([x[:, :, None] for x in pair] for pair in (low, high))
    least, greatest = ([x[:, None] for x in pair] for pair in keys)
    meet = _before(low, greatest) & _before(least, high)  # [g, i, j, r]
    real = jnp.any(q_seg > 0, -1)[:, :, None] & jnp.any(kv_seg > 0, -1)[:, None]
    meet = jnp.any(meet & real, -1)
    order = jnp.argsort(~meet, axis=-1, stable=True)
    return Places(q_seg, q_pos, sees, kv_seg, kv_pos, order, jnp.sum(meet, -1))


def _least(seg, pos):
    """The first (segment, position) of each block, padding apart."""
    last = jnp.iinfo(jnp.int32).max
    first = jnp.min(jnp.where(seg > 0, seg, last), -1)
    return first, jnp.min(jnp.where(seg == first[..., None], pos, last), -1)


def _greatest(seg, pos):
    final = jnp.max(seg, -1)
    return final, jnp.max(jnp.where(seg == final[..., None], pos, -1), -1)


def _before(a, b):
    """Is a <= b, of (segment, position)."""
    return (a[0] < b[0]) | ((a[0] == b[0]) & (a[1] <= b[1]))


# ---- one block of queries with one of keys ---------------------------------------------------


def _scores(o, q, k, distances, mine, theirs):
    """float32 [r, k, q, t]; NEG_INF where a query does not see a key."""
    s = jnp.einsum("rkqh,rkth->rkqt", q, k, preferred_element_type=jnp.float32) * o.scale
    if o.softcap:
        s = o.softcap * jnp.tanh(s / o.softcap)
    (q_seg, q_pos, sees), (kv_seg, kv_pos) = mine, theirs
    where = Where(q_seg, kv_seg, q_pos, kv_pos, sees)
    seen = mask(where, o.causal, o.window) & (q_seg > 0)[:, :, None]
    r, K, Q, t = s.shape
    s = s.reshape(r, K, -1, seen.shape[1], t)  # the query heads of k apart
    if distances is not None:
        s += by_distance(distances.reshape(*s.shape[1:3], -1), where, o)
    return jnp.where(seen[:, None, None], s, NEG_INF).reshape(r, K, Q, t)


def _dot(equation, a, b):
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _block(p: Places, at):
    """Group, query block, and its segments, positions, and the last that it sees."""
    g, i = jnp.unravel_index(at, p.met.shape)
    return g, i, (p.q_seg[g, i], p.q_pos[g, i], p.sees[g, i])


# ---- forward and backward over all blocks ----------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(o, q, k, v, extra, places):
    return _forward(o, q, k, v, extra, places)[0]


def _forward(o, q, k, v, extra, places):
    """Of q [g, i, r, k, q, h], k and v [g, j, r, k, t, h] what has the shape of q."""

    def block(at):
        g, i, mine = _block(places, at)
        qi = q[g, i]

        def visit(n, state):
            top, total, out = state
            j = places.order[g, i, n]
            theirs = places.kv_seg[g, j], places.kv_pos[g, j]
            s = _scores(o, qi, k[g, j], extra.distances, mine, theirs)
            new = jnp.maximum(top, s.max(-1))
            p, keep = jnp.exp(s - new[..., None]), jnp.exp(top - new)
            out = out * keep[..., None] + _dot("rkqt,rkth->rkqh", p.astype(v.dtype), v[g, j])
            return new, total * keep + p.sum(-1), out

        shape = qi.shape[:-1]
        top, total = jnp.full(shape, FLOOR), jnp.zeros(shape)
        if extra.sinks is not None:
            top, total = jnp.broadcast_to(extra.sinks, shape), jnp.ones(shape)
        state = (top, total, jnp.zeros(qi.shape))
        top, total, out = jax.lax.fori_loop(0, places.met[g, i], visit, state)
        total = jnp.where(total > 0, total, 1.0)
        return (out / total[..., None]).astype(q.dtype), top + jnp.log(total)

    out, lse = jax.lax.map(block, jnp.arange(places.met.size))
    out, lse = (x.reshape(*places.met.shape, *x.shape[1:]) for x in (out, lse))
    out, lse = checkpoint_name((out, lse), "attention")
    return out, (q, k, v, extra, places, out, lse)


def _backward(o, saved, do):
    q, k, v, extra, places, out, lse = saved
    delta = jnp.sum(out.astype(jnp.float32) * do.astype(jnp.float32), -1)  # [g, i, r, k, q]

    def block(carry, at):
        g, i, mine = _block(places, at)
        qi, doi, lsei, deltai = q[g, i], do[g, i], lse[g, i, ..., None], delta[g, i, ..., None]

        def visit(n, carry):
            dq, dk, dv, ddistances = carry
            j = places.order[g, i, n]
            theirs = places.kv_seg[g, j], places.kv_pos[g, j]
            s = _scores(o, qi, k[g, j], extra.distances, mine, theirs)
            p = jnp.exp(s - lsei)
            ds = p * (_dot("rkqh,rkth->rkqt", doi, v[g, j]) - deltai)
            if ddistances is not None:
                ddistances += _by_bucket(o, ds, mine[1], theirs[1], ddistances.shape)
            ds = ds * o.scale
            if o.softcap:  # p is 0 where s is no score
                ds = ds * (1 - jnp.where(s > NEG_INF, s / o.softcap, 0.0) ** 2)
            p, ds = p.astype(q.dtype), ds.astype(q.dtype)
            dq = dq + _dot("rkqt,rkth->rkqh", ds, k[g, j])
            dk = dk.at[g, j].add(_dot("rkqt,rkqh->rkth", ds, qi))
            return dq, dk, dv.at[g, j].add(_dot("rkqt,rkqh->rkth", p, doi)), ddistances

        dq, *carry = jax.lax.fori_loop(0, places.met[g, i], visit, (jnp.zeros(qi.shape), *carry))
        return tuple(carry), dq.astype(q.dtype)

    zeros = [None if x is None else jnp.zeros(x.shape) for x in (k, v, extra.distances)]
    (dk, dv, ddistances), dq = jax.lax.scan(block, tuple(zeros), jnp.arange(places.met.size))
    dsinks = None
    if extra.sinks is not None:
        dsinks = -jnp.sum(jnp.exp(extra.sinks - lse) * delta, (0, 1, 2))
    dextra = Extra(dsinks, ddistances)
    dk, dv = (jnp.asarray(dx, x.dtype) for dx, x in ((dk, k), (dv, v)))
    return dq.reshape(q.shape), dk, dv, dextra, None


def _by_bucket(o, ds, q_pos, kv_pos, shape):
    """The sums of ds [r, k, q, t] over the pairs of each head in each bucket: `shape` [N, buckets].

    A product with ones and zeros: a scattered sum would take the pairs one after the other.
    """
    r, K, _, t = ds.shape
    own = bucket(q_pos[:, :, None] - kv_pos[:, None], shape[1], o)
    own = jax.nn.one_hot(own, shape[1])
    return _dot("rkgqt,rqtb->kgb", ds.reshape(r, K, -1, q_pos.shape[1], t), own).reshape(shape)


_attend.defvjp(_forward, _backward)
