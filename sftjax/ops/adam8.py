"""Less memory for training: Adam with moments of 8 bits, and sums that a bfloat16 parameter keeps.

Both round up or down in turn, by an evenly spread sequence, so that the mean over steps is exact. To the nearest, what
changes by less than half a step of its format, as second moments and parameters do, would never change.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

BLOCK = 256
SMALL = 4096  # numbers; tensors of fewer, or of blocks of fewer than 16, keep float32 moments
ROOTS = (2, 4)  # of first and second moments


class Moments(NamedTuple):
    """codes: int8 of the parameters' shapes; scales: float32 [..., blocks]. Of small tensors float32, and ()."""

    codes: Any
    scales: Any


class State(NamedTuple):
    """The state of scale_by_adam_8bit."""

    step: jax.Array
    mu: Moments
    nu: Moments


def scale_by_adam_8bit(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """optax.scale_by_adam with moments in 8 bits, of blocks of 256 with one scale each (arXiv 2110.02861).

    A code is the square root, of second moments the fourth root, of a number's share of the largest in its block.
    """

    def init(params):
        code = lambda p: jnp.zeros(p.shape, jnp.float32 if _small(p) else jnp.int8)  # noqa: E731
        scale = lambda p: () if _small(p) else jnp.zeros((*p.shape[:-1], _blocks(p.shape[-1])))  # noqa: E731
        moments = Moments(jax.tree.map(code, params), jax.tree.map(scale, params))
        return State(jnp.zeros((), jnp.int32), moments, moments)

    def update(grads, state, params=None):
        count = state.step + 1

        def one(g: jax.Array, *old: Any) -> tuple:
            mu, nu = _decode(old[0], old[1], ROOTS[0]), _decode(old[2], old[3], ROOTS[1])
            mu, nu = b1 * mu + (1 - b1) * g, b2 * nu + (1 - b2) * jnp.square(g)
            step = mu / (1 - b1**count) / (jnp.sqrt(nu / (1 - b2**count)) + eps)
            pairs = zip((mu, nu), ROOTS, strict=True)
            new = ((x, ()) if _small(g) else _encode(x, root, count) for x, root in pairs)
            return step, *new

        leaves, like = jax.tree.flatten(grads)
        tree: Any = like  # its methods have no types
        old = (tree.flatten_up_to(x) for x in (*state.mu, *state.nu))
        steps, *new = zip(*map(one, leaves, *old), strict=True)
        mu, nu = (Moments(*map(tree.unflatten, zip(*pairs, strict=True))) for pairs in new)
        return tree.unflatten(steps), State(count, mu, nu)

    return optax.GradientTransformation(init, update)


def _small(p):
    """Is it a tensor of few numbers, or one whose blocks would have few."""
    return p.size < SMALL or p.shape[-1] < 16 * _blocks(p.shape[-1])


def _blocks(n):
    """Of a last dimension of n: the fewest that are alike and have at most BLOCK numbers."""
    return next(k for k in range(-(-n // BLOCK), n + 1) if n % k == 0)


def _encode(x, root, count):
    """(codes, scales)."""
    blocks = x.reshape(*x.shape[:-1], _blocks(x.shape[-1]), -1)
    top = jnp.max(jnp.abs(blocks), -1, keepdims=True)
    share = jnp.abs(blocks) / jnp.where(top, top, 1)
    low = jnp.clip(jnp.floor(127 * share ** (1 / root)), 0, 126)
    a, b = ((low + more) / 127 for more in (0, 1))
    low += spread(share.shape, count) < (share - a**root) / (b**root - a**root)
    if root == ROOTS[1]:  # one of 0 would make the step of its parameter too large
        low = jnp.maximum(low, share > 0)
    return (jnp.sign(blocks) * low).astype(jnp.int8).reshape(x.shape), jnp.squeeze(top, -1)


def _decode(codes, scales, root):
    if codes.dtype != jnp.int8:
        return codes
    x = codes.reshape(*scales.shape, -1).astype(jnp.float32) / 127
    return (jnp.sign(x) * jnp.abs(x) ** root * scales[..., None]).reshape(codes.shape)


def spread(shape: tuple[int, ...], step: jax.Array) -> jax.Array:
    """float32 of this shape, spread evenly from 0 to 1 over elements and over steps: Roberts' R2 sequence."""
    n = jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(shape)
    n = n * jnp.uint32(3242174889) + step.astype(jnp.uint32) * jnp.uint32(2447445413)
    return (n >> 8).astype(jnp.float32) / 2**24


def add(p: jax.Array, update: jax.Array, step: jax.Array) -> jax.Array:
    """The sum in p's dtype, of bfloat16 rounded up or down in turn. step: int32, by which that turns."""
    total = p.astype(jnp.float32) + update if p.dtype == jnp.bfloat16 else p + update
    if p.dtype == jnp.bfloat16:
        more = (spread(p.shape, step) * 2**16).astype(jnp.uint32)
        bits = (jax.lax.bitcast_convert_type(total, jnp.uint32) + more) & jnp.uint32(0xFFFF0000)
        total = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return total.astype(p.dtype)


def wide(tree: Any) -> Any:
    """The tree with 16-bit floats in float32: gradients are added up, and moments kept, so."""
    short = lambda x: jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4  # noqa: E731
    return jax.tree.map(lambda x: x.astype(jnp.float32) if short(x) else x, tree)
