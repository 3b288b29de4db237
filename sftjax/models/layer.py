"""One layer of the decoder: its parameters, and what it computes.

Einsum letters: b batch, s and t sequence, d width, n query heads, k key/value heads, h head width, f feed-forward
width, e experts.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from sftjax.errors import ConfigError
from sftjax.ops import dropout, moe, rope, weight
from sftjax.ops.attention import attention
from sftjax.ops.weight import gather_for_use, project
from sftjax.parallel import RULES, constrain
from sftjax.params import Param, is_param

if TYPE_CHECKING:  # it imports this file
    from sftjax.models.decoder import Config, Kind

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "tanh": jnp.tanh,
}
# Which norms each half of a layer has: of its input, of its output, of their sum.
NORMS = {"pre": [""], "post": ["_post"], "both": ["", "_post"], "residual": ["_sum"]}
SLICE = 3072  # least width of a slice of the MLP: narrower matmuls would not run at full speed


# ---- parameters ----------------------------------------------------------------------------


def norm_params(
    c: "Config",
    lead: tuple[tuple[int, ...], tuple[str | None, ...]] = ((), ()),
    shape: tuple[int, ...] | None = None,
    axes: tuple[str | None, ...] = ("norm",),
) -> dict[str, Param]:
    """Return the Params of a norm over `shape`, by default the width.

    lead: (sizes, axes) in front, of a stack of layers.
    """
    shape = (*lead[0], *(shape or (c.width,)))
    zeros, ones = jax.nn.initializers.zeros, jax.nn.initializers.ones
    p = {"scale": Param(shape, (*lead[1], *axes), zeros if c.norm == "rms_plus_one" else ones)}
    if c.norm == "layer" and c.norm_bias:
        p["b"] = Param(shape, (*lead[1], *axes), zeros)
    return p


def abstract(c: "Config", n: int, kind: "Kind") -> dict:
    """Return the Params of a stack of n layers, each with the leading axis `layers`.

    kind: that of its first layer, which all share as far as their parameters go.
    """
    normal, zeros = jax.nn.initializers.normal(c.init_std), jax.nn.initializers.zeros
    lead = ((n,), ("layers",))
    q = {"heads": c.heads, "head_dim": c.head_dim}
    kv = {"kv_heads": c.kv_heads, "head_dim": c.head_dim}

    def linear(bias, inputs, **sizes: int):
        """A product's weight, of axes `sizes`, and its bias, of axes `bias`, () for none."""
        # inputs: the axes that the product sums over.
        p = {"w": Param((n, *sizes.values()), ("layers", *sizes), normal, inputs)}
        if bias:
            p["b"] = Param((n, *(sizes[a] for a in bias)), ("layers", *bias), zeros)
        return p

    def attention() -> dict[str, Any]:
        own = {"q": q, "k": kv, "v": kv}
        parts = {x: linear(tuple(to) * c.qkv_bias, ("embed",), embed=c.width, **to) for x, to in own.items()}
        return parts | {"o": linear(("embed",) * c.out_bias, tuple(q), **q, embed=c.width)}

    attn = attention()
    if c.buckets:
        wide = jax.nn.initializers.normal(c.width**-0.5)
        attn["distances"] = Param((n, c.heads, c.buckets), ("layers", "heads", None), wide)
    if c.relative:
        attn["relative"] = Param((n, c.relative, c.width), ("layers", None, "embed"), normal)
    if c.qk_norm != "none":
        for name, sizes in (("q_norm", q), ("k_norm", kv)):
            sizes = sizes if c.qk_norm == "all" else {"head_dim": c.head_dim}
            attn[name] = norm_params(c, lead, tuple(sizes.values()), tuple(sizes))
    if c.sinks:
        attn["sinks"] = Param((n, c.heads), ("layers", "heads"), zeros)
    if c.loops > 1:
        attn["mix"] = linear(("heads",), ("head_dim",), **q)
    e = {"expert": c.experts} if c.experts else {}
    mlp = {
        "up": linear((*e, "mlp") * c.mlp_bias, ("embed",), **e, embed=c.width, mlp=c.mlp),
        "down": linear((*e, "embed") * c.mlp_bias, ("mlp",), **e, mlp=c.mlp, embed=c.width),
    }
    if c.gated:
        mlp["gate"] = linear((*e, "mlp") * c.mlp_bias, ("embed",), **e, embed=c.width, mlp=c.mlp)
    if c.experts:
        bias = ("choice",) * c.mlp_bias
        mlp["router"] = linear(bias, ("embed",), embed=c.width, choice=c.experts)
    parts = {"attn": attn, "mlp": mlp} | ({"cross": attention()} if c.cross else {})
    out = {f"{part}{end}_norm": norm_params(c, lead) for part in parts for end in NORMS[c.norms]}
    if not kind.attn_norm:
        del out["attn_norm"]
    return out | parts


@functools.lru_cache(maxsize=64)
def axes_of(config: "Config") -> dict[str, Any]:
    """The logical axes of a layer's parameters: a tree of tuples."""
    return jax.tree.map(lambda p: p.axes[1:], abstract(config, 1, config.kinds[0]), is_leaf=is_param)


# ---- forward -------------------------------------------------------------------------------


_kept = jax.checkpoint_policies
# What the forward pass of a layer keeps for the backward one, beside the layer's input. None keeps what was gathered:
# the weights of all layers at once would lie whole on every device.
REMAT = {
    "none": lambda primitive, *_, **__: primitive.name not in ("all_gather", "stop_gradient"),
    # What matmuls and attention gave, and the sums after them. The rest is cheaper to compute again than to write and
    # read: on a CPU a step takes a tenth less time than with "none".
    "dots": _kept.save_from_both_policies(
        _kept.dots_with_no_batch_dims_saveable, _kept.save_only_these_names("attention", "layer")
    ),
    "attention": _kept.save_only_these_names("attention"),
    "full": _kept.nothing_saveable,
    # As "full", with the layers' inputs and the sums after attention in the host's memory until the backward pass.
    "offload": _kept.save_and_offload_only_these_names(
        names_which_can_be_saved=(),
        names_which_can_be_offloaded=("layer",),
        offload_src="device",
        offload_dst="pinned_host",
    ),
}
SITES = ("attn", "mlp", "cross")  # of dropout in a layer
LEAST = ("full", "offload")  # of memory: these work off an MLP in slices


def remat(config: "Config", fn: Callable) -> Callable:
    """Wrap fn so that its backward pass keeps only what config.remat names."""
    kept = REMAT.get(config.remat) or getattr(_kept, config.remat, None)
    if kept is None:
        known = [n for n in dir(_kept) if not n.startswith("_")]
        raise ConfigError(f"model.remat={config.remat!r} is none of {', '.join(REMAT)}, {known}")
    return jax.checkpoint(fn, policy=kept, prevent_cse=not config.scan)


Pair = tuple[jax.Array, jax.Array]  # keys and values


class Cache(NamedTuple):
    """The keys and values of a stack, see decoder.Model.init_cache, and which of its layers is meant."""

    keys: jax.Array  # [layers, B, K, H, T]
    values: jax.Array  # [layers, B, K, T, H]
    layer: jax.Array  # int32

    def add(self, k: jax.Array, v: jax.Array, slot: jax.Array) -> tuple[Pair, Pair]:
        """The stack's and the layer's keys and values, with k and v [B, S, K, H] at `slot`."""
        k, v = k.transpose(0, 2, 3, 1)[None], v.transpose(0, 2, 1, 3)[None]
        put, layer = jax.lax.dynamic_update_slice, self.layer
        keys = put(self.keys, k.astype(self.keys.dtype), (layer, 0, 0, 0, slot))
        values = put(self.values, v.astype(self.values.dtype), (layer, 0, 0, slot, 0))
        own = functools.partial(jax.lax.dynamic_index_in_dim, index=layer, keepdims=False)
        return (keys, values), (own(keys), own(values))


def norm(config: "Config", x: jax.Array, p: dict[str, jax.Array] | None) -> jax.Array:
    """Normalise x [..., *scale.shape] in its own dtype, with statistics in float32; p None leaves it as it is."""
    if p is None:
        return x
    wide, scale = x.astype(jnp.float32), p["scale"]
    axes = tuple(range(-scale.ndim, 0))
    if config.norm == "layer":
        wide = wide - jnp.mean(wide, axis=axes, keepdims=True)
    y = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=axes, keepdims=True) + config.norm_eps)
    if config.norm == "rms":
        return y.astype(x.dtype) * scale.astype(x.dtype)
    scale = scale.astype(jnp.float32)
    y = y * (1.0 + scale if config.norm == "rms_plus_one" else scale)
    return (y + p["b"].astype(jnp.float32) if "b" in p else y).astype(x.dtype)


def _attention(config, kind, axes, p, x, ctx, kv, first):
    """Of x [B, S, D] the same shape, and its keys and values: the stack's cache when decoding.

    first: this layer's keys and values in the first pass, when in a later one.
    """
    p = gather_for_use(p, axes, config.dtype)
    q = norm(config, project("bsd,dnh->bsnh", x, p["q"]), p.get("q_norm"))
    k = norm(config, project("bsd,dkh->bskh", x, p["k"]), p.get("k_norm"))
    v = project("bsd,dkh->bskh", x, p["v"])
    if kind.rope is not None:
        q, k = (rope.rotate(a, *ctx["angles"][repr(kind.rope)]) for a in (q, k))
    q = constrain(q, "batch", "seq", "heads", None)
    k = constrain(k, "batch", "seq", "kv_heads", None)
    if kv is not None:
        kv, (k, v) = kv.add(k, v, ctx["slot"])

    how: dict[str, Any] = dict(scale=config.attn_scale or None, softcap=config.attn_softcap, causal=config.causal)
    how |= dict(sinks=p.get("sinks"), distances=p.get("distances"), furthest=config.furthest)
    how |= dict(backend=config.attention, from_cache=kv is not None)
    if config.relative:  # with the layer's own matrices
        how["relative"] = tuple(project("rd,dkh->rkh", p["relative"], p[x]) for x in "kq")
    attend: Callable = functools.partial(attention, q, **ctx["where"], **how)

    if first is None:
        out = attend(k, v, window=kind.window)
    else:
        own = attend(k, v, window=config.loop_window)
        out = _mix(p["mix"], q, attend(*first, window=kind.window), own)
    return project("bsnh,nhd->bsd", out, p["o"]), (k, v) if kv is None else kv


@jax.named_scope("cross")
def _cross(config, axes, p, x, ctx, known):
    """Attention of x [B, S, D] to the source that ctx holds; the same shape.

    known: the source's keys and values as a cache holds them, when decoding.
    """
    p, source = gather_for_use(p, axes, config.dtype), ctx["source"]
    q = constrain(project("bsd,dnh->bsnh", x, p["q"]), "batch", "seq", "heads", None)
    k, v = known or source_keys(p, source["hidden"])
    mine = {name: ctx["where"][name] for name in ("segments", "positions")}
    theirs = {f"kv_{name}": source[name] for name in mine}
    how: Any = dict(scale=config.attn_scale or None, backend=config.attention, causal=False)
    out = attention(q, k, v, **mine, **theirs, **how, from_cache=known is not None)
    return project("bsnh,nhd->bsd", out, p["o"])


def source_keys(p: dict[str, Any], hidden: jax.Array) -> Pair:
    """Keys and values [B, T, K, H] for cross attention to a source's hidden states [B, T, D]."""
    k, v = (project("bsd,dkh->bskh", hidden, p[name]) for name in "kv")
    return tuple(constrain(x, "batch", "seq", "kv_heads", None) for x in (k, v))  # type: ignore


def _mix(p, q, first, own):
    """Weigh attention to the first pass's keys against windowed attention to its own, by gates."""
    # The loop form of IQuest-Coder: this is a later pass over the same layers.
    w = weight.dense(p["w"], jnp.float32)
    gate = jnp.einsum("bsnh,nh->bsn", q.astype(jnp.float32), w)
    gate = jax.nn.sigmoid(gate + p["b"].astype(jnp.float32))[..., None].astype(q.dtype)
    return gate * first + (1 - gate) * own


def _glu(config, gate, up):
    if config.swiglu_limit:
        gate = jnp.minimum(gate, config.swiglu_limit)
        up = jnp.clip(up, -config.swiglu_limit, config.swiglu_limit)
        return (up + 1) * gate * jax.nn.sigmoid(config.swiglu_alpha * gate)
    return ACTIVATIONS[config.activation](gate) * up


@jax.named_scope("mlp")
def _mlp(config, axes, p, x, ctx):
    """Of x [B, S, D] the same shape, and moe.routing_sums (None for a dense MLP)."""
    if config.experts:
        p = gather_for_use(p, axes, config.dtype)
        logits = project("bsd,de->bse", x, p["router"])
        k = config.experts_per_token
        chosen, weights, probs = moe.route(logits, k, config.renormalise)
        y = moe.mixture(x, chosen, weights, p, functools.partial(_glu, config))
        return y, moe.routing_sums(chosen, probs, ctx["where"]["segments"] > 0)
    n = slices(config)
    if n == 1:
        return _dense(config, axes, p, x), None
    # The barriers hold two slices in flight: one is gathered, or scattered, while one is computed.
    parts: list[Any] = [weight.cut(p, axes, "mlp", i, n) for i in range(n)]
    out: Any = 0
    for i in range(n):
        out = out + jax.checkpoint(functools.partial(_dense, config, axes))(parts[i], x)
        if i + 2 < n:
            out, parts[i + 2] = jax.lax.optimization_barrier((out, parts[i + 2]))
    return out, None


def _dense(config, axes, p, x):
    p = gather_for_use(p, axes, config.dtype)
    hidden = project("bsd,df->bsf", x, p["up"])
    if config.gated:
        hidden = _glu(config, project("bsd,df->bsf", x, p["gate"]), hidden)
    else:
        hidden = ACTIVATIONS[config.activation](hidden)
    hidden = constrain(hidden, "batch", "seq", "mlp")
    return project("bsf,fd->bsd", hidden, p["down"])


def slices(config: "Config") -> int:
    """The parts in which the width of an MLP is worked off, where memory is to be saved."""
    mesh = jax.sharding.get_abstract_mesh()
    shared = not mesh.empty and mesh.shape[RULES["mlp"]] > 1  # then each device has a part anyway
    if config.remat not in LEAST or shared or config.mlp_bias:
        return 1
    most = max(config.mlp // SLICE, 1)
    return next(n for n in range(most, 0, -1) if config.mlp % n == 0)


def apply(
    config: "Config",
    kind: "Kind",
    ctx: dict[str, Any],
    x: jax.Array,
    p: dict[str, Any],
    kv: Cache | None,
    first: tuple[jax.Array, jax.Array] | None,
    seed: jax.Array | None,
) -> tuple[jax.Array, tuple[tuple[jax.Array, jax.Array] | None, dict[str, jax.Array] | None]]:
    """(x, (keys and values where they are kept, routing sums)). seed: of dropout, or None.

    first: keys and values that the layer reads besides: those of the first of several passes, or, when decoding from a
    source, the source's.
    """
    axes = axes_of(config)
    x = checkpoint_name(x, "layer")
    h = norm(config, x, p.get("attn_norm"))
    earlier = None if config.cross else first
    h, kv_out = _attention(config, kind, axes["attn"], p["attn"], h, ctx, kv, earlier)
    y = checkpoint_name(_add(config, "attn", p, ctx, x, h, seed), "layer")
    if config.cross:
        h = norm(config, y, p.get("cross_norm"))
        h = _cross(config, axes["cross"], p["cross"], h, ctx, first)
        y = checkpoint_name(_add(config, "cross", p, ctx, y, h, seed), "layer")
    h = norm(config, x if config.parallel else y, p.get("mlp_norm"))
    h, routing = _mlp(config, axes["mlp"], p["mlp"], h, ctx)
    y = _add(config, "mlp", p, ctx, y, h, seed)
    keep = kv is not None or (config.loops > 1 and first is None)
    return y, (kv_out if keep else None, routing)


def _add(config, half, p, ctx, x, h, seed):
    """The sum of a half's input x and what it computed, h."""
    if seed is not None:
        h = dropout.dropout(h, config.dropout, seed, ctx["ids"], SITES.index(half))
    h = norm(config, h, p.get(f"{half}_post_norm")) * weak(config.residual_scale)
    return norm(config, constrain(x + h, "batch", "seq", "act_embed"), p.get(f"{half}_sum_norm"))


def weak(scale: float) -> float:
    """Return the scale, and the integer 1 in place of a scale of 1.0."""
    return 1 if scale == 1 else scale  # so that x * 1 is x, whatever its dtype
