"""Rows on the context axis: in which order its shards hold the tokens of a row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from sftjax.errors import MeshError
from sftjax.parallel.mesh import RULES, shard_map, spec


def places(length: int, shards: int) -> np.ndarray:
    """The place in the row of each of its columns on a mesh with `shards` shards of the row.

    Shard i holds parts i and 2 * shards - 1 - i of 2 * shards, so that each has the same share of
    causal attention's work.
    """
    if shards == 1:
        return np.arange(length, dtype=np.int32)
    if length % (2 * shards):
        raise MeshError(
            f"rows of {length} tokens do not divide into twice mesh.context={shards} parts"
        )
    parts = np.arange(length, dtype=np.int32).reshape(2 * shards, -1)
    return np.stack([parts[:shards], parts[: shards - 1 : -1]], 1).reshape(-1)


def spread(x: jax.Array) -> jax.Array:
    """[B, S, ...] with its columns in the order in which the context axis holds them."""
    return _reorder(x, _spread)


def unspread(x: jax.Array) -> jax.Array:
    """The inverse of `spread`."""
    return _reorder(x, _unspread)


def _reorder(x, shard):
    mesh = jax.sharding.get_abstract_mesh()
    n = 1 if mesh.empty else mesh.shape[RULES["seq"]]
    if n == 1:
        return x
    places(x.shape[1], n)  # raises where the row does not divide
    rows = P(*spec(("batch", "seq")), *(None,) * (x.ndim - 2))
    return shard_map(functools.partial(shard, n=n), (rows,), rows)(x)


# Of the 2n parts of a row, shard i holds 2i and 2i + 1 in the natural order, and i and 2n - 1 - i
# when spread: one of them is even, one odd, so two exchanges are all it takes.


def _exchanges(n):
    """For even parts and for odd ones: (shard when spread, shard in the natural order) of each."""
    where = [(p if p < n else 2 * n - 1 - p, p // 2) for p in range(2 * n)]
    return where[::2], where[1::2]


def _unspread(x, n):
    first, second = jnp.split(x, 2, axis=1)
    swap = jax.lax.axis_index(RULES["seq"]) % 2 == 1
    parts = jnp.where(swap, second, first), jnp.where(swap, first, second)
    return jnp.concatenate(
        [jax.lax.ppermute(x, RULES["seq"], w) for x, w in zip(parts, _exchanges(n), strict=True)], 1
    )


def _spread(x, n):
    back = [[(b, a) for a, b in w] for w in _exchanges(n)]
    parts = zip(jnp.split(x, 2, axis=1), back, strict=True)
    even, odd = (jax.lax.ppermute(x, RULES["seq"], w) for x, w in parts)
    swap = jax.lax.axis_index(RULES["seq"]) % 2 == 1
    return jnp.concatenate([jnp.where(swap, odd, even), jnp.where(swap, even, odd)], 1)
