"""BERT: learned positions and token types, LayerNorm after each sum, GELU, biases everywhere.

Its hidden_dropout_prob and classifier_dropout are applied; attention_probs_dropout_prob is not,
see encoder.py.
"""

import dataclasses
from collections.abc import Iterable

from sftjax.errors import ModelError
from sftjax.families import common
from sftjax.models.encoder import Config, Model

__all__ = ["Config", "Model", "as_stored", "config", "names"]


def config(hf: dict) -> Config:
    """encoder.Config from the fields of a Hugging Face config.json."""
    common.refuse(
        hf, position_embedding_type="absolute", is_decoder=False, add_cross_attention=False
    )
    dropout, heads = hf.get("hidden_dropout_prob", 0.1), hf["num_attention_heads"]
    if hf["hidden_size"] % heads:
        raise ModelError(
            f"hidden_size={hf['hidden_size']} does not divide over num_attention_heads={heads}"
        )
    own = hf.get("classifier_dropout")
    return Config(
        vocab=hf["vocab_size"],
        width=hf["hidden_size"],
        layers=hf["num_hidden_layers"],
        heads=heads,
        kv_heads=heads,
        head_dim=hf["hidden_size"] // heads,
        mlp=hf["intermediate_size"],
        max_positions=hf.get("max_position_embeddings", 512),
        norm_eps=hf.get("layer_norm_eps", 1e-12),
        activation=hf.get("hidden_act", "gelu"),
        init_std=hf.get("initializer_range", 0.02),
        token_types=hf.get("type_vocab_size", 2),
        dropout=dropout,
        head_dropout=dropout if own is None else own,
    )


def as_stored(c: Config, files: Iterable[str]) -> Config:
    """The config for files that hold these tensors: without classes, a pooler only if they do."""
    has = any(name.endswith("pooler.dense.weight") for name in files)
    return dataclasses.replace(c, pooler=c.pooler and bool(c.classes or has))


# Heads and buffers of other tasks than ours, which BERT files may hold besides the body.
OTHERS = r"cls\..*|qa_outputs\..*|classifier\..*|(bert\.)?pooler\..*"


def names(c: Config) -> list[tuple]:
    """Rows as in llama.names."""
    embed, block = "bert.embeddings.", "bert.encoder.layer.{}."
    attn, out = block + "attention.self.", block + "attention.output."
    rows = [
        (embed + "word_embeddings.weight", "embed/w", "v d -> v d"),
        (embed + "position_embeddings.weight", "positions/w", "p d -> p d"),
        (embed + "token_type_embeddings.weight", "token_types/w", "t d -> t d"),
        (out + "dense.weight", "layers/attn/o/w", "d (n h) -> n h d"),
        (out + "dense.bias", "layers/attn/o/b", "d -> d"),
        (block + "intermediate.dense.weight", "layers/mlp/up/w", "f d -> d f"),
        (block + "intermediate.dense.bias", "layers/mlp/up/b", "f -> f"),
        (block + "output.dense.weight", "layers/mlp/down/w", "d f -> f d"),
        (block + "output.dense.bias", "layers/mlp/down/b", "d -> d"),
    ]
    for file, name, n in [("query", "q", "n"), ("key", "k", "k"), ("value", "v", "k")]:
        rows += [
            (f"{attn}{file}.weight", f"layers/attn/{name}/w", f"({n} h) d -> d {n} h"),
            (f"{attn}{file}.bias", f"layers/attn/{name}/b", f"({n} h) -> {n} h"),
        ]
    sums = [(out, "layers/attn_sum_norm"), (block + "output.", "layers/mlp_sum_norm")]
    for file, path in [*sums, (embed, "embed_norm")]:
        rows += common.layer_norm(file + "LayerNorm", path)
    return rows + _head(c)


def _head(c) -> list[tuple]:
    rows = []
    if c.pooler:
        rows += [
            ("bert.pooler.dense.weight", "pooler/w", "p d -> d p"),
            ("bert.pooler.dense.bias", "pooler/b", "p -> p"),
        ]
    if c.classes:
        rows += [
            ("classifier.weight", "score/w", "c d -> c d"),
            ("classifier.bias", "score/b", "c -> c"),
        ]
    return rows
