"""Mixture of experts: top-k routing without dropped tokens, and a grouped matmul.

Einsum letters: t tokens, k choices of a token, e experts, d width, f feed-forward width.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sftjax.ops import weight
from sftjax.parallel import RULES, shard_map, spec
from sftjax.parallel.gather import in_use


def route(logits: jax.Array, k: int, renormalise: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(experts int32 [..., k], their weights float32 [..., k], probabilities float32 [..., E]).

    renormalise: the weights of a token's choices add up to 1.
    """
    probs = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    weights, chosen = jax.lax.top_k(probs, k)
    if renormalise:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return chosen, weights, probs


def routing_sums(chosen: jax.Array, probs: jax.Array, real: jax.Array) -> dict[str, jax.Array]:
    """What the load-balancing loss is made of, as sums over the tokens where `real` is True.

    Returns: dict of choices [E] (how often each expert is chosen), probs [E], tokens.
    """
    E, real = probs.shape[-1], real.astype(jnp.float32)
    choices = jnp.sum(jax.nn.one_hot(chosen, E) * real[..., None, None], axis=(0, 1, 2))
    return {"choices": choices, "probs": jnp.sum(probs * real[..., None], axis=(0, 1)), "tokens": jnp.sum(real)}


def load_balance(sums: dict[str, jax.Array]) -> jax.Array:
    """The Switch Transformer's loss, experts * sum of (share of choices * mean probability).

    As transformers computes it, over all layers at once. It is top-k where routing is even.
    """
    tokens = jnp.maximum(sums["tokens"], 1.0)
    shares = (sums["choices"] / tokens) * (sums["probs"] / tokens)
    return jnp.sum(shares) * shares.shape[-1]


def mixture(
    x: jax.Array,
    chosen: jax.Array,
    weights: jax.Array,
    p: dict[str, Any],
    glu: Callable[[jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    """The weighted sum of the chosen experts' outputs. x [B, S, D] -> [B, S, D].

    chosen, weights [B, S, k]. p: gate and up {"w" [E, D, F], "b" [E, F]}, down {"w" [E, F, D],
    "b" [E, D]}, gathered for use, biases only where the model has them. glu(gate, up) is the activation.

    On a mesh each shard of the `expert` axis computes its own experts for the tokens of all of them, and each shard of
    `tensor` its part of F; the results are added up.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return _experts(x, chosen, weights, p, first=0, glu=glu)
    tokens = spec(("batch", "seq", None))
    up = {"w": ("expert", "embed", "mlp"), "b": ("expert", "mlp")}
    axes = {"gate": up, "up": up, "down": {"w": ("expert", "mlp", "embed"), "b": ("expert", "embed")}}
    p = {n: p[n] for n in axes}
    specs = weight.map_arrays(lambda _, a: spec(in_use(a)), p, {n: {k: axes[n][k] for k in p[n]} for n in p})
    return shard_map(functools.partial(_shard, glu=glu), (tokens,) * 3 + (specs,), tokens)(x, chosen, weights, p)


def _shard(x, chosen, weights, p, glu):
    experts, tensor = RULES["expert"], RULES["mlp"]
    x, chosen, weights = (jax.lax.all_gather(a, experts, axis=0, tiled=True) for a in (x, chosen, weights))
    if "b" in p["down"]:  # once, of all shards of F
        once = jnp.where(jax.lax.axis_index(tensor) == 0, p["down"]["b"], 0)
        p = p | {"down": {"w": p["down"]["w"], "b": once}}
    first = jax.lax.axis_index(experts) * p["gate"]["w"].shape[0]
    y = _experts(x, chosen, weights, p, first, glu)
    y = jax.lax.psum_scatter(y, experts, scatter_dimension=0, tiled=True)
    return jax.lax.psum(y, tensor)


def _experts(x, chosen, weights, p, first, glu):
    """The experts `first`, first + 1, ... of p; choices of any other count nothing."""
    E, (B, S, D), k = p["gate"]["w"].shape[0], x.shape, chosen.shape[-1]
    expert = chosen.reshape(-1) - first
    here = (expert >= 0) & (expert < E)
    expert = jnp.where(here, expert, E)
    order = jnp.argsort(expert, stable=True)  # choices grouped by expert, the others' last
    sizes = jnp.bincount(expert, length=E + 1)[:E].astype(jnp.int32)
    rows = x.reshape(-1, D)[order // k]
    row_expert = jnp.minimum(expert[order], E - 1)

    live = here[order][:, None]  # the other rows may come back as anything, also in the backward

    def grouped(rows, p):
        y = weight.ragged(jnp.where(live, rows, 0), p["w"], sizes)
        y = y + p["b"].astype(y.dtype)[row_expert] if "b" in p else y
        return jnp.where(live, y, 0)

    y = grouped(glu(grouped(rows, p["gate"]), grouped(rows, p["up"])), p["down"])
    y = y.astype(jnp.float32)[jnp.argsort(order)].reshape(B, S, k, D) * weights[..., None]
    return jnp.sum(y, axis=2).astype(x.dtype)
