"""The one way model code multiplies by a weight."""

import functools

import jax
import jax.numpy as jnp


def einsum(equation: str, x, w):
    """jnp.einsum(equation, x, w) in x's dtype.

    w is an array, or a weight node (LoRA, quantised) with an `einsum(equation, x)` of its own.
    """
    if hasattr(w, "einsum"):
        return w.einsum(equation, x)
    w = w.astype(x.dtype)
    y = jnp.einsum(equation, x, jax.lax.stop_gradient(w))
    return y + _nothing(equation, jax.lax.stop_gradient(x), w)  # XLA takes the addition out


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _nothing(equation, x, w):
    """Zeros in the product's shape, with the product's gradient by w: x times g.

    JAX itself would take g times x and turn the product, for which XLA:CPU turns g, together with
    all that is fused with it, element by element. The product stays outside, in the sight of the
    policies of remat.
    """
    y = jax.eval_shape(functools.partial(jnp.einsum, equation), x, w)
    return jnp.zeros(y.shape, y.dtype)


def _forward(equation, x, w):
    return _nothing(equation, x, w), x


def _backward(equation, x, g):
    a, b, y = equation.replace("->", ",").split(",")
    return None, jnp.einsum(f"{a},{y}->{b}", x, g)


_nothing.defvjp(_forward, _backward)


def project(equation: str, x, p):
    """einsum with p["w"], plus p["b"] where there is one (its dimensions are the output's last)."""
    y = einsum(equation, x, p["w"])
    return y + p["b"].astype(y.dtype) if "b" in p else y
