"""The encoder-decoder: layers that read a source both ways, and layers that write a target.

Both are stacks of layer.py. A layer of the decoder attends to the target before it, and then to the encoder's output.
Segments say which is whose: a token of a target sees the source of its own segment, so that sources and targets packed
into two rows are as each pair in rows of its own.

Dropout acts on the embeddings and on what each part of a layer adds. That of attention probabilities and inside an MLP
is not applied: blockwise attention never forms the former.

Letters of shapes: B rows, S tokens of a source's row, T of a target's, D width.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from functools import cached_property
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from sftjax.errors import ModelError
from sftjax.models import base, decoder, flops, layer
from sftjax.ops import weight
from sftjax.parallel import spread
from sftjax.params import count, flatten, map_named


@dataclasses.dataclass(frozen=True)
class Config(decoder.Config):
    """decoder.Config is that of the decoder; these are the encoder's, and what both share."""

    kinds: tuple[decoder.Kind, ...] = (decoder.Kind(rope=None),)
    cross: bool = True
    encoder_layers: int = 0
    encoder_heads: int = 0
    encoder_mlp: int = 0
    start_id: int = 0  # the token before a target

    @cached_property
    def encoder(self) -> "Config":
        """The encoder's own config."""
        sizes: dict[str, Any] = dict(heads=self.encoder_heads, kv_heads=self.encoder_heads, mlp=self.encoder_mlp)
        sizes |= dict(layers=self.encoder_layers, cross=False, causal=False)
        if self.learned_positions:  # BART's heads share the width
            sizes["head_dim"] = self.width // self.encoder_heads
        return dataclasses.replace(self, **sizes, head="", classes=0, split=())


def abstract(c: Config) -> dict:
    """The tree of Params: the decoder's, with the encoder's under "encoder"."""
    if c.classes:
        raise ModelError(
            f"an encoder-decoder has no head of classes here, and head={c.head!r} is asked for;"
            " write the classes as text with task='seq2seq'"
        )
    tree = decoder.abstract(c)
    tree["encoder"] = {k: v for k, v in decoder.abstract(c.encoder).items() if k != "embed"}
    return map_named(functools.partial(_as_t5, c), tree) if c.buckets else tree


def _as_t5(c, name, p):
    """T5's own initialisation: its scores are not scaled, and so its queries are smaller."""
    if p.inputs is None or "vocab" in p.axes:
        std = None if p.inputs is None and name != "embed/w" else 1.0
    else:
        std = math.prod(n for n, axis in zip(p.shape, p.axes, strict=True) if axis in p.inputs) ** -0.5
        std *= c.head_dim**-0.5 if "/q/" in name else 1.0
    return dataclasses.replace(p, init=jax.nn.initializers.normal(std)) if std else p


def _with_embed(tree):
    return tree["encoder"] | {"embed": tree["embed"]}


def encode(c: Config, params: dict[str, Any], batch: dict, rng: jax.Array | None = None) -> dict[str, jax.Array]:
    """{"hidden" [B, S, D], "positions", "segments" [B, S]} of a Batch's sources, in the context order."""
    own = _with_embed(params)
    x, ctx = decoder.embed(c.encoder, own, batch, rng)
    x, _, _ = decoder.run_layers(c.encoder, decoder.with_shared(c.encoder, own), ctx, x)
    return {"hidden": layer.norm(c, x, own.get("norm"))} | ctx["where"]


@dataclasses.dataclass(frozen=True)
class Model(base.Model):
    """An encoder-decoder with a head of the vocabulary; see base.Model."""

    config: Config
    reads: ClassVar[str] = "last"
    tree = staticmethod(abstract)

    def outputs(self, params: dict[str, Any], batch: dict, rng: jax.Array | None = None) -> tuple[jax.Array, None]:
        """(hidden [B, T, D] of the targets, None) of a Batch dict; rng None: without dropout.

        tokens, positions, segments: int32 [B, S] of the sources; targets, target_positions, target_segments: int32 [B,
        T]. Positions and segments default to one pair a row.
        """
        c, targets = self.config, batch["targets"]
        own = {k: batch.get(f"target_{k}") for k in ("positions", "segments")}
        positions, segments = base.places({"tokens": targets} | own)
        rngs = (None, None) if rng is None else jax.random.split(rng)
        source = encode(c, params, batch, rngs[0])
        before = jnp.pad(targets, ((0, 0), (1, 0)))[:, :-1]
        tokens = jnp.where(positions == 0, c.start_id, before)
        x, ctx = decoder.embed(c, params, dict(tokens=tokens, positions=positions, segments=segments), rngs[1])
        x, _, _ = decoder.run_layers(c, decoder.with_shared(c, params), ctx | {"source": source}, x)
        return spread(layer.norm(c, x, params.get("norm")), back=True), None

    def train_flops(self, trainable: dict) -> Callable[[float, float, Callable], float]:
        """See flops.train_flops; the `trained` tokens are the targets', `pairs` the sources'."""
        c, tree = self.config, self.abstract
        source_of = flops.train_flops(c.encoder, _with_embed(trainable), _with_embed(tree))
        target_of = flops.train_flops(c, trainable, tree)
        on, keys = flatten(trainable), 0  # what makes keys and values reads the source's tokens
        for name, p in flops.matrices(tree["layers"], "layers/"):
            if "/cross/k/" in name or "/cross/v/" in name:
                keys += count(p) * (4 + 2 * on[name])
        per_pair = 24 * c.heads * c.head_dim * c.layers

        def step(tokens, trained, pairs):
            source = tokens - trained
            share = trained / max(source, 1)
            target = target_of(trained, trained, lambda window: share**2 * pairs(window))
            across = keys * (source - trained) + per_pair * share * pairs(0)
            return source_of(source, 0, pairs) + target + across

        return step

    head = decoder.Model.head
    logits = decoder.Model.logits
    init_cache = decoder.Model.init_cache

    def begin(
        self, params: dict[str, Any], tokens: jax.Array, lengths: jax.Array, new: int
    ) -> tuple[dict[str, Any], jax.Array]:
        """(cache for `new` tokens, hidden [B, D] from which the first is drawn) of sources.

        tokens: int32 [B, S], right-padded; lengths: int32 [B].
        """
        c, (rows, n) = self.config, tokens.shape
        segments = (jnp.arange(n) < lengths[:, None]).astype(jnp.int32)
        source = encode(c, params, {"tokens": tokens, "segments": segments})
        cache = self.init_cache(rows, new + 1)
        cache["source"] = {k: v for k, v in source.items() if k != "hidden"}
        axes = layer.axes_of(c)["cross"]

        def keys(stack):
            p = weight.gather_for_use(stack["cross"], axes, c.dtype)
            k, v = layer.source_keys(p, source["hidden"])
            return k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)

        cache["first"] = {name: jax.lax.map(keys, stack) for name, stack in params["layers"].items()}
        start = jnp.full((rows, 1), c.start_id, jnp.int32)
        hidden, cache = self.decode(params, cache, {"tokens": start})
        return cache, hidden[:, 0]

    def decode(self, params: dict[str, Any], cache: dict[str, Any], batch: dict) -> tuple[jax.Array, dict[str, Any]]:
        """(hidden [B, T, D], cache) with the tokens [B, T] of a target, a Batch dict, appended to the cache."""
        c = self.config
        x, ctx, cache = decoder.embed_next(c, params, cache, batch)
        layers, ctx = decoder.with_shared(c, params), ctx | {"source": cache["source"]}
        x, kept, _ = decoder.run_layers(c, layers, ctx, x, cache)
        return layer.norm(c, x, params.get("norm")), cache | {"kv": kept}
