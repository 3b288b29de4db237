"""Gemma 2: Gemma with norms before and after, soft caps, and every other layer a window."""

from sftjax.families import common, gemma, llama
from sftjax.models.decoder import Config


def config(hf: dict) -> Config:
    """decoder.Config from the fields of a Hugging Face config.json."""
    hf = {"num_key_value_heads": 4, "sliding_window": 4096, "query_pre_attn_scalar": 256} | hf
    hf = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0} | hf
    return gemma.config(
        hf,
        types=hf.get("layer_types") or common.alternating(hf["num_hidden_layers"]),
        norms="both",
        activation=hf.get("hidden_activation") or "gelu_pytorch_tanh",  # hidden_act is not read
        attn_scale=hf["query_pre_attn_scalar"] ** -0.5,
        attn_softcap=hf["attn_logit_softcapping"] or 0.0,
        logit_softcap=hf["final_logit_softcapping"] or 0.0,
    )


def names(c: Config) -> list[tuple]:
    """Rows as in llama.names."""
    block = llama.BLOCK
    norms = [
        (block + "input_layernorm.weight", "layers/attn_norm/scale", "d -> d"),
        (block + "post_attention_layernorm.weight", "layers/attn_post_norm/scale", "d -> d"),
        (block + "pre_feedforward_layernorm.weight", "layers/mlp_norm/scale", "d -> d"),
        (block + "post_feedforward_layernorm.weight", "layers/mlp_post_norm/scale", "d -> d"),
    ]
    return llama.ends(c) + llama.attention(c) + norms + llama.mlp(c)
