"""Mixtral: a Mistral with a mixture of experts, the two best of a token weighing 1 together."""

from sftjax.families import common, llama
from sftjax.models.decoder import Config


def config(hf: dict) -> Config:
    """decoder.Config from the fields of a Hugging Face config.json."""
    hf = {"num_key_value_heads": 8, "rms_norm_eps": 1e-5} | hf
    return llama.config(
        {"max_position_embeddings": 4096 * 32} | hf,
        rope_theta=1_000_000.0,
        types=[common.SLIDING],
        experts=hf.get("num_local_experts", 8),
        experts_per_token=hf.get("num_experts_per_tok", 2),
    )


def names(c: Config) -> list[tuple]:
    """Rows as in llama.names; a second "{}" in a name stands for the expert."""
    moe = llama.BLOCK + "block_sparse_moe."
    rows = common.linear(moe + "gate", "layers/mlp/router", "e d -> d e", False)
    files = dict(gate="w1", down="w2", up="w3")
    rows += common.matrices(moe + "experts.{}.", "layers/mlp", False, **files)
    return llama.ends(c) + llama.attention(c) + llama.norms(c) + rows
