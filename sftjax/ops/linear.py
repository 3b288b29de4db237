"""The one way model code multiplies by a weight."""

import jax.numpy as jnp


def einsum(equation: str, x, w, **kwargs):
    """jnp.einsum(equation, x, w) in x's dtype.

    w is an array, or a weight node (LoRA, quantised) with an `einsum(equation, x)` of its own.
    """
    if hasattr(w, "einsum"):
        return w.einsum(equation, x, **kwargs)
    return jnp.einsum(equation, x, w.astype(x.dtype), **kwargs)


def project(equation: str, x, p):
    """einsum with p["w"], plus p["b"] where there is one (its dimensions are the output's last)."""
    y = einsum(equation, x, p["w"])
    return y + p["b"].astype(y.dtype) if "b" in p else y
