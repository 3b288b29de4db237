"""Dropout whose bits follow from a key and a token's place in the batch, on any mesh."""

import jax
import jax.numpy as jnp

LEVELS = 2**16  # a rate is rounded to this many: two elements share one random word


def dropout(x, rate: float, key, ids):
    """x with a share `rate` of its elements 0 and the others scaled so that the mean stays.

    x [B, S, D]; key: a JAX key of this use; ids int32 [B, S]: a number of each token that depends
    on nothing but its place in the global batch. The same elements are dropped however the arrays
    lie over devices. 0 <= rate < 1.
    """
    least = min(round(rate * LEVELS), LEVELS - 1)
    width = x.shape[-1]

    def word(token):
        return jax.random.bits(jax.random.fold_in(key, token), (-(-width // 2),), jnp.uint32)

    words = jax.vmap(jax.vmap(word))(ids)
    halves = jax.lax.bitcast_convert_type(words, jnp.uint16)
    halves = halves.reshape(*ids.shape, -1)[..., :width]
    scale = jnp.asarray(LEVELS / (LEVELS - least), x.dtype)
    return jnp.where(halves >= least, x * scale, jnp.zeros_like(x))


def ids(shape) -> jax.Array:
    """int32 [B, S]: the number of each place of a batch of this shape."""
    rows, length = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    return rows * shape[1] + length
