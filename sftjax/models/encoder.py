"""The encoder: the layers of the decoder (layer.py, decoder.run_layers) read in both directions.

Position and token-type embeddings, where there are any, are added to the tokens' and normalised. A token sees all
tokens of its segment, or those in its layer's window, so that documents packed into a row are as each in a row of its
own.

Dropout acts on the normalised embedding, on what each half of a layer adds, and on what a head reads. The dropout of
attention probabilities that a config.json may ask for (attention_probs_dropout_prob) is not applied: blockwise
attention never forms them.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from sftjax.models import base, decoder, layer
from sftjax.ops import dropout, weight
from sftjax.parallel import spread
from sftjax.params import Param

POOLER_AXES = ("embed", None)
HEAD = 1  # folded into a key for the head's dropout


@dataclasses.dataclass(frozen=True)
class Pooler:
    """The layer between the body and a head: a matrix, an activation and perhaps a norm."""

    activation: str = "tanh"
    norm: bool = False
    bias: bool = True
    drop_before: bool = False  # dropout of its input too, not of its output alone


@dataclasses.dataclass(frozen=True)
class Config(decoder.Config):
    """decoder.Config with what an encoder has besides; its defaults are those of BERT."""

    kinds: tuple[decoder.Kind, ...] = (decoder.Kind(rope=None),)
    norm: str = "layer"
    norms: str = "residual"
    causal: bool = False
    tied: bool = True
    learned_positions: bool = True
    qkv_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    gated: bool = False
    activation: str = "gelu"
    token_types: int = 2
    embed_norm: bool = True
    final_norm: bool = False
    head: str = ""
    # What lies before each head that has something before it; "" is the body without a head.
    poolers: tuple[tuple[str, Pooler], ...] = (
        ("", Pooler()),
        ("document", Pooler()),
        ("vocabulary", Pooler("gelu", norm=True)),
    )
    pooling: str = "first"  # of a document: its first token | the mean of all
    vocab_bias: bool = True  # of the vocabulary head
    head_dropout: float = 0.0  # of what a head of classes reads

    @property
    def pooler(self) -> Pooler | None:
        """What lies before its head."""
        return dict(self.poolers).get(self.head)


def abstract(c: Config) -> dict:
    """The tree of Params."""
    normal, zeros = jax.nn.initializers.normal(c.init_std), jax.nn.initializers.zeros
    tree = decoder.abstract(c)
    if c.relative:
        tree["relative_norm"] = layer.norm_params(c)
    if c.token_types:
        tree["token_types"] = {"w": Param((c.token_types, c.width), (None, "embed"), normal)}
    if c.pooler:
        tree["pooler"] = {"w": Param((c.width, c.width), POOLER_AXES, normal, ("embed",))}
        if c.pooler.bias:
            tree["pooler"]["b"] = Param((c.width,), (None,), zeros)
        if c.pooler.norm:
            tree["pooler_norm"] = layer.norm_params(c)
    if c.head == "vocabulary" and c.vocab_bias:
        tree["vocab_bias"] = {"b": Param((c.rows,), ("vocab",), zeros)}
    return tree


def mean_of_documents(x: jax.Array, segments: jax.Array) -> jax.Array:
    """[B, S, D] of x [B, S, D]: at each token the mean over its segment, of segments [B, S]."""

    def row(x, segments):
        n = len(segments) + 1
        sums = jax.ops.segment_sum(x.astype(jnp.float32), segments, n)
        counts = jax.ops.segment_sum(jnp.ones(len(segments)), segments, n)
        return (sums / jnp.maximum(counts, 1)[:, None])[segments]

    return jax.vmap(row)(x, segments).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class Model(base.Model):
    """An encoder with a head of classes or of the vocabulary, or with none; see base.Model."""

    config: Config
    reads: ClassVar[str] = "first"
    tree = staticmethod(abstract)

    def outputs(self, params: dict[str, Any], batch: dict, rng: jax.Array | None = None) -> tuple[jax.Array, None]:
        """(hidden [B, S, D], None) of a Batch dict; rng None: without dropout.

        token_types int32 [B, S] default to 0; positions and segments to one document a row. For a vocabulary head the
        hidden states are those that it reads, after the layer before it.
        """
        c, layers = self.config, params["layers"]
        x, ctx = decoder.embed(c, params, batch, rng)
        if c.relative:
            table = layer.norm(c, params["relative"]["w"], params["relative_norm"])
            layers = decoder.with_shared(c, params, relative=table)
        x, _, _ = decoder.run_layers(c, layers, ctx, x)
        hidden = spread(layer.norm(c, x, params.get("norm")), back=True)
        return self.pooled(params, hidden) if c.head == "vocabulary" else hidden, None

    def pooled(self, params: dict[str, Any], hidden: jax.Array, rng: jax.Array | None = None) -> jax.Array:
        """[B, S, D] of hidden [B, S, D]: what the head reads; hidden itself without a pooler."""
        c, p = self.config, self.config.pooler
        if p:
            hidden = self._drop(hidden, rng, 1) if p.drop_before else hidden
            w = weight.gather_for_use(params["pooler"]["w"], POOLER_AXES, hidden.dtype)
            hidden = weight.project("bsd,dp->bsp", hidden, params["pooler"] | {"w": w})
            hidden = layer.ACTIVATIONS[p.activation](hidden)
            hidden = layer.norm(c, hidden, params.get("pooler_norm"))
        return self._drop(hidden, rng, 0)

    def _drop(self, hidden, rng, site):
        if rng is None or not self.config.head_dropout:
            return hidden
        [seed] = dropout.seeds(jax.random.fold_in(rng, HEAD), 1)
        rate, ids = self.config.head_dropout, dropout.ids(hidden.shape[:2])
        return dropout.dropout(hidden, rate, seed, ids, site)

    def class_logits(
        self, params: dict[str, Any], hidden: jax.Array, rng: jax.Array | None = None, segments: jax.Array | None = None
    ) -> jax.Array:
        """float32 [B, S, C] of hidden [B, S, D]; rng: of dropout, None = without.

        segments: int32 [B, S], for a head that reads the mean of a document; None: one a row.
        """
        if self.config.pooling == "mean" and self.config.head == "document":
            segments = jnp.ones(hidden.shape[:2], jnp.int32) if segments is None else segments
            hidden = mean_of_documents(hidden, segments)
        return base.project_classes(params["score"], self.pooled(params, hidden, rng))

    head = decoder.Model.head

    def vocab_bias(self, params: dict[str, Any]) -> jax.Array | None:
        """What is added to the logits, [config.rows]; None for nothing."""
        return params["vocab_bias"]["b"] if "vocab_bias" in params else None
