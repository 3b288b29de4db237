"""The decoder-only transformer: every family is a Config of this file, made of layers (layer.py).

Layers of one kind are stacked on a leading `layers` axis and run under lax.scan; where kinds
alternate (local and global attention), one step of the scan runs a whole period. `split` cuts the
stack at given layers, so that a frozen prefix is a stack of its own and costs no backward pass.

Einsum letters: d width, v vocabulary.
"""

import dataclasses
import functools
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from sftjax.errors import ConfigError
from sftjax.models import layer
from sftjax.ops import rope
from sftjax.ops.embed import lookup
from sftjax.ops.rope import Rope
from sftjax.params import Param, is_param
from sftjax.sharding import (
    RULES,
    constrain,
    manual_axes,
    part,
    shard_map,
    spec,
    spread,
    stored,
    unspread,
)

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
    remat: str = "dots"
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
        raise ConfigError(
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


def abstract(config: Config) -> dict:
    """The tree of Params."""
    c, normal = config, jax.nn.initializers.normal(config.init_std)
    tree = {
        "embed": {"w": Param((c.rows, c.width), ("vocab", "embed"), normal)},
        "layers": {name: layer.abstract(c, n) for name, n in stacks(c).items()},
        "norm": layer.norm_params(c, ((), ())),
    }
    if c.learned_positions:
        tree["positions"] = {"w": Param((c.max_positions, c.width), (None, "embed"), normal)}
    if not c.tied:
        tree["head"] = {"w": Param((c.rows, c.width), ("vocab", "embed"), normal)}
    return tree


# ---- forward -------------------------------------------------------------------------------


def _stack(config, name, ctx, x, xs):
    """Run the layers of one stack. xs: (params, kv, first), each leaf [n, ...] or None.

    On a mesh with fsdp or context, over shards of rows: so that it is said here, not left to the
    partitioner, where weights are gathered and their gradients summed and scattered.
    """
    _, kv, first = xs
    mesh = jax.sharding.get_abstract_mesh()
    needs = (RULES["embed"], RULES["seq"])
    if mesh.empty or all(mesh.shape[a] == 1 for a in needs) or kv is not None:
        return _scan(config, name, ctx, x, xs)
    apart = {*RULES["batch"], *needs} - {*manual_axes()}
    rows = spec(("batch", "seq"))
    abstract = layer.abstract(config, 1)
    params = jax.tree.map(lambda p: part(p.axes, apart), abstract, is_leaf=is_param)
    kept = P(None, *rows)
    run = functools.partial(_scan, config, name)
    return shard_map(run, (rows, rows, (params, None, kept)), (rows, (kept, P())), axes=apart)(
        ctx, x, xs
    )


def _scan(config, name, ctx, x, xs):
    kinds, n = period(config, name), stacks(config)[name]
    p = len(kinds)

    def run(j, x, xs):
        # The group's slice is taken in here, so that remat keeps the group and not its slices.
        xs = jax.tree.map(lambda a: a[j], xs) if p > 1 else xs
        return layer.apply(config, kinds[j], ctx, x, *xs)

    # The backward pass of a layer on its own at the end comes at once: nothing to compute again.
    # (After a stack of two kinds by turns, its remat ends the process, in XLA's partitioner.)
    names = list(stacks(config))
    alone = n == 1 < len(names) and name == names[-1]
    again = (lambda fn: fn) if alone else functools.partial(layer.remat, config)

    def body(x, xs):
        outs = []
        for j in range(p):
            x, out = again(functools.partial(run, j))(x, xs)
            outs.append(out)
        return x, jax.tree.map(lambda *a: jnp.stack(a), *outs) if p > 1 else outs[0]

    if p > 1:
        xs = jax.tree.map(lambda a: a.reshape(n // p, p, *a.shape[1:]), xs)
    x, out = jax.lax.scan(body, x, xs, unroll=1 if config.scan else n // p)
    if p > 1:
        out = jax.tree.map(lambda a: a.reshape(n, *a.shape[2:]), out)
    if shards := manual_axes():
        out = (out[0], jax.tree.map(lambda a: jax.lax.psum(a, shards), out[1]))
    return x, out


def forward(config: Config, params, tokens, positions, segments, cache=None):
    """(hidden states after the final norm [B, S, D], updated cache, moe.routing_sums).

    tokens, positions, segments: int32 [B, S]. Segment 0 is padding. The cache is None without one;
    the routing sums, over all layers, are None for a dense model.
    """
    if cache is None:
        tokens, positions, segments = map(spread, (tokens, positions, segments))
        with jax.named_scope("embed"):
            x = lookup(params["embed"]["w"], tokens).astype(config.dtype)
    else:
        x = params["embed"]["w"][tokens].astype(config.dtype)
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
    x = layer.norm(config, x, params["norm"])
    if cache is None:
        x = unspread(x)
    else:
        cache = cache | {"kv": kept}
    routing = jax.tree.map(lambda *a: sum(jnp.sum(b, axis=0) for b in a), *sums)
    return x, cache, routing


def _angles(config, positions, segments, kv_positions=None, kv_segments=None):
    """{repr(rope): (sin, cos)} of the kinds."""
    ropes = dict.fromkeys(k.rope for k in config.kinds if k.rope is not None)
    lengths = None
    if any(r.kind in rope.BY_LENGTH for r in ropes):
        known = (positions, segments) if kv_segments is None else (kv_positions, kv_segments)
        n = known[0].shape[1] + 1
        last = jax.vmap(lambda p, s: jax.ops.segment_max(p, s, n))(*known)
        lengths = jnp.take_along_axis(last, segments, axis=1) + 1
    # By text: the keys of a tree are sorted, and ropes have no order.
    return {repr(r): rope.angles(r, config.head_dim, positions, lengths) for r in ropes}


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
        y = y[..., : c.vocab] * layer.weak(c.logit_scale)
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
        """Raise ConfigError where learned positions do not reach so far."""
        c = self.config
        if c.learned_positions and length > c.max_positions:
            raise ConfigError(f"{what}: the model has {c.max_positions} learned positions")

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
