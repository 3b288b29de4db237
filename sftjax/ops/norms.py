"""Normalisation layers; statistics in float32, result in the input's dtype."""

import jax
import jax.numpy as jnp


def rms_norm(x: jax.Array, scale: jax.Array, eps: float, offset: float = 0.0) -> jax.Array:
    """Give x * rsqrt(mean(x^2) + eps) * (offset + scale), the mean over the dimensions of scale.

    x [..., *scale.shape]. Gemma stores the scale less 1: offset=1.
    """
    x32 = x.astype(jnp.float32)
    axes = tuple(range(-scale.ndim, 0))
    y = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=axes, keepdims=True) + eps)
    if offset:
        return (y * (offset + scale.astype(jnp.float32))).astype(x.dtype)
    return y.astype(x.dtype) * scale.astype(x.dtype)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array | None, eps: float) -> jax.Array:
    """(x - mean) * rsqrt(variance + eps) * scale + bias over the last axis; x [..., D]."""
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    y = centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + eps)
    y = y * scale.astype(jnp.float32)
    return (y if bias is None else y + bias.astype(jnp.float32)).astype(x.dtype)
