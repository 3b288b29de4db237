"""Mixtral: a Mistral with a mixture of experts, the two best of a token weighing 1 together."""

import dataclasses

from sftjax.families import common, llama
from sftjax.models.decoder import Config


def config(hf: dict) -> Config:
    """decoder.Config from the fields of a Hugging Face config.json."""
    hf = {"num_key_value_heads": 8, "rms_norm_eps": 1e-5} | hf
    c = llama.config({"max_position_embeddings": 4096 * 32} | hf, rope_theta=1_000_000.0)
    return dataclasses.replace(
        c,
        experts=hf.get("num_local_experts", 8),
        experts_per_token=hf.get("num_experts_per_tok", 2),
        kinds=common.kinds(hf, [common.SLIDING], c.kinds[0].rope),
    )


def names(c: Config) -> list[tuple]:
    """Rows as in llama.names; a second "{}" in a name stands for the expert."""
    moe = llama.BLOCK + "block_sparse_moe."
    rows = [
        (moe + "gate.weight", "layers/mlp/router/w", "e d -> d e"),
        (moe + "experts.{}.w1.weight", "layers/mlp/gate/w", "f d -> d f"),
        (moe + "experts.{}.w2.weight", "layers/mlp/down/w", "d f -> f d"),
        (moe + "experts.{}.w3.weight", "layers/mlp/up/w", "f d -> d f"),
    ]
    return llama.ends(c) + llama.attention(c) + llama.norms(c) + rows
