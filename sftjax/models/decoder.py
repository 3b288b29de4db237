"""The decoder-only transformer: every family is a Config of this one file.

Layers of one kind are stacked on a leading `layers` axis and run under lax.scan. `split` cuts the
stack at given layers, so that a frozen prefix is a stack of its own and costs no backward pass.

Einsum letters: b batch, s and t sequence, d width, n query heads, k key/value heads, h head width,
f feed-forward width, v vocabulary.
"""

import dataclasses
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp

from sftjax.ops import attention as attention_lib
from sftjax.ops import norms, rope
from sftjax.ops.linear import project
from sftjax.params import Param
from sftjax.sharding import constrain

ACTIVATIONS = {"silu": jax.nn.silu}


@dataclasses.dataclass(frozen=True)
class Config:
    # what the model is
    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    max_positions: int = 2048
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: tuple[tuple[str, Any], ...] = ()
    tied: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    activation: str = "silu"
    init_std: float = 0.02
    # how it is run
    dtype: str = "float32"  # of activations and matmuls
    remat: str = "none"
    attention: str = "blockwise"
    scan: bool = True
    split: tuple[int, ...] = ()


def stacks(config) -> dict[str, int]:
    """{name: number of layers} of each stack in order; the name is its range: "0-11"."""
    cuts = [0, *config.split, config.layers]
    if any(a >= b for a, b in zip(cuts, cuts[1:], strict=False)):
        raise ValueError(
            f"model.split={config.split} must rise strictly between 0 and {config.layers} layers"
        )
    return {f"{a}-{b - 1}": b - a for a, b in zip(cuts, cuts[1:], strict=False)}


# ---- parameters ----------------------------------------------------------------------------


def abstract(config: Config) -> dict:
    """The tree of Params."""
    c = config
    normal = jax.nn.initializers.normal(c.init_std)
    zeros, ones = jax.nn.initializers.zeros, jax.nn.initializers.ones

    def layer(n: int) -> dict:
        def linear(shape, axes, bias=()):
            p = {"w": Param((n, *shape), ("layers", *axes), normal)}
            if bias:
                size = dict(zip(axes, shape, strict=True))
                p["b"] = Param((n, *(size[a] for a in bias)), ("layers", *bias), zeros)
            return p

        def norm():
            return {"scale": Param((n, c.width), ("layers", "norm"), ones)}

        qkv = (c.width, c.heads, c.head_dim), ("embed", "heads", "head_dim")
        kv = (c.width, c.kv_heads, c.head_dim), ("embed", "kv_heads", "head_dim")
        up = (c.width, c.mlp), ("embed", "mlp")
        return {
            "attn_norm": norm(),
            "attn": {
                "q": linear(*qkv, ("heads", "head_dim") if c.qkv_bias else ()),
                "k": linear(*kv, ("kv_heads", "head_dim") if c.qkv_bias else ()),
                "v": linear(*kv, ("kv_heads", "head_dim") if c.qkv_bias else ()),
                "o": linear(
                    (c.heads, c.head_dim, c.width),
                    ("heads", "head_dim", "embed"),
                    ("embed",) if c.out_bias else (),
                ),
            },
            "mlp_norm": norm(),
            "mlp": {
                "gate": linear(*up, ("mlp",) if c.mlp_bias else ()),
                "up": linear(*up, ("mlp",) if c.mlp_bias else ()),
                "down": linear(
                    (c.mlp, c.width), ("mlp", "embed"), ("embed",) if c.mlp_bias else ()
                ),
            },
        }

    tree = {
        "embed": {"w": Param((c.vocab, c.width), ("vocab", "embed"), normal)},
        "layers": {name: layer(n) for name, n in stacks(c).items()},
        "norm": {"scale": Param((c.width,), ("norm",), ones)},
    }
    if not c.tied:
        tree["head"] = {"w": Param((c.vocab, c.width), ("vocab", "embed"), normal)}
    return tree


def train_flops(config: Config, trainable: dict):
    """A function (tokens, trained_tokens, pairs) -> model FLOPs of one training step.

    Forward 2 FLOPs per matmul weight and token; backward 2 more for the activations, down to the
    first trained parameter, and 2 more for each trained weight. The vocabulary projection counts
    for trained tokens only. pairs: (query, key) pairs that see each other, summed over documents;
    each costs 4 * heads * head_dim FLOPs a layer forward and twice that backward.
    trainable: tree of bools like the parameters.
    """
    c = config
    reached = any(jax.tree.leaves(trainable["embed"]))
    per_token, per_pair = 0.0, 0.0
    for (name, n), tree in zip(stacks(c).items(), abstract(c)["layers"].values(), strict=True):
        on = trainable["layers"][name]
        here = reached or any(jax.tree.leaves(on))
        for group in ("attn", "mlp"):
            for key, p in tree[group].items():
                weights = 1
                for size in p["w"].shape:
                    weights *= size
                per_token += weights * (2 + 2 * here + 2 * bool(on[group][key]["w"]))
        per_pair += 4 * c.heads * c.head_dim * n * (3 if here else 1)
        reached = here
    head_on = trainable["embed" if c.tied else "head"]["w"]
    head = c.vocab * c.width * (4 + 2 * bool(head_on))
    return lambda tokens, trained, pairs: per_token * tokens + head * trained + per_pair * pairs


# ---- forward -------------------------------------------------------------------------------


REMAT = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def _remat(config, body):
    if config.remat == "none":
        return body
    policy = REMAT.get(config.remat) or getattr(jax.checkpoint_policies, config.remat, None)
    if policy is None:
        known = [n for n in dir(jax.checkpoint_policies) if not n.startswith("_")]
        raise ValueError(f"model.remat={config.remat!r} is none of none, dots, full, {known}")
    return jax.checkpoint(body, policy=policy, prevent_cse=not config.scan)


def _attention(config, p, x, ctx, kv):
    """x [B, S, D] -> [B, S, D], and this layer's updated keys and values when decoding."""
    q = project("bsd,dnh->bsnh", x, p["q"])
    k = project("bsd,dkh->bskh", x, p["k"])
    v = project("bsd,dkh->bskh", x, p["v"])
    q = constrain(rope.rotate(q, *ctx["angles"]), "batch", "seq", "heads", None)
    k = constrain(rope.rotate(k, *ctx["angles"]), "batch", "seq", "kv_heads", None)
    if kv is not None:
        rows = jnp.arange(x.shape[0])[:, None]
        kv = tuple(
            old.at[rows, ctx["slots"]].set(new.astype(old.dtype))
            for old, new in zip(kv, (k, v), strict=True)
        )
        k, v = kv
    out = attention_lib.attention(
        q,
        k,
        v,
        segments=ctx["segments"],
        positions=ctx["positions"],
        kv_segments=ctx["kv_segments"],
        kv_positions=ctx["kv_positions"],
        backend=config.attention,
    )
    return project("bsnh,nhd->bsd", out, p["o"]), kv


def _mlp(config, p, x):
    gate = ACTIVATIONS[config.activation](project("bsd,df->bsf", x, p["gate"]))
    hidden = constrain(gate * project("bsd,df->bsf", x, p["up"]), "batch", "seq", "mlp")
    return project("bsf,fd->bsd", hidden, p["down"])


def _layer(config, ctx, x, p, kv):
    h = norms.rms_norm(x, p["attn_norm"]["scale"], config.norm_eps)
    h, kv = _attention(config, p["attn"], h, ctx, kv)
    x = constrain(x + h, "batch", "seq", "act_embed")
    h = norms.rms_norm(x, p["mlp_norm"]["scale"], config.norm_eps)
    x = constrain(x + _mlp(config, p["mlp"], h), "batch", "seq", "act_embed")
    return x, kv


def forward(config: Config, params, tokens, positions, segments, cache=None):
    """Hidden states after the final norm, [B, S, D], and the updated cache (None without one).

    tokens, positions, segments: int32 [B, S]. Segment 0 is padding.
    """
    x = params["embed"]["w"][tokens].astype(config.dtype)
    x = constrain(x, "batch", "seq", "act_embed")
    freqs = rope.frequencies(config.rope_theta, config.head_dim, config.rope_scaling)
    ctx = {
        "positions": positions,
        "segments": segments,
        "kv_positions": None,
        "kv_segments": None,
        "angles": rope.angles(positions, freqs),
    }
    if cache is not None:
        cache = _write_places(cache, positions, segments)
        ctx |= {k: cache[k] for k in ("slots", "kv_positions", "kv_segments")}

    def body(x, xs):
        p, kv = xs
        return _layer(config, ctx, x, p, kv)

    body = _remat(config, body)
    new_kv = {}
    for name, n in stacks(config).items():
        xs = (params["layers"][name], None if cache is None else cache["kv"][name])
        x, new_kv[name] = jax.lax.scan(body, x, xs, unroll=1 if config.scan else n)
    x = norms.rms_norm(x, params["norm"]["scale"], config.norm_eps)
    return x, None if cache is None else cache | {"kv": new_kv}


def init_cache(config: Config, batch: int, length: int) -> dict:
    """An empty key/value cache for `length` positions; `index` is where each row writes next."""
    shape = (batch, length, config.kv_heads, config.head_dim)
    kv = {
        name: (jnp.zeros((n, *shape), config.dtype), jnp.zeros((n, *shape), config.dtype))
        for name, n in stacks(config).items()
    }
    empty = jnp.zeros((batch, length), jnp.int32)
    return {
        "kv": kv,
        "kv_positions": empty,
        "kv_segments": empty,
        "index": jnp.zeros((batch,), jnp.int32),
    }


def _write_places(cache, positions, segments):
    """Record where the new tokens go. Right-padding (segment 0) is overwritten by later tokens."""
    rows = jnp.arange(positions.shape[0])[:, None]
    slots = cache["index"][:, None] + jnp.arange(positions.shape[1])
    return cache | {
        "slots": slots,
        "kv_positions": cache["kv_positions"].at[rows, slots].set(positions),
        "kv_segments": cache["kv_segments"].at[rows, slots].set(segments),
        "index": cache["index"] + jnp.sum(segments > 0, axis=1),
    }


# ---- the record users hold -----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Model:
    """Config, abstract parameters and pure functions; holds no arrays.

    source: what the weights came from (a Hugging Face directory's facts), for export.
    """

    config: Config
    source: Any = dataclasses.field(default=None, compare=False)

    @cached_property
    def abstract(self) -> dict:
        return abstract(self.config)

    def hidden(self, params, batch):
        """[B, S, D] of a Batch dict (tokens; positions and segments default to one document)."""
        tokens = batch["tokens"]
        positions = batch.get("positions")
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        segments = batch.get("segments")
        if segments is None:
            segments = jnp.ones_like(tokens)
        return forward(self.config, params, tokens, positions, segments)[0]

    def head(self, params):
        """The vocabulary projection, [V, D]."""
        return params["embed" if self.config.tied else "head"]["w"]

    def logits(self, params, hidden):
        """float32 [..., V]; for people, sampling and tests: training never forms [B, S, V]."""
        w = self.head(params).astype(hidden.dtype)
        return jnp.einsum("...d,vd->...v", hidden, w, preferred_element_type=jnp.float32)

    def apply(self, params, batch):
        """float32 logits [B, S, V] of a Batch dict; only "tokens" is required."""
        return self.logits(params, self.hidden(params, batch))

    def init_cache(self, batch: int, length: int):
        return init_cache(self.config, batch, length)

    def decode(self, params, cache, tokens, positions, segments):
        """(hidden [B, S, D], cache) with the tokens appended to the cache."""
        x, cache = forward(self.config, params, tokens, positions, segments, cache)
        cache.pop("slots")
        return x, cache

    def replace(self, **changes) -> "Model":
        """The same model run another way: dtype, remat, attention, scan, split."""
        return Model(dataclasses.replace(self.config, **changes), self.source)
