"""Rotary position embedding: frequency tables by name, and the rotation.

The half-split form of Hugging Face checkpoints: dimension i is paired with i + H/2.
"""

import math

import jax.numpy as jnp
import numpy as np


def _default(theta, dim, scaling):
    return 1.0 / theta ** (np.arange(0, dim, 2, dtype=np.float64) / dim)


def _linear(theta, dim, scaling):
    return _default(theta, dim, scaling) / scaling["factor"]


def _llama3(theta, dim, scaling):
    """Llama 3.1: long wavelengths are slowed by `factor`, short ones kept, a ramp between."""
    freqs = _default(theta, dim, scaling)
    original = scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    ramp = (original * freqs / (2 * math.pi) - low) / (high - low)
    ramp = np.clip(ramp, 0.0, 1.0)
    return (1 - ramp) * freqs / scaling["factor"] + ramp * freqs


FREQUENCIES = {"default": _default, "linear": _linear, "llama3": _llama3}


def frequencies(theta: float, dim: int, scaling=()) -> np.ndarray:
    """float32 [dim/2] angular frequencies. scaling: the HF rope settings as (key, value) pairs."""
    scaling = dict(scaling)
    kind = scaling.get("rope_type", "default")
    if kind not in FREQUENCIES:
        raise ValueError(f"rope type {kind!r} is not supported; known: {', '.join(FREQUENCIES)}")
    return FREQUENCIES[kind](theta, dim, scaling).astype(np.float32)


def angles(positions, freqs):
    """(sin, cos), each float32 [B, S, 1, H/2], computed once for all layers."""
    a = positions[..., None, None].astype(jnp.float32) * freqs
    return jnp.sin(a), jnp.cos(a)


def rotate(x, sin, cos):
    """Rotate x [B, S, N, H] by its positions' angles; computed in float32."""
    x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    y = jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)
    return y.astype(x.dtype)
