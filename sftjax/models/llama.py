"""Llama 1, 2, 3, 3.1, 3.2: RMSNorm, rotary embedding, gated SiLU, grouped query heads."""

from sftjax.models.decoder import Config


def config(hf: dict) -> Config:
    """decoder.Config from the fields of a Hugging Face config.json."""
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    rope = {("rope_type" if k == "type" else k): v for k, v in rope.items()}
    theta = rope.pop("rope_theta", None) or hf.get("rope_theta", 10_000.0)
    heads = hf["num_attention_heads"]
    return Config(
        vocab=hf["vocab_size"],
        width=hf["hidden_size"],
        layers=hf["num_hidden_layers"],
        heads=heads,
        kv_heads=hf.get("num_key_value_heads") or heads,
        head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
        mlp=hf["intermediate_size"],
        max_positions=hf.get("max_position_embeddings", 2048),
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        rope_theta=float(theta),
        rope_scaling=tuple(sorted(rope.items())),
        tied=hf.get("tie_word_embeddings", False),
        qkv_bias=hf.get("attention_bias", False),
        out_bias=hf.get("attention_bias", False),
        mlp_bias=hf.get("mlp_bias", False),
        activation=hf.get("hidden_act", "silu"),
        init_std=hf.get("initializer_range", 0.02),
    )


def names(c: Config) -> list[tuple[str, str, str]]:
    """(Hugging Face name, parameter, layout) rows; "{}" in a name stands for the layer.

    The layout says how the file's dimensions become the parameter's: "(n h) d -> d n h". Parameters
    under "layers/" are given without the stack's name.
    """
    block, attn, mlp = "model.layers.{}.", "model.layers.{}.self_attn.", "model.layers.{}.mlp."
    rows = [
        ("model.embed_tokens.weight", "embed/w", "v d -> v d"),
        (block + "input_layernorm.weight", "layers/attn_norm/scale", "d -> d"),
        (attn + "q_proj.weight", "layers/attn/q/w", "(n h) d -> d n h"),
        (attn + "k_proj.weight", "layers/attn/k/w", "(k h) d -> d k h"),
        (attn + "v_proj.weight", "layers/attn/v/w", "(k h) d -> d k h"),
        (attn + "o_proj.weight", "layers/attn/o/w", "d (n h) -> n h d"),
        (block + "post_attention_layernorm.weight", "layers/mlp_norm/scale", "d -> d"),
        (mlp + "gate_proj.weight", "layers/mlp/gate/w", "f d -> d f"),
        (mlp + "up_proj.weight", "layers/mlp/up/w", "f d -> d f"),
        (mlp + "down_proj.weight", "layers/mlp/down/w", "d f -> f d"),
        ("model.norm.weight", "norm/scale", "d -> d"),
    ]
    if c.qkv_bias:
        rows += [
            (attn + "q_proj.bias", "layers/attn/q/b", "(n h) -> n h"),
            (attn + "k_proj.bias", "layers/attn/k/b", "(k h) -> k h"),
            (attn + "v_proj.bias", "layers/attn/v/b", "(k h) -> k h"),
        ]
    if c.out_bias:
        rows.append((attn + "o_proj.bias", "layers/attn/o/b", "d -> d"))
    if c.mlp_bias:
        rows += [
            (mlp + "gate_proj.bias", "layers/mlp/gate/b", "f -> f"),
            (mlp + "up_proj.bias", "layers/mlp/up/b", "f -> f"),
            (mlp + "down_proj.bias", "layers/mlp/down/b", "d -> d"),
        ]
    if not c.tied:
        rows.append(("lm_head.weight", "head/w", "v d -> v d"))
    return rows
