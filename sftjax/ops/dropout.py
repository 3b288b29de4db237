"""Dropout whose bits follow from a seed and a token's place in the batch, on any mesh."""

import jax
import jax.numpy as jnp
from jax.extend.random import threefry_2x32

LEVELS = 2**16  # a rate is rounded to this many: an element takes half a random word
SITES = 2**24  # the words of a token at one site are numbered below this


def seeds(rng: jax.Array, n: int) -> jax.Array:
    """uint32 [n, 2]: n seeds of a JAX key."""
    return jax.random.bits(rng, (n, 2), jnp.uint32)


def ids(shape: tuple[int, ...]) -> jax.Array:
    """int32 [B, S]: the number of each place of a batch of this shape."""
    rows, length = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    return rows * shape[1] + length


def dropout(x: jax.Array, rate: float, seed: jax.Array, ids: jax.Array, site: int = 0) -> jax.Array:
    """The array x, a share `rate` of it 0 and the others scaled so that the mean stays.

    x [B, S, D]; seed uint32 [2]; ids int32 [B, S]: a number of each token that depends on nothing but its place in the
    global batch; site: tells apart what shares a seed. The same elements are dropped however the arrays lie over
    devices. 0 <= rate < 1.
    """
    least, width = min(round(rate * LEVELS), LEVELS - 1), x.shape[-1]
    lanes = jnp.arange(-(-width // 4), dtype=jnp.uint32) + site * SITES  # of two words each

    def words(token):
        return threefry_2x32(seed, jnp.concatenate([jnp.full_like(lanes, token), lanes]))

    drawn = jax.vmap(jax.vmap(words))(ids.astype(jnp.uint32))
    halves = jax.lax.bitcast_convert_type(drawn, jnp.uint16)
    halves = halves.reshape(*ids.shape, -1)[..., :width]
    scale = jnp.asarray(LEVELS / (LEVELS - least), x.dtype)
    return jnp.where(halves >= least, x * scale, jnp.zeros_like(x))


def hashed(a: jax.Array, b: jax.Array, n: int) -> jax.Array:
    """float32 [*a.shape, n]: numbers from 0 to below 1 that follow from a and b, int32."""
    lanes = jnp.arange(-(-n // 2), dtype=jnp.uint32)  # of two words each

    def words(a, b):
        return threefry_2x32(jnp.stack([a, b]), jnp.concatenate([lanes, lanes + SITES]))

    drawn = jax.vmap(words)(a.ravel().astype(jnp.uint32), b.ravel().astype(jnp.uint32))
    drawn = drawn[:, :n].reshape(*a.shape, n)
    return (drawn >> 8).astype(jnp.float32) / 2**24
