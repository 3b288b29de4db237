"""OLMo-2: a Llama with norms after each half instead of before, and normalised queries and keys."""

from sftjax.families import llama
from sftjax.models.decoder import Config


def config(hf: dict) -> Config:
    """decoder.Config from the fields of a Hugging Face config.json."""
    return llama.config({"rms_norm_eps": 1e-5} | hf, norms="post", qk_norm="all")


def names(c: Config) -> list[tuple]:
    """Rows as in llama.names."""
    block, attn = llama.BLOCK, llama.ATTN
    norms = [
        (attn + "q_norm.weight", "layers/attn/q_norm/scale", "(n h) -> n h"),
        (attn + "k_norm.weight", "layers/attn/k_norm/scale", "(k h) -> k h"),
        (block + "post_attention_layernorm.weight", "layers/attn_post_norm/scale", "d -> d"),
        (block + "post_feedforward_layernorm.weight", "layers/mlp_post_norm/scale", "d -> d"),
    ]
    return llama.ends(c) + llama.attention(c) + norms + llama.mlp(c)
