"""Qwen3-MoE: Qwen3 with a mixture of experts in every layer."""

from sftjax.families import common, llama, qwen2
from sftjax.models.decoder import Config


def config(hf: dict) -> Config:
    """decoder.Config from the fields of a Hugging Face config.json."""
    common.refuse(hf, mlp_only_layers=[], decoder_sparse_step=1)
    sliding = [common.SLIDING] if hf.get("use_sliding_window") else None
    return qwen2.windowed(
        {"num_key_value_heads": 4} | hf | {"layer_types": sliding},
        qk_norm="head",
        mlp=hf.get("moe_intermediate_size", 768),
        experts=hf.get("num_local_experts") or hf.get("num_experts", 128),  # new name, and old
        experts_per_token=hf.get("num_experts_per_tok", 8),
        renormalise=hf.get("norm_topk_prob", False),
    )


def names(c: Config) -> list[tuple]:
    """Rows as in llama.names; a second "{}" in a name stands for the expert."""
    rows = common.linear(llama.MLP + "gate", "layers/mlp/router", "e d -> d e", False)
    return llama.ends(c) + llama.attention(c) + llama.norms(c) + rows + llama.mlp(c, "experts.{}.")
