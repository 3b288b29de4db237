"""The decoder-only transformer: every family is a Config of this one file.

Layers of one kind are stacked on a leading `layers` axis and run under lax.scan; where kinds
alternate (local and global attention), one step of the scan runs a whole period. `split` cuts the
stack at given layers, so that a frozen prefix is a stack of its own and costs no backward pass.

Einsum letters: b batch, s and t sequence, d width, n query heads, k key/value heads, h head width,
f feed-forward width, e experts, v vocabulary.
"""

import dataclasses
import functools
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from sftjax.ops import moe, norms, rope
from sftjax.ops.attention import attention
from sftjax.ops.linear import project
from sftjax.ops.rope import Rope
from sftjax.params import Param, is_param
from sftjax.sharding import RULES, constrain, part, shard_map, spread, stored, unspread, whole

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
}
PERIOD = 8  # the longest alternation of kinds that is looked for


@dataclasses.dataclass(frozen=True)
class Kind:
    """What may differ between the layers of one model."""

    window: int = 0  # a token sees itself and window-1 before it; 0 = all before it
    rope: Rope | None = Rope()  # None: no rotation


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
    kinds: tuple[Kind, ...] = (Kind(),)  # of the layers in order, repeated to the last
    loops: int = 1  # times the layers are run; see _mix for what later passes attend to
    loop_window: int = 0
    norm: str = "rms"  # rms | rms_plus_one (the scale is stored less 1) | layer
    norm_eps: float = 1e-5
    norms: str = "pre"  # before each half of a layer | post: after it | both
    qk_norm: str = "none"  # none | head: over each head | all: over all heads at once
    parallel: bool = False  # attention and MLP both read the layer's input
    tied: bool = False
    learned_positions: bool = False
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float = 0.0
    qkv_bias: bool = False
    out_bias: bool = False
    attn_scale: float = 0.0  # of the scores; 0 = head_dim ** -0.5
    attn_softcap: float = 0.0
    sinks: bool = False
    mlp_bias: bool = False
    gated: bool = True
    activation: str = "silu"
    swiglu_alpha: float = 0.0  # gpt-oss: (up + 1) * gate * sigmoid(alpha * gate), both clamped
    swiglu_limit: float = 0.0
    experts: int = 0  # 0 = a dense MLP
    experts_per_token: int = 0
    renormalise: bool = True  # the weights of a token's experts add up to 1
    init_std: float = 0.02
    # how it is run
    dtype: str = "float32"  # of activations and matmuls
    remat: str = "none"
    attention: str = "blockwise"
    scan: bool = True
    split: tuple[int, ...] = ()
    vocab_multiple: int = 1  # the embedding has rows for a multiple of this; the rest is never used

    @property
    def rows(self) -> int:
        """Rows of the embedding and the head."""
        return -(-self.vocab // self.vocab_multiple) * self.vocab_multiple


def _kinds(config) -> list[Kind]:
    return [config.kinds[i % len(config.kinds)] for i in range(config.layers)]


def stacks(config) -> dict[str, int]:
    """{name: number of layers} of each stack in order; the name is its range: "0-11"."""
    cuts = [0, *config.split, config.layers]
    if any(a >= b for a, b in zip(cuts, cuts[1:], strict=False)):
        raise ValueError(
            f"model.split={config.split} must rise strictly between 0 and {config.layers} layers"
        )
    kinds, out = _kinds(config), {}
    for start, stop in zip(cuts, cuts[1:], strict=False):
        while start < stop:
            n = max(_run(kinds[start:stop], p) for p in range(1, PERIOD + 1))
            out[f"{start}-{start + n - 1}"] = n
            start += n
    return out


def _run(kinds, period) -> int:
    """How many of the first layers are whole repeats of a period (at least two of a longer one)."""
    n = period
    while kinds[n : n + period] == kinds[:period]:
        n += period
    return n if period == 1 or period < n <= len(kinds) else 1


def period(config, name) -> list[Kind]:
    """The kinds of the first layers of a stack, of which all its layers are repeats."""
    start, stop = map(int, name.split("-"))
    kinds = _kinds(config)[start : stop + 1]
    return kinds[: next(p for p in range(1, len(kinds) + 1) if _run(kinds, p) == len(kinds))]


# ---- parameters ----------------------------------------------------------------------------


def _norm_params(c, lead, shape=None, axes=("norm",)):
    """lead: (sizes, axes) in front, of a stack of layers."""
    shape = (*lead[0], *(shape or (c.width,)))
    zeros, ones = jax.nn.initializers.zeros, jax.nn.initializers.ones
    p = {"scale": Param(shape, (*lead[1], *axes), zeros if c.norm == "rms_plus_one" else ones)}
    if c.norm == "layer":
        p["b"] = Param(shape, (*lead[1], *axes), zeros)
    return p


def _layer_params(c, n: int) -> dict:
    normal, zeros = jax.nn.initializers.normal(c.init_std), jax.nn.initializers.zeros
    lead = ((n,), ("layers",))

    def linear(bias, **sizes):
        """sizes: the weight's axes in order; bias: those of the bias, () for none."""
        p = {"w": Param((n, *sizes.values()), ("layers", *sizes), normal)}
        if bias:
            p["b"] = Param((n, *(sizes[a] for a in bias)), ("layers", *bias), zeros)
        return p

    q = {"heads": c.heads, "head_dim": c.head_dim}
    kv = {"kv_heads": c.kv_heads, "head_dim": c.head_dim}
    attn = {
        "q": linear(tuple(q) * c.qkv_bias, embed=c.width, **q),
        "k": linear(tuple(kv) * c.qkv_bias, embed=c.width, **kv),
        "v": linear(tuple(kv) * c.qkv_bias, embed=c.width, **kv),
        "o": linear(("embed",) * c.out_bias, **q, embed=c.width),
    }
    if c.qk_norm != "none":
        for name, sizes in (("q_norm", q), ("k_norm", kv)):
            sizes = sizes if c.qk_norm == "all" else {"head_dim": c.head_dim}
            attn[name] = _norm_params(c, lead, tuple(sizes.values()), tuple(sizes))
    if c.sinks:
        attn["sinks"] = Param((n, c.heads), ("layers", "heads"), zeros)
    if c.loops > 1:
        attn["mix"] = linear(("heads",), **q)
    e = {"expert": c.experts} if c.experts else {}
    mlp = {
        "up": linear((*e, "mlp") * c.mlp_bias, **e, embed=c.width, mlp=c.mlp),
        "down": linear((*e, "embed") * c.mlp_bias, **e, mlp=c.mlp, embed=c.width),
    }
    if c.gated:
        mlp["gate"] = linear((*e, "mlp") * c.mlp_bias, **e, embed=c.width, mlp=c.mlp)
    if c.experts:
        mlp["router"] = linear(("choice",) * c.mlp_bias, embed=c.width, choice=c.experts)
    names = {"pre": [""], "post": ["_post"], "both": ["", "_post"]}[c.norms]
    out = {f"{half}{n}_norm": _norm_params(c, lead) for half in ("attn", "mlp") for n in names}
    return out | {"attn": attn, "mlp": mlp}


def abstract(config: Config) -> dict:
    """The tree of Params."""
    c, normal = config, jax.nn.initializers.normal(config.init_std)
    tree = {
        "embed": {"w": Param((c.rows, c.width), ("vocab", "embed"), normal)},
        "layers": {name: _layer_params(c, n) for name, n in stacks(c).items()},
        "norm": _norm_params(c, ((), ())),
    }
    if c.learned_positions:
        tree["positions"] = {"w": Param((c.max_positions, c.width), (None, "embed"), normal)}
    if not c.tied:
        tree["head"] = {"w": Param((c.rows, c.width), ("vocab", "embed"), normal)}
    return tree


# ---- forward -------------------------------------------------------------------------------


REMAT = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def _remat(config, layer):
    if config.remat == "none":
        return layer
    policy = REMAT.get(config.remat) or getattr(jax.checkpoint_policies, config.remat, None)
    if policy is None:
        known = [n for n in dir(jax.checkpoint_policies) if not n.startswith("_")]
        raise ValueError(f"model.remat={config.remat!r} is none of none, dots, full, {known}")
    return jax.checkpoint(layer, policy=policy, prevent_cse=not config.scan)


def _norm(config, x, p):
    if p is None:
        return x
    if config.norm == "layer":
        return norms.layer_norm(x, p["scale"], p["b"], config.norm_eps)
    return norms.rms_norm(x, p["scale"], config.norm_eps, float(config.norm == "rms_plus_one"))


def _attention(config, kind, p, x, ctx, kv, first):
    """x [B, S, D] -> [B, S, D], and this layer's keys and values, the whole cache when decoding.

    first: this layer's keys and values in the first pass, when in a later one.
    """
    q = _norm(config, project("bsd,dnh->bsnh", x, p["q"]), p.get("q_norm"))
    k = _norm(config, project("bsd,dkh->bskh", x, p["k"]), p.get("k_norm"))
    v = project("bsd,dkh->bskh", x, p["v"])
    if kind.rope is not None:
        q, k = (rope.rotate(a, *ctx["angles"][kind.rope]) for a in (q, k))
    q = constrain(q, "batch", "seq", "heads", None)
    k = constrain(k, "batch", "seq", "kv_heads", None)
    if kv is not None:
        rows = jnp.arange(x.shape[0])[:, None]
        k, v = (
            old.at[rows, ctx["slots"]].set(new.astype(old.dtype))
            for old, new in zip(kv, (k, v), strict=True)
        )

    how = dict(softcap=config.attn_softcap, scale=config.attn_scale or None, sinks=p.get("sinks"))
    attend = functools.partial(attention, q, **ctx["where"], **how, backend=config.attention)

    if first is None:
        out = attend(k, v, window=kind.window)
    else:
        own = attend(k, v, window=config.loop_window)
        out = _mix(p["mix"], q, attend(*first, window=kind.window), own)
    return project("bsnh,nhd->bsd", out, p["o"]), (k, v)


def _mix(p, q, first, own):
    """A later pass over the same layers: each head's gate weighs its attention to the first pass's
    keys against windowed attention to its own (IQuest-Coder's loop form)."""
    gate = jnp.einsum("bsnh,nh->bsn", q.astype(jnp.float32), p["w"].astype(jnp.float32))
    gate = jax.nn.sigmoid(gate + p["b"].astype(jnp.float32))[..., None].astype(q.dtype)
    return gate * first + (1 - gate) * own


def _glu(config, gate, up):
    if config.swiglu_limit:
        gate = jnp.minimum(gate, config.swiglu_limit)
        up = jnp.clip(up, -config.swiglu_limit, config.swiglu_limit)
        return (up + 1) * gate * jax.nn.sigmoid(config.swiglu_alpha * gate)
    return ACTIVATIONS[config.activation](gate) * up


def _mlp(config, p, x, ctx):
    """x [B, S, D] -> [B, S, D], and moe.routing_sums (None for a dense MLP)."""
    if config.experts:
        logits = project("bsd,de->bse", x, p["router"])
        k = config.experts_per_token
        chosen, weights, probs = moe.route(logits, k, config.renormalise)
        y = moe.mixture(x, chosen, weights, p, functools.partial(_glu, config))
        return y, moe.routing_sums(chosen, probs, ctx["where"]["segments"] > 0)
    hidden = project("bsd,df->bsf", x, p["up"])
    if config.gated:
        hidden = _glu(config, project("bsd,df->bsf", x, p["gate"]), hidden)
    else:
        hidden = ACTIVATIONS[config.activation](hidden)
    hidden = constrain(hidden, "batch", "seq", "mlp")
    return project("bsf,fd->bsd", hidden, p["down"]), None


def _layer(config, kind, ctx, x, p, kv, first):
    """(x, (keys and values where they are kept, routing sums))."""
    h, kv_out = _attention(
        config, kind, p["attn"], _norm(config, x, p.get("attn_norm")), ctx, kv, first
    )
    h = _norm(config, h, p.get("attn_post_norm")) * _weak(config.residual_scale)
    y = constrain(x + h, "batch", "seq", "act_embed")
    h, routing = _mlp(
        config, p["mlp"], _norm(config, x if config.parallel else y, p.get("mlp_norm")), ctx
    )
    h = _norm(config, h, p.get("mlp_post_norm")) * _weak(config.residual_scale)
    y = constrain(y + h, "batch", "seq", "act_embed")
    keep = kv is not None or (config.loops > 1 and first is None)
    return y, (kv_out if keep else None, routing)


def _weak(scale):
    return 1 if scale == 1 else scale  # so that x * 1 is x, whatever its dtype


def _stack(config, name, ctx, x, xs):
    """Run the layers of one stack. xs: (params, kv, first), each leaf [n, ...] or None.

    On a mesh with fsdp, over shards of rows: so that it is said here, not left to the partitioner,
    where weights are gathered and their gradients scattered.
    """
    _, kv, first = xs
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape[RULES["embed"]] == 1 or kv is not None:
        return _scan(config, name, ctx, x, xs)
    rows, apart = RULES["batch"], {*RULES["batch"], RULES["embed"]}
    params = jax.tree.map(lambda p: part(p.axes, apart), _layer_params(config, 1), is_leaf=is_param)
    kept = P(None, rows)

    def run(ctx, x, xs):
        x, (kv, routing) = _scan(config, name, ctx, x, xs)
        return x, (kv, jax.tree.map(lambda a: jax.lax.psum(a, rows), routing))

    return shard_map(
        run, (P(rows), P(rows), (params, None, kept)), (P(rows), (kept, P())), axes=apart
    )(ctx, x, xs)


def _scan(config, name, ctx, x, xs):
    kinds, n = period(config, name), stacks(config)[name]
    p = len(kinds)
    axes = jax.tree.map(lambda a: a.axes[1:], _layer_params(config, n), is_leaf=is_param)

    def layer(j, x, xs):
        # The group's slice is taken in here, so that remat keeps the group and not its slices.
        params, *rest = jax.tree.map(lambda a: a[j], xs) if p > 1 else xs
        return _layer(config, kinds[j], ctx, x, whole(params, axes, config.dtype), *rest)

    def body(x, xs):
        outs = []
        for j in range(p):
            x, out = _remat(config, functools.partial(layer, j))(x, xs)
            outs.append(out)
        return x, jax.tree.map(lambda *a: jnp.stack(a), *outs) if p > 1 else outs[0]

    if p > 1:
        xs = jax.tree.map(lambda a: a.reshape(n // p, p, *a.shape[1:]), xs)
    x, out = jax.lax.scan(body, x, xs, unroll=1 if config.scan else n // p)
    if p > 1:
        out = jax.tree.map(lambda a: a.reshape(n, *a.shape[2:]), out)
    return x, out


def forward(config: Config, params, tokens, positions, segments, cache=None):
    """(hidden states after the final norm [B, S, D], updated cache, moe.routing_sums).

    tokens, positions, segments: int32 [B, S]. Segment 0 is padding. The cache is None without one;
    the routing sums, over all layers, are None for a dense model.
    """
    if cache is None:
        tokens, positions, segments = map(spread, (tokens, positions, segments))
    x = stored(params["embed"]["w"], ("vocab", "embed"))[tokens].astype(config.dtype)
    if config.embed_scale != 1:
        x = x * jnp.asarray(config.embed_scale, x.dtype)
    if config.learned_positions:
        x = x + params["positions"]["w"][positions].astype(x.dtype)
    x = constrain(x, "batch", "seq", "act_embed")
    where, ctx = {"positions": positions, "segments": segments}, {}
    if cache is not None:
        cache = _write_places(cache, positions, segments)
        ctx["slots"] = cache["slots"]
        where |= {k: cache[k] for k in ("kv_positions", "kv_segments")}
    ctx |= {"where": where, "angles": _angles(config, **where)}
    kept, sums = {}, []
    for loop in range(config.loops):
        for name in stacks(config):
            first = kept[f"0/{name}"] if loop else None
            kv = None if cache is None else cache["kv"][f"{loop}/{name}"]
            xs = (params["layers"][name], kv, first)
            x, (kept[f"{loop}/{name}"], routing) = _stack(config, name, ctx, x, xs)
            sums.append(routing)
    x = _norm(config, x, params["norm"])
    if cache is None:
        x = unspread(x)
    else:
        cache = cache | {"kv": kept}
    routing = jax.tree.map(lambda *a: sum(jnp.sum(b, axis=0) for b in a), *sums)
    return x, cache, routing


def _angles(config, positions, segments, kv_positions=None, kv_segments=None):
    """{rope: (sin, cos)} of the kinds."""
    ropes = dict.fromkeys(k.rope for k in config.kinds if k.rope is not None)
    lengths = None
    if any(r.kind in rope.BY_LENGTH for r in ropes):
        known = (positions, segments) if kv_segments is None else (kv_positions, kv_segments)
        n = known[0].shape[1] + 1
        last = jax.vmap(lambda p, s: jax.ops.segment_max(p, s, n))(*known)
        lengths = jnp.take_along_axis(last, segments, axis=1) + 1
    return {r: rope.angles(r, config.head_dim, positions, lengths) for r in ropes}


def init_cache(config: Config, batch: int, length: int) -> dict:
    """An empty key/value cache for `length` positions; `index` is where each row writes next."""
    shape = (batch, length, config.kv_heads, config.head_dim)
    kv = {
        f"{loop}/{name}": tuple(jnp.zeros((n, *shape), config.dtype) for _ in "kv")
        for loop in range(config.loops)
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

    def outputs(self, params, batch):
        """(hidden [B, S, D], moe.routing_sums or None) of a Batch dict.

        positions and segments default to one document a row.
        """
        tokens = batch["tokens"]
        positions = batch.get("positions")
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        segments = batch.get("segments")
        if segments is None:
            segments = jnp.ones_like(tokens)
        x, _, routing = forward(self.config, params, tokens, positions, segments)
        return x, routing

    def hidden(self, params, batch):
        """The first of `outputs`."""
        return self.outputs(params, batch)[0]

    def head(self, params):
        """The vocabulary projection, [config.rows, D]."""
        return stored(params["embed" if self.config.tied else "head"]["w"], ("vocab", "embed"))

    @property
    def logit_options(self) -> dict:
        """How logits follow from hidden states and head; see ops.cross_entropy."""
        c = self.config
        return dict(scale=c.logit_scale, softcap=c.logit_softcap, vocab=c.vocab)

    def logits(self, params, hidden):
        """float32 [..., V]; for people, sampling and tests: training never forms [B, S, V]."""
        c = self.config
        w = self.head(params).astype(hidden.dtype)
        y = jnp.einsum("...d,vd->...v", hidden, w, preferred_element_type=jnp.float32)
        y = y[..., : c.vocab] * _weak(c.logit_scale)
        return c.logit_softcap * jnp.tanh(y / c.logit_softcap) if c.logit_softcap else y

    def apply(self, params, batch):
        """float32 logits [B, S, V] of a Batch dict; only "tokens" is required."""
        return self.logits(params, self.hidden(params, batch))

    @property
    def attention_features(self) -> set:
        """What the model asks of an attention backend; see ops.attention.Backend."""
        c = self.config
        used = {
            "window": any(k.window for k in c.kinds) or c.loops > 1,
            "softcap": c.attn_softcap,
            "sinks": c.sinks,
        }
        return {name for name, on in used.items() if on}

    def check_length(self, length: int, what: str):
        """Raise ValueError where learned positions do not reach so far."""
        c = self.config
        if c.learned_positions and length > c.max_positions:
            raise ValueError(f"{what}: the model has {c.max_positions} learned positions")

    def init_cache(self, batch: int, length: int):
        return init_cache(self.config, batch, length)

    def decode(self, params, cache, tokens, positions, segments):
        """(hidden [B, S, D], cache) with the tokens appended to the cache."""
        x, cache, _ = forward(self.config, params, tokens, positions, segments, cache)
        cache.pop("slots")
        return x, cache

    def replace(self, **changes) -> "Model":
        """The same model with other fields of its Config: dtype, remat, attention, split."""
        return Model(dataclasses.replace(self.config, **changes), self.source)
