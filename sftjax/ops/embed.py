"""The embedding: rows of a table that is sharded over both of its dimensions."""

import functools

import jax
import jax.numpy as jnp

from sftjax.parallel import RULES, axis_size, shard_map, spec


def lookup(w: jax.Array, tokens: jax.Array, axes: tuple[str | None, ...] = ("vocab", "embed")) -> jax.Array:
    """w[tokens]: w [V, D] with the logical `axes`, tokens int32 [B, S] -> [B, S, D].

    On a mesh each device looks up its part of the width for the rows of all fsdp shards, and they exchange the parts:
    neither the table nor its gradient is ever whole. A table whose width is not shared over fsdp, a narrow factor of
    one, has nothing to exchange.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return w[tokens]
    table, rows = spec(axes), spec(("batch", "seq"))
    look = functools.partial(_shard, parts=axis_size(mesh, RULES["vocab"]), exchange=RULES["embed"] == table[1])
    return shard_map(look, (table, rows), spec(("batch", "seq", "act_embed")))(w, tokens)


def _shard(w, tokens, parts, exchange):
    fsdp, vocab = RULES["embed"], RULES["vocab"]
    if exchange:
        tokens = jax.lax.all_gather(tokens, fsdp, axis=0, tiled=True)
    if parts == 1:
        x = w[tokens]
    else:  # rows of the other shards count 0
        row = tokens - jax.lax.axis_index(vocab) * w.shape[0]
        here = (row >= 0) & (row < w.shape[0])
        x = jnp.where(here[..., None], w[jnp.where(here, row, 0)], 0)
        x = jax.lax.psum(x, vocab)
    if not exchange:
        return x
    return jax.lax.all_to_all(x, fsdp, split_axis=0, concat_axis=2, tiled=True)
