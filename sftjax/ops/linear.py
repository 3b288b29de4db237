"""The product with a weight that is an array; model code asks ops.weight for it."""

import functools
import itertools

import jax
import jax.numpy as jnp


def einsum(equation: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """jnp.einsum(equation, x, w) in x's dtype."""
    w = w.astype(x.dtype)
    if not _for_cpu():
        return jnp.einsum(equation, x, w)
    y = jnp.einsum(equation, x, jax.lax.stop_gradient(w))
    return _by_weight(equation, y, jax.lax.stop_gradient(x), w)


def _for_cpu() -> bool:
    """Whether the program that is traced is one for CPUs: by the mesh, or else by what is here."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return (device.platform if device else jax.default_backend()) == "cpu"


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _by_weight(equation, y, x, w):
    """y, the product of x and w, with its gradient by w: x times g.

    JAX itself would take g times x and turn the product, for which XLA:CPU turns g, together with all that is fused
    with it, element by element. The product stays outside, in the sight of remat.

    For CPUs only, where a step of a small Llama (width 288, six layers, 8 rows of 256 tokens) takes 0.84 of the time
    that it takes by JAX's own rule. Compiled for a v5e 2x4, a 1B's step with full remat takes 2.9% fewer cycles and
    7.3% less memory by JAX's rule (1.039 s for 1.070 s, 5.06 GiB for 5.46 GiB; the same FLOPs, and the same bytes
    sent).
    """
    return y


def _forward(equation, y, x, w):
    return y, x


def _backward(equation, x, dy):
    a, b, y = equation.replace("->", ",").split(",")
    g, common = dy, itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, y, strict=False))
    rows = "".join(letter for letter, _ in common)
    if len(rows) > 1 and not set(rows) & set(b):
        # Matrices XLA:CPU multiplies as they lie; arrays of more dimensions it turns first.
        a, y = (rows[0] + s.removeprefix(rows) for s in (a, y))
        x, g = (v.reshape(-1, *v.shape[len(rows) :]) for v in (x, g))
    return dy, None, jnp.einsum(f"{a},{y}->{b}", x, g)


_by_weight.defvjp(_forward, _backward)
