"""BERT: learned positions and token types, LayerNorm after each sum, GELU, biases everywhere.

Its hidden_dropout_prob and classifier_dropout are applied; attention_probs_dropout_prob is not, see encoder.py.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

from sftjax.errors import ModelError
from sftjax.families import common
from sftjax.models.encoder import Config, Pooler


def config(hf: dict, **more: Any) -> Config:
    """encoder.Config from the fields of a Hugging Face config.json. more: of a family alike."""
    common.refuse(hf, position_embedding_type="absolute", is_decoder=False, add_cross_attention=False)
    dropout, heads = hf.get("hidden_dropout_prob", 0.1), hf["num_attention_heads"]
    own, activation = hf.get("classifier_dropout"), hf.get("hidden_act", "gelu")
    fields: dict[str, Any] = dict(
        vocab=hf["vocab_size"],
        width=hf["hidden_size"],
        layers=hf["num_hidden_layers"],
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim(hf),
        mlp=hf["intermediate_size"],
        max_positions=hf.get("max_position_embeddings", 512),
        norm_eps=hf.get("layer_norm_eps", 1e-12),
        activation=activation,
        init_std=hf.get("initializer_range", 0.02),
        token_types=hf.get("type_vocab_size", 2),
        poolers=(("", Pooler()), ("document", Pooler()), ("vocabulary", Pooler(activation, True))),
        dropout=dropout,
        head_dropout=dropout if own is None else own,
    )
    return Config(**fields | more)


def head_dim(hf: dict) -> int:
    """The width of a head. Raises: ModelError where it is no whole number."""
    width, heads = hf["hidden_size"], hf["num_attention_heads"]
    if width % heads:
        raise ModelError(f"hidden_size={width} does not divide over num_attention_heads={heads}")
    return width // heads


def as_stored(c: Config, files: Iterable[str]) -> Config:
    """The config for files that hold these tensors: without a head, a pooler only if they do."""
    if any(name.endswith("pooler.dense.weight") for name in files):
        return c
    return dataclasses.replace(c, poolers=tuple(row for row in c.poolers if row[0]))


POOLER = "p d -> d p"  # the layout of the matrix before a head
# Heads and buffers of other tasks than ours, which BERT files may hold besides the body.
OTHERS = r"cls\..*|qa_outputs\..*|classifier\..*|(bert\.)?pooler\..*"


def names(c: Config) -> list[tuple]:
    """Rows as in llama.names."""
    head = masked(c) if c.head == "vocabulary" else score(c, "bert.pooler.dense")
    return body("bert.") + head


def masked(
    c: Config,
    prefix: str = "cls.predictions.",
    dense: str = "transform.dense",
    norm: str = "transform.LayerNorm",
    bias: str = "bias",
    head: str = "decoder.weight",
) -> list[tuple]:
    """The rows of a head of the vocabulary, by the names of its four parts."""
    rows = common.linear(prefix + dense, "pooler", POOLER) + common.layer_norm(prefix + norm, "pooler_norm")
    rows.append((prefix + bias, "vocab_bias/b", "v -> v"))
    return rows + [(prefix + head, "head/w", "v d -> v d")] * (not c.tied)


def body(prefix: str) -> list[tuple]:
    """The rows of the body of a BERT whose names begin with a prefix."""
    embed, block = prefix + "embeddings.", prefix + "encoder.layer.{}."
    attn = dict(q="self.query", k="self.key", v="self.value", o="output.dense")
    rows = [
        (embed + "word_embeddings.weight", "embed/w", "v d -> v d"),
        (embed + "position_embeddings.weight", "positions/w", "p d -> p d"),
        (embed + "token_type_embeddings.weight", "token_types/w", "t d -> t d"),
        *common.matrices(block + "attention.", "layers/attn", True, **attn),
        *common.matrices(block, "layers/mlp", up="intermediate.dense", down="output.dense"),
        *common.layer_norm(block + "attention.output.LayerNorm", "layers/attn_sum_norm"),
        *common.layer_norm(block + "output.LayerNorm", "layers/mlp_sum_norm"),
    ]
    return rows + common.layer_norm(embed + "LayerNorm", "embed_norm")


def score(c: Config, before: str) -> list[tuple]:
    """The rows of a head of classes, as BERT and most encoders name them, and of its pooler.

    before: the pooler's name, where there is one.
    """
    file = "qa_outputs" if c.head == "span" else "classifier"
    rows = common.linear(before, "pooler", POOLER) if c.pooler else []
    return rows + (common.linear(file, "score", "c d -> c d") if c.classes else [])
