"""The decoder-only transformer: every family is a Config of this file, made of layers (layer.py).

Layers of one kind are stacked on a leading `layers` axis and run under lax.scan; where kinds alternate (local and
global attention), one step of the scan runs a whole period. `split` cuts the stack at given layers, so that a frozen
prefix is a stack of its own and costs no backward pass.

Einsum letters: d width, v vocabulary.
"""

import dataclasses
import functools
import itertools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from sftjax.errors import ConfigError, ModelError
from sftjax.models import base, layer
from sftjax.ops import dropout, rope, weight
from sftjax.ops.rope import Rope
from sftjax.parallel import RULES, constrain, manual_axes, part, shard_map, spec, spread
from sftjax.params import Param, is_param

SHARED = ("distances", "relative")  # parameters of attention that all layers have as one
PERIOD = 8  # the longest alternation of kinds that is looked for


@dataclasses.dataclass(frozen=True)
class Kind:
    """What may differ between the layers of one model."""

    # A token sees itself and window-1 before it, and in both directions also after it; 0 = all.
    window: int = 0
    rope: Rope | None = Rope()  # None: no rotation
    attn_norm: bool = True  # attention reads a normalised input, where the others do


@dataclasses.dataclass(frozen=True)
class Config:
    """What a decoder is and how it is run: its sizes, its options and its dtype."""

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
    norm_bias: bool = True  # of the norm "layer"
    norm_eps: float = 1e-5
    # pre: before each half of a layer | post: after it | both | residual: of the sum after it
    norms: str = "pre"
    causal: bool = True  # a token sees those before it; else all of its document
    qk_norm: str = "none"  # none | head: over each head | all: over all heads at once
    parallel: bool = False  # attention and MLP both read the layer's input
    tied: bool = False
    learned_positions: bool = False
    first_position: int = 0  # the row of the table of positions that a document's first token reads
    embed_norm: bool = False  # of the embedding
    final_norm: bool = True  # of the last layer's output
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float = 0.0
    qkv_bias: bool = False
    out_bias: bool = False
    attn_scale: float = 0.0  # of the scores; 0 = head_dim ** -0.5
    attn_softcap: float = 0.0
    sinks: bool = False
    buckets: int = 0  # of distances, for each of which a head adds a number to its scores
    relative: int = 0  # DeBERTa's embeddings of distances
    furthest: int = 128  # the distance from which on all are in one bucket
    cross: bool = False  # each layer also attends to a source; see encoder_decoder.py
    mlp_bias: bool = False
    gated: bool = True
    activation: str = "silu"
    swiglu_alpha: float = 0.0  # gpt-oss: (up + 1) * gate * sigmoid(alpha * gate), both clamped
    swiglu_limit: float = 0.0
    experts: int = 0  # 0 = a dense MLP
    experts_per_token: int = 0
    renormalise: bool = True  # the weights of a token's experts add up to 1
    init_std: float = 0.02
    # vocabulary | document, token (classes of each) | span (where one begins and ends) | "" = none
    head: str = "vocabulary"
    classes: int = 0  # rows of a head of classes
    dropout: float = 0.0  # of the embedding and of what each half of a layer adds
    embed_noise: float = 0.0  # NEFTune's alpha
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


def stacks(config: Config) -> dict[str, int]:
    """{name: number of layers} of each stack in order; the name is its range: "0-11"."""
    cuts = [0, *config.split, config.layers]
    if any(a >= b for a, b in itertools.pairwise(cuts)):
        raise ConfigError(f"model.split={config.split} must rise strictly between 0 and {config.layers} layers")
    kinds, out = _kinds(config), {}
    for start, stop in itertools.pairwise(cuts):
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


def period(config: Config, name: str) -> list[Kind]:
    """The kinds of the first layers of a stack, of which all its layers are repeats."""
    start, stop = map(int, name.split("-"))
    kinds = _kinds(config)[start : stop + 1]
    return kinds[: next(p for p in range(1, len(kinds) + 1) if _run(kinds, p) == len(kinds))]


# ---- parameters ----------------------------------------------------------------------------


def abstract(config: Config) -> dict:
    """The tree of Params."""
    c, normal = config, jax.nn.initializers.normal(config.init_std)
    head = ("embed",)  # what its product sums over
    tied = head if c.tied and c.head == "vocabulary" else None
    tree: dict[str, Any] = {
        "embed": {"w": Param((c.rows, c.width), ("vocab", "embed"), normal, tied)},
        "layers": {name: layer.abstract(c, n, period(c, name)[0]) for name, n in stacks(c).items()},
    }
    for name, on in {"norm": c.final_norm, "embed_norm": c.embed_norm}.items():
        tree |= {name: layer.norm_params(c)} if on else {}
    if c.learned_positions:
        size = (c.first_position + c.max_positions, c.width)
        tree["positions"] = {"w": Param(size, (None, "embed"), normal)}
    if c.classes:
        tree["score"] = {"w": Param((c.classes, c.width), ("classes", "embed"), normal, head)}
        if c.head != "document" or not c.causal:
            zeros = jax.nn.initializers.zeros
            tree["score"]["b"] = Param((c.classes,), ("classes",), zeros)
    elif c.head and not c.tied:
        tree["head"] = {"w": Param((c.rows, c.width), ("vocab", "embed"), normal, head)}
    return _shared(tree)


def _shared(tree):
    """The tree of Params with what all layers have as one: a table of distances."""
    layers = dict(tree["layers"])
    for name in SHARED:
        if name not in next(iter(layers.values()))["attn"]:
            continue
        for stack, own in layers.items():
            attn = dict(own["attn"])
            p = attn.pop(name)
            layers[stack] = own | {"attn": attn}
        one = dataclasses.replace(p, shape=p.shape[1:], axes=p.axes[1:])
        tree = tree | {name: {"w": one}}
    return tree | {"layers": layers}


def with_shared(config: Config, params: dict[str, Any], **tables: jax.Array) -> dict[str, Any]:
    """The parameters of the layers, each with what all share; tables: in place of params' own."""
    tables = {name: params[name]["w"] for name in SHARED if name in params} | tables
    out = {}
    for name, n in stacks(config).items():
        own = params["layers"][name]
        each = {k: jnp.broadcast_to(w, (n, *w.shape)) for k, w in tables.items()}
        out[name] = own | {"attn": own["attn"] | each}
    return out


# ---- forward -------------------------------------------------------------------------------


def _stack(config, name, ctx, x, xs):
    """Run the layers of one stack. xs: (params, kv, first, seeds), each leaf [n, ...] or None.

    On a mesh with fsdp or context, over shards of rows: so that it is said here, not left to the partitioner, where
    weights are gathered and their gradients summed and scattered.
    """
    mesh = jax.sharding.get_abstract_mesh()
    needs = (RULES["embed"], RULES["seq"])
    if mesh.empty or all(mesh.shape[a] == 1 for a in needs):
        return _scan(config, name, ctx, x, xs)
    apart = {*RULES["batch"], *needs} - {*manual_axes()}
    rows = spec(("batch", "seq"))
    own = layer.abstract(config, 1, period(config, name)[0])
    axes = jax.tree.map(lambda p: p.axes, own, is_leaf=is_param)
    params = weight.map_arrays(lambda _, axes: part(axes, apart), xs[0], axes)
    kept = P(None, *rows)
    run = functools.partial(_scan, config, name)
    specs = (rows, rows, (params, None, kept, P()))
    return shard_map(run, specs, (rows, (kept, P())), axes=apart)(ctx, x, xs)


def _scan(config, name, ctx, x, xs):
    kinds, n = period(config, name), stacks(config)[name]
    p = len(kinds)

    def run(j, x, xs):
        # The group's slice is taken in here, so that remat keeps the group and not its slices.
        xs = jax.tree.map(lambda a: a[j], xs) if p > 1 else xs
        return layer.apply(config, kinds[j], ctx, x, *xs)

    # The backward pass of a layer on its own at the end comes at once: nothing to compute again. (After a stack of two
    # kinds by turns, its remat ends the process, in XLA's partitioner.)
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


def _decoded(config, name, ctx, x, kv, xs):
    """As _stack, of tokens that go on from a cache: (x, the stack's keys and values, routing).

    The cache is carried whole and written in place: as an output of the scan it would be copied. xs: (params, first).
    """
    kinds, n = period(config, name), stacks(config)[name]
    p = len(kinds)

    def body(carry, xs):
        x, kv = carry
        group, xs = xs
        outs = []
        for j in range(p):
            own, first = jax.tree.map(lambda a, j=j: a[j], xs) if p > 1 else xs
            cache = layer.Cache(kv[0], kv[1], group * p + j)
            x, (kv, routing) = layer.apply(config, kinds[j], ctx, x, own, cache, first, None)
            outs.append(routing)
        return (x, kv), jax.tree.map(lambda *a: jnp.stack(a), *outs)

    if p > 1:
        xs = jax.tree.map(lambda a: a.reshape(n // p, p, *a.shape[1:]), xs)
    (x, kv), routing = jax.lax.scan(body, (x, kv), (jnp.arange(n // p), xs))
    return x, kv, jax.tree.map(lambda a: a.reshape(n, *a.shape[2:]), routing)


def forward(
    config: Config,
    params: dict[str, Any],
    batch: dict,
    cache: dict[str, Any] | None = None,
    rng: jax.Array | None = None,
    inserted: base.Inserted | None = None,
) -> tuple[jax.Array, dict[str, Any] | None, dict[str, jax.Array] | None]:
    """(hidden states after the final norm [B, S, D], updated cache, moe.routing_sums) of a Batch dict.

    Segment 0 is padding. The cache is None without one; the routing sums, over all layers, are None for a dense model.
    rng: of dropout; None = without.
    """
    if cache is None:
        x, ctx = embed(config, params, batch, rng, inserted)
    else:
        x, ctx, cache = embed_next(config, params, cache, batch, inserted)
    x, kept, routing = run_layers(config, params["layers"], ctx, x, cache)
    x = layer.norm(config, x, params["norm"])
    return (spread(x, back=True), None, routing) if cache is None else (x, cache | {"kv": kept}, routing)


def embed(
    config: Config, params: dict[str, Any], batch: dict, rng: jax.Array | None = None, inserted: Any = None
) -> tuple[jax.Array, dict[str, Any]]:
    """(x [B, S, D], what the layers are told of its tokens) of a Batch dict, in the context axis's order.

    rng: of dropout; inserted: a base.Inserted, or None.
    """
    tokens, positions, segments = map(spread, (batch["tokens"], *base.places(batch)))
    types = spread(batch.get("token_types", jnp.zeros_like(tokens))) if "token_types" in params else None
    inserted = jax.tree.map(spread, inserted)
    with jax.named_scope("embed"):
        x = weight.lookup(params["embed"]["w"], tokens, config.dtype)
    x = _embedded(config, params, x, positions, types, inserted)
    where = {"positions": positions, "segments": segments}
    ctx = {"where": where, "angles": _angles(config, **where)}
    if inserted is not None and inserted.sees is not None:
        where["sees"] = inserted.sees
    if rng is not None and config.embed_noise:
        drawn = _noise(config, x, segments, rng)
        x = x + (drawn if inserted is None else jnp.where(inserted.own[..., None], 0, drawn))
    if rng is not None and config.dropout:
        ctx["ids"] = spread(dropout.ids(positions.shape))
        # The embedding's, and one for each layer, whatever the stacks.
        ctx["seeds"] = dropout.seeds(rng, 1 + config.loops * config.layers)
        x = dropout.dropout(x, config.dropout, ctx["seeds"][0], ctx["ids"])
    return x, ctx


def _noise(config, x, segments, rng):
    """NEFTune's (Jain et al. 2023, arXiv 2310.05914): the less, the longer a document of a row is."""
    counts = jax.vmap(lambda row: jnp.bincount(row, length=row.size + 1)[row])(segments)
    drawn = jax.random.uniform(jax.random.fold_in(rng, 1), x.shape, x.dtype, -1, 1)
    return drawn * (config.embed_noise * jax.lax.rsqrt(jnp.float32(counts * config.width)))[..., None].astype(x.dtype)


def embed_next(
    config: Config, params: dict[str, Any], cache: dict[str, Any], batch: dict, inserted: Any = None
) -> tuple[jax.Array, dict[str, Any], dict[str, Any]]:
    """As `embed`, of tokens that go on from a cache, and the cache with their places."""
    positions, segments = base.places(batch)
    x = weight.rows(params["embed"]["w"], batch["tokens"], config.dtype)
    x = _embedded(config, params, x, positions, inserted=inserted)
    slot, where = cache["slot"], {"positions": positions, "segments": segments}
    put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=slot, axis=1)
    # Slots of padding (segment 0) stay empty.
    known = {f"kv_{k}": put(cache[f"kv_{k}"], new) for k, new in where.items()}
    cache, where = cache | known | {"slot": slot + positions.shape[1]}, where | known
    angles = _angles(config, **where)
    where |= {} if inserted is None or inserted.sees is None else {"sees": inserted.sees}
    return x, {"slot": slot, "where": where, "angles": angles}, cache


def _embedded(config, params, x, positions, types=None, inserted=None):
    if config.embed_scale != 1:
        x = x * jnp.asarray(config.embed_scale, x.dtype)
    if inserted is not None:
        x = jnp.where(inserted.own[..., None], inserted.values.astype(x.dtype), x)
    if config.learned_positions:
        places = positions + config.first_position
        x = x + weight.rows(params["positions"]["w"], places, x.dtype)
    if types is not None:
        x = x + weight.rows(params["token_types"]["w"], types, x.dtype)
    x = constrain(x, "batch", "seq", "act_embed")
    return layer.norm(config, x, params.get("embed_norm"))


def run_layers(
    config: Config, layers: dict[str, Any], ctx: dict[str, Any], x: jax.Array, cache: dict[str, Any] | None = None
) -> tuple[jax.Array, dict[str, Any], dict[str, jax.Array] | None]:
    """(x [B, S, D] after all layers, keys and values by stack, moe.routing_sums or None)."""
    kept, sums, ctx = dict[str, Any](), [], dict(ctx)
    seeds = ctx.pop("seeds", None)
    for loop in range(config.loops):
        for name in stacks(config):
            first = kept[f"0/{name}"] if loop else (cache or {}).get("first", {}).get(name)
            kv = None if cache is None else cache["kv"][f"{loop}/{name}"]
            at = 1 + loop * config.layers + int(name.split("-")[0])
            own = None if seeds is None else seeds[at : at + stacks(config)[name]]
            if kv is None:
                xs = (layers[name], None, first, own)
                x, (kept[f"{loop}/{name}"], routing) = _stack(config, name, ctx, x, xs)
            else:
                found = _decoded(config, name, ctx, x, kv, (layers[name], first))
                x, kept[f"{loop}/{name}"], routing = found
            sums.append(routing)
    return x, kept, jax.tree.map(lambda *a: sum(jnp.sum(b, axis=0) for b in a), *sums)


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


# ---- the record users hold -----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Model(base.Model):
    """A decoder with a vocabulary head, or with a head of classes; see base.Model."""

    config: Config
    reads: ClassVar[str] = "last"
    tree = staticmethod(abstract)

    def outputs(
        self, params: dict[str, Any], batch: dict, rng: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array] | None]:
        """(hidden [B, S, D], moe.routing_sums or None) of a Batch dict.

        positions and segments default to one document a row.
        """
        x, _, routing = forward(self.config, params, batch, rng=rng)
        return x, routing

    def head(self, params: dict[str, Any]) -> weight.Weight:
        """The vocabulary projection, [config.rows, D]; see ops.weight."""
        if self.config.head != "vocabulary":
            raise ModelError(
                f"this model has {self.config.classes or 'no'} classes and no vocabulary head; load it with"
                " head='vocabulary', or take the directory of a causal language model"
            )
        w = params["embed" if self.config.tied else "head"]["w"]
        return weight.as_stored(w, ("vocab", "embed"))

    def logits(self, params: dict[str, Any], hidden: jax.Array) -> jax.Array:
        """float32 [..., V]; for people, sampling and tests: training never forms [B, S, V]."""
        c = self.config
        h, w = weight.as_head(hidden, self.head(params))
        w = w.astype(h.dtype)
        y = jnp.einsum("...d,vd->...v", h, w, preferred_element_type=jnp.float32)
        y = y[..., : c.vocab] * layer.weak(c.logit_scale)
        return c.logit_softcap * jnp.tanh(y / c.logit_softcap) if c.logit_softcap else y

    def apply(self, params: dict[str, Any], batch: dict) -> jax.Array:
        """float32 logits [B, S, V] of a Batch dict; only "tokens" is required."""
        return self.logits(params, self.hidden(params, batch))

    def init_cache(self: base.Model, batch: int, length: int) -> dict[str, Any]:
        """An empty key/value cache for `batch` rows of `length` positions; their next tokens go to `slot`.

        Keys are [layers, B, K, H, T] and values [layers, B, K, T, H]: products with one query per row read them as they
        lie.
        """
        c = self.config
        heads, ends = (batch, c.kv_heads), ((c.head_dim, length), (length, c.head_dim))
        kv = {
            f"{loop}/{name}": tuple(jnp.zeros((n, *heads, *end), c.dtype) for end in ends)
            for loop in range(c.loops)
            for name, n in stacks(c).items()
        }
        empty = jnp.zeros((batch, length), jnp.int32)
        return {"kv": kv, "kv_positions": empty, "kv_segments": empty, "slot": jnp.int32(0)}

    def decode(
        self, params: dict[str, Any], cache: dict[str, Any], batch: dict, inserted: base.Inserted | None = None
    ) -> tuple[jax.Array, dict[str, Any]]:
        """(hidden [B, S, D], cache) with the tokens of a Batch dict appended to the cache."""
        out: Any = forward(self.config, params, batch, cache, inserted=inserted)
        return out[:2]
