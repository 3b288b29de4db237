"""Attention by tokamax's Mosaic kernels, for NVIDIA GPUs from Hopper on.

    pip install tokamax               Python 3.12 and JAX 0.11.1 or later
    --config.model.attention=benchmarks/mosaic_attention.py:MOSAIC

A packed row's documents lie one after the other, so what a query sees is a range of keys. The
kernels take its first key and its end of each query; forward, they skip the blocks outside of it,
backward, all blocks of the row up to the query are visited. Products are of bfloat16. On a mesh
each device has to hold whole rows.
"""

import jax
import jax.numpy as jnp

from sftjax.errors import ConfigError
from sftjax.ops.attention import Backend
from sftjax.ops.attention.asked import Extra, Options, Where


def ranges(segments: jax.Array, window: int) -> tuple[jax.Array, jax.Array]:
    """First key and end of the keys that each query sees, were it not causal: int32 [B, S] each."""
    S = segments.shape[1]
    at = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), segments.shape)
    change = segments[:, 1:] != segments[:, :-1]
    starts = jnp.pad(change, ((0, 0), (1, 0)), constant_values=True)
    ends = jnp.pad(change, ((0, 0), (0, 1)), constant_values=True)
    first = jax.lax.cummax(jnp.where(starts, at, 0), axis=1)
    end = jax.lax.cummin(jnp.where(ends, at + 1, S), axis=1, reverse=True)
    if window:
        first, end = jnp.maximum(first, at - window + 1), jnp.minimum(end, at + window)
    return first, end


def mosaic(q: jax.Array, k: jax.Array, v: jax.Array, extra: Extra, where: Where, o: Options) -> jax.Array:
    """A backend of ops.attention for rows whose documents lie one after the other, in order."""
    try:
        from tokamax._src.ops.attention import pallas_mosaic_gpu as kernels
    except ImportError as e:
        raise ConfigError(f"model.attention 'mosaic': {e}; pip install tokamax") from e
    if k.shape[1] != q.shape[1]:
        raise ConfigError("model.attention 'mosaic' takes whole rows: set mesh.context=1")
    first, end = (x[:, None] for x in ranges(where.q_seg, o.window))
    mask = kernels.Mask(k_start=first, **({"is_causal": True} if o.causal else {"k_end": end}))
    run = kernels.PallasMosaicGpuFlashAttention()
    half = (x.astype(jnp.bfloat16) for x in (q, k, v))
    out = run(*half, mask=mask, logits_scale=o.scale, logits_soft_cap=o.softcap or None)
    return out.astype(q.dtype)


MOSAIC = Backend(mosaic, ("gpu",), frozenset(("segments", "window", "softcap", "bidirectional")))
