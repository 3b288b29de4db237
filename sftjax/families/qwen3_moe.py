"""Qwen3-MoE: Qwen3 with a mixture of experts in every layer."""

import dataclasses

from sftjax.families import common, llama, qwen2
from sftjax.models.decoder import Config


def config(hf: dict) -> Config:
    """decoder.Config from the fields of a Hugging Face config.json."""
    common.refuse(hf, mlp_only_layers=[], decoder_sparse_step=1)
    hf = {"max_position_embeddings": 32768, "num_key_value_heads": 4} | hf
    c = llama.config(hf)
    types = [common.SLIDING] * c.layers if hf.get("use_sliding_window") else None
    return dataclasses.replace(
        c,
        qk_norm="head",
        mlp=hf.get("moe_intermediate_size", 768),
        experts=hf.get("num_local_experts") or hf.get("num_experts", 128),  # new name, and old
        experts_per_token=hf.get("num_experts_per_tok", 8),
        renormalise=hf.get("norm_topk_prob", False),
        kinds=qwen2.kinds(hf | {"layer_types": types}, c),
    )


def names(c: Config) -> list[tuple]:
    """Rows as in llama.names; a second "{}" in a name stands for the expert."""
    mlp = llama.MLP
    rows = [
        (mlp + "gate.weight", "layers/mlp/router/w", "e d -> d e"),
        (mlp + "experts.{}.gate_proj.weight", "layers/mlp/gate/w", "f d -> d f"),
        (mlp + "experts.{}.up_proj.weight", "layers/mlp/up/w", "f d -> d f"),
        (mlp + "experts.{}.down_proj.weight", "layers/mlp/down/w", "d f -> f d"),
    ]
    return llama.ends(c) + llama.attention(c) + llama.norms(c) + rows
