"""A vocabulary that grows: added tokens get rows in the embedding and in the head.

A new row is drawn from the normal distribution with the mean and the covariance of the old rows, each table's own
(Hewitt, "Initializing New Word Embeddings for Pretrained Language Models", 2021): a new token is as likely as an old
one is on average, and no two of them are alike.
"""

import functools
import zlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from sftjax import parallel
from sftjax.errors import ModelError
from sftjax.models.decoder import Model
from sftjax.ops.weight import is_node

AT_A_TIME = 64  # new rows whose coefficients, one for each old row, exist at a time


def grow(
    model: Model, params: dict[str, Any], size: int, seed: int = 0, *, first: int | None = None
) -> tuple[Model, dict[str, Any]]:
    """(model, params) with a vocabulary of `size` tokens; nothing given is changed.

    first: the first new token; the default is the model's size. A smaller one takes rows that the checkpoint holds in
    reserve: rows `first` to `size` - 1 are drawn, from the statistics of those before them, and the vocabulary stays at
    least what it was. A new row follows from the seed, the table and its token, whatever the padding; it costs one pass
    over the table, in float32. ModelError where the vocabulary would shrink or have a gap.
    """
    vocab = model.config.vocab
    first = vocab if first is None else first
    if not 0 < first <= min(vocab, size):
        raise ModelError(
            f"vocab.grow: new tokens {first} to {size - 1} for a model of {vocab} tokens; they must"
            " follow on old ones, and there cannot be fewer than before"
        )
    model = model.replace(vocab=max(vocab, size))
    if "vocab_bias" in params:  # new tokens add nothing to their logits
        bias = params["vocab_bias"]["b"]
        bias = jnp.pad(bias[:first], (0, max(model.config.rows, len(bias)) - first))
        params = params | {"vocab_bias": {"b": bias}}
    if size == first:
        return model, params
    tables: dict[str, Any] = {n: model.abstract[n] for n in ("embed", "head") if n in params}
    for name in tables:
        if is_node(w := params[name]["w"]):
            raise ModelError(f"vocab.grow: {name}/w is a {type(w).__name__}; grow the plain table before")
    now, shardings = getattr(params["embed"]["w"], "sharding", None), dict.fromkeys(tables)
    if isinstance(now, NamedSharding):
        shardings = parallel.param_shardings(now.mesh, tables)
    out = dict(params)
    for name in tables:
        draw = functools.partial(_grow, first=first, size=size, rows=model.config.rows)
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
        out[name] = jax.jit(draw, out_shardings=shardings[name])(params[name], key)
    return model, out


def _grow(table, key, *, first, size, rows):
    """{"w": [old rows, D]} -> {"w": [rows, D]}, those from `first` to `size` - 1 drawn."""
    w = table["w"]

    def draw(token):
        # mean + z @ (w - mean) / sqrt(n - 1), as one combination of the rows of w.
        z = jax.random.normal(jax.random.fold_in(key, token), (first,))
        z = (z - jnp.mean(z)) / max(first - 1, 1) ** 0.5 + 1 / first
        z = jnp.pad(z, (0, len(w) - first))
        return jnp.einsum("v,vd->d", z, w.astype(jnp.float32), precision="highest")

    new = jax.lax.map(draw, jnp.arange(first, size), batch_size=AT_A_TIME)
    w = jnp.pad(w, ((0, rows - len(w)), (0, 0)))
    return {"w": jax.lax.dynamic_update_slice(w, new.astype(w.dtype), (first, 0))}
