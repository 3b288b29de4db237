"""The encoder: the layers of the decoder (layer.py, decoder.run_layers) read in both directions.

Position and token-type embeddings are added to the tokens' and normalised; each half of a layer
normalises the sum of what it read and what it computed; there is no norm at the end. A token sees
all tokens of its segment, so that documents packed into a row are as each in a row of its own.

Dropout acts on the normalised embedding, on what each half of a layer adds, and on the pooled
vector. The dropout of attention probabilities that a config.json may ask for
(attention_probs_dropout_prob) is not applied: blockwise attention never forms them.
"""

import dataclasses
from functools import cached_property
from typing import Any, ClassVar, NoReturn

import jax
import jax.numpy as jnp

from sftjax.errors import ModelError
from sftjax.models import base, decoder, layer
from sftjax.ops import dropout, weight
from sftjax.parallel import spread, unspread
from sftjax.params import Param, replace

POOLER_AXES = ("embed", None)
HEAD = 1  # folded into a key for the head's dropout


@dataclasses.dataclass(frozen=True)
class Config(decoder.Config):
    """decoder.Config with what an encoder has besides; its defaults are those of BERT."""

    kinds: tuple[decoder.Kind, ...] = (decoder.Kind(rope=None),)
    norm: str = "layer"
    norms: str = "residual"
    causal: bool = False
    tied: bool = True  # there is no vocabulary head
    learned_positions: bool = True
    qkv_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    gated: bool = False
    activation: str = "gelu"
    token_types: int = 2
    pooler: bool = True  # a layer and tanh before the head, of BERT's first token
    head_dropout: float = 0.0  # of the pooled vector


def abstract(c: Config) -> dict:
    """The tree of Params."""
    normal, zeros = jax.nn.initializers.normal(c.init_std), jax.nn.initializers.zeros
    tree = decoder.abstract(dataclasses.replace(c, classes=0))
    tree["embed_norm"] = tree.pop("norm")
    tree["token_types"] = {"w": Param((c.token_types, c.width), (None, "embed"), normal)}
    if c.pooler:
        w = Param((c.width, c.width), POOLER_AXES, normal, ("embed",))
        tree["pooler"] = {"w": w, "b": Param((c.width,), (None,), zeros)}
    if c.classes:
        w = Param((c.classes, c.width), ("classes", "embed"), normal, ("embed",))
        tree["score"] = {"w": w, "b": Param((c.classes,), ("classes",), zeros)}
    return tree


def forward(
    config: Config,
    params: dict[str, Any],
    tokens: jax.Array,
    positions: jax.Array,
    segments: jax.Array,
    types: jax.Array,
    rng: jax.Array | None = None,
) -> jax.Array:
    """Hidden states [B, S, D]; tokens to types: int32 [B, S]; rng: of dropout, None = without."""
    tokens, positions, segments, types = map(spread, (tokens, positions, segments, types))
    x = decoder.embed(config, params, tokens, positions)
    x = x + weight.rows(params["token_types"]["w"], types, x.dtype)
    x = layer.norm(config, x, params["embed_norm"])
    ctx = decoder.context(config, positions, segments, rng)
    x = decoder.drop_embedding(config, ctx, x)
    x, _, _ = decoder.run_layers(config, params["layers"], ctx, x)
    return unspread(x)


@dataclasses.dataclass(frozen=True)
class Model(base.Body):
    """An encoder with a head of classes, or with none; see base.Model."""

    config: Config
    source: Any = dataclasses.field(default=None, compare=False)
    reads: ClassVar[str] = "first"

    @cached_property
    def abstract(self) -> dict:
        """Return the tree of Params, with nodes in place of those that `nodes` matches."""
        return replace(abstract(self.config), self.nodes)

    def outputs(
        self, params: dict[str, Any], batch: dict, rng: jax.Array | None = None
    ) -> tuple[jax.Array, None]:
        """(hidden [B, S, D], None) of a Batch dict; rng None: without dropout.

        token_types int32 [B, S] default to 0; positions and segments to one document a row.
        """
        tokens, types = batch["tokens"], batch.get("token_types")
        types = jnp.zeros_like(tokens) if types is None else types
        return forward(self.config, params, tokens, *base.places(batch), types, rng), None

    def pooled(
        self, params: dict[str, Any], hidden: jax.Array, rng: jax.Array | None = None
    ) -> jax.Array:
        """[B, S, D] of hidden [B, S, D]: what the head reads; hidden itself without a pooler."""
        c = self.config
        if c.pooler:
            w = weight.gather_for_use(params["pooler"]["w"], POOLER_AXES, hidden.dtype)
            p = {"w": w, "b": params["pooler"]["b"]}
            hidden = jnp.tanh(weight.project("bsd,dp->bsp", hidden, p))
        if rng is None or not c.head_dropout:
            return hidden
        [seed] = dropout.seeds(jax.random.fold_in(rng, HEAD), 1)
        return dropout.dropout(hidden, c.head_dropout, seed, dropout.ids(hidden.shape[:2]))

    def class_logits(
        self, params: dict[str, Any], hidden: jax.Array, rng: jax.Array | None = None
    ) -> jax.Array:
        """float32 [B, S, C] of hidden [B, S, D]; rng: of dropout, None = without."""
        pooled = self.pooled(params, hidden, rng)
        return base.project_classes(params["score"]["w"], pooled) + params["score"]["b"]

    def head(self, params: dict[str, Any]) -> NoReturn:
        """Raise ModelError: an encoder has no vocabulary head."""
        raise ModelError(
            "an encoder has no vocabulary head to train on tokens or to generate from; load it with"
            " labels, or take the directory of a causal language model"
        )
