"""Attention: one function, a table of backends, each saying what it supports.

Segments are the single truth about which tokens may see each other: a query sees a key of its own
segment at a position not after its own. Positions restart in each document, so this one rule
serves padded rows, packed rows and a KV cache (where an unwritten slot has segment 0).
"""

import dataclasses
from typing import Callable

import jax
import jax.numpy as jnp

NEG_INF = -0.7 * float(jnp.finfo(jnp.float32).max)  # finite: a row with nothing to see gives no NaN


def xla(q, k, v, *, q_seg, kv_seg, q_pos, kv_pos, causal, window, softcap, scale):
    """Reference: the whole score matrix, softmax in float32, grouped query heads."""
    B, S, N, H = q.shape
    T, K = k.shape[1:3]
    q = q.reshape(B, S, K, N // K, H)
    scores = jnp.einsum("bskgh,btkh->bkgst", q, k, preferred_element_type=jnp.float32) * scale
    if softcap:
        scores = softcap * jnp.tanh(scores / softcap)
    seen = mask(q_seg, kv_seg, q_pos, kv_pos, causal, window)  # [B, S, T]
    scores = jnp.where(seen[:, None, None], scores, NEG_INF)
    probs = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgst,btkh->bskgh", probs, v).reshape(B, S, N, H)


def mask(q_seg, kv_seg, q_pos, kv_pos, causal, window):
    """bool [B, S, T]: which keys each query sees."""
    seen = q_seg[:, :, None] == kv_seg[:, None, :]
    ahead = q_pos[:, :, None] - kv_pos[:, None, :]  # how far the key lies behind the query
    if causal:
        seen &= ahead >= 0
    if window:
        seen &= ahead < window
    return seen


@dataclasses.dataclass(frozen=True)
class Backend:
    fn: Callable
    platforms: tuple[str, ...] = ("cpu", "gpu", "tpu")
    features: frozenset = frozenset({"segments", "window", "softcap", "cache", "bidirectional"})


BACKENDS = {"xla": Backend(xla)}


def check(backend: str, features=()) -> None:
    """Raise ValueError unless `backend` exists, runs on this platform and supports `features`."""
    if backend not in BACKENDS:
        raise ValueError(
            f"model.attention={backend!r} is unknown; the backends are {', '.join(BACKENDS)}"
        )
    missing = set(features) - BACKENDS[backend].features
    if missing:
        raise ValueError(f"attention backend {backend!r} does not support {sorted(missing)}")
    platform = jax.default_backend()
    if platform not in BACKENDS[backend].platforms:
        raise ValueError(f"attention backend {backend!r} does not run on {platform}")


def attention(
    q,
    k,
    v,
    *,
    segments,
    positions,
    kv_segments=None,
    kv_positions=None,
    causal=True,
    window=0,
    softcap=0.0,
    scale=None,
    backend="xla",
):
    """Softmax attention. q [B, S, N, H], k and v [B, T, K, H] with K dividing N -> [B, S, N, H].

    segments, positions: int32 [B, S] of the queries; kv_* [B, T] of the keys (the queries' own when
    None). window: a query sees itself and window-1 keys before it; 0 = all. softcap: 0 = none.
    """
    return BACKENDS[backend].fn(
        q,
        k,
        v,
        q_seg=segments,
        kv_seg=segments if kv_segments is None else kv_segments,
        q_pos=positions,
        kv_pos=positions if kv_positions is None else kv_positions,
        causal=causal,
        window=window,
        softcap=softcap,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
    )
