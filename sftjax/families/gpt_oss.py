"""gpt-oss: experts with biases and a clamped SwiGLU, attention sinks, every second a window."""

# It is read from its bf16 files; the mxfp4 ones are quantised and refused.

from sftjax.families import common, llama
from sftjax.models.decoder import Config

YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def config(hf: dict) -> Config:
    """decoder.Config from the fields of a Hugging Face config.json."""
    hf = {"head_dim": 64, "num_key_value_heads": 8, "rms_norm_eps": 1e-5} | hf
    hf = {"max_position_embeddings": 131072, "sliding_window": 128, "attention_bias": True} | hf
    if not (hf.get("rope_parameters") or hf.get("rope_scaling")):
        hf["rope_parameters"] = YARN
    return llama.config(
        hf,
        rope_theta=150_000.0,
        types=hf.get("layer_types") or common.alternating(hf["num_hidden_layers"]),
        sinks=True,
        mlp_bias=True,
        experts=hf.get("num_local_experts", 128),
        experts_per_token=hf.get("num_experts_per_tok", 4),
        swiglu_alpha=hf.get("swiglu_alpha", 1.702),
        swiglu_limit=hf.get("swiglu_limit", 7.0),
    )


def names(c: Config) -> list[tuple]:
    """Rows as in llama.names."""
    mlp = llama.MLP
    rows: list[tuple] = [
        (llama.ATTN + "sinks", "layers/attn/sinks", "n -> n"),
        *common.linear(mlp + "router", "layers/mlp/router", "e d -> d e"),
        (mlp + "experts.down_proj", "layers/mlp/down/w", "e f d -> e f d"),
        (mlp + "experts.down_proj_bias", "layers/mlp/down/b", "e d -> e d"),
    ]
    for i, name in enumerate(("gate", "up")):  # column by column in turn
        part = {"c": (i, 2)}
        rows += [
            (mlp + "experts.gate_up_proj", f"layers/mlp/{name}/w", "e d (f c) -> e d f", part),
            (mlp + "experts.gate_up_proj_bias", f"layers/mlp/{name}/b", "e (f c) -> e f", part),
        ]
    return llama.ends(c) + llama.attention(c) + llama.norms(c) + rows
