"""Normalisation layers; statistics in float32, result in the input's dtype."""

import jax
import jax.numpy as jnp


def rms_norm(x, scale, eps: float):
    """x * rsqrt(mean(x^2) + eps) * scale over the last axis. x [..., D], scale [D]."""
    x32 = x.astype(jnp.float32)
    y = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return y.astype(x.dtype) * scale.astype(x.dtype)
