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

    Shard i holds parts i and 2 * shards - 1 - i of 2 * shards: causal attention's work is shared.
    """
    if shards == 1:
        return np.arange(length, dtype=np.int32)
    if length % (2 * shards):
        raise MeshError(f"rows of {length} tokens do not divide into twice mesh.context={shards} parts")
    parts = np.arange(length, dtype=np.int32).reshape(2 * shards, -1)
    return np.stack([parts[:shards], parts[: shards - 1 : -1]], 1).reshape(-1)


def spread(x: jax.Array, back: bool = False) -> jax.Array:
    """[B, S, ...] with its columns in the order in which the context axis holds them; back: the inverse."""
    mesh = jax.sharding.get_abstract_mesh()
    n = 1 if mesh.empty else mesh.shape[RULES["seq"]]
    if n == 1:
        return x
    places(x.shape[1], n)  # raises where the row does not divide
    rows = P(*spec(("batch", "seq")), *(None,) * (x.ndim - 2))
    return shard_map(functools.partial(_exchange, n=n, back=back), (rows,), rows)(x)


def _exchange(x, n, back):
    """A shard's two parts of the rows, for those that it holds in the other order.

    They are 2i and 2i + 1 of 2n, or i and 2n - 1 - i: one is even, one odd, so two exchanges do.
    """
    natural_to_spread = [(p // 2, p if p < n else 2 * n - 1 - p) for p in range(2 * n)]
    moves = [pair[::-1] for pair in natural_to_spread] if back else natural_to_spread
    odd = jax.lax.axis_index(RULES["seq"]) % 2 == 1
    swapped = lambda a, b: (jnp.where(odd, b, a), jnp.where(odd, a, b))  # noqa: E731
    halves = jnp.split(x, 2, axis=1)
    even_and_odd = zip(swapped(*halves) if back else halves, (moves[::2], moves[1::2]), strict=True)
    come = [jax.lax.ppermute(half, RULES["seq"], pairs) for half, pairs in even_and_odd]
    return jnp.concatenate(come if back else swapped(*come), 1)
