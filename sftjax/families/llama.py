"""Llama 1, 2, 3, 3.1, 3.2: RMSNorm, rotary embedding, gated SiLU, grouped query heads.

Also IQuest-Coder's plain form, whose files are a Llama's.
"""

from sftjax.families import common
from sftjax.models.decoder import Config, Kind


def config(hf: dict, rope_theta: float = 10_000.0) -> Config:
    """decoder.Config from the fields of a Hugging Face config.json."""
    hf, heads = {"max_position_embeddings": 2048} | hf, hf["num_attention_heads"]
    head_dim = hf.get("head_dim") or hf["hidden_size"] // heads
    return Config(
        vocab=hf["vocab_size"],
        width=hf["hidden_size"],
        layers=hf["num_hidden_layers"],
        heads=heads,
        kv_heads=hf.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        mlp=hf["intermediate_size"],
        max_positions=hf["max_position_embeddings"],
        kinds=(Kind(rope=common.rope(hf, head_dim, rope_theta)),),
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        tied=hf.get("tie_word_embeddings", False),
        qkv_bias=hf.get("attention_bias", False),
        out_bias=hf.get("attention_bias", False),
        mlp_bias=hf.get("mlp_bias", False),
        activation=hf.get("hidden_act", "silu"),
        init_std=hf.get("initializer_range", 0.02),
    )


def names(c: Config) -> list[tuple]:
    """(Hugging Face name, parameter, layout[, part]) rows; "{}" in a name stands for the layer.

    The layout says how the file's dimensions become the parameter's, see layout.py. Parameters
    under "layers/" are given without the stack's name.
    """
    return ends(c) + attention(c) + norms(c) + mlp(c)


# Parts, for the families that share them.

BLOCK = "model.layers.{}."
ATTN, MLP = BLOCK + "self_attn.", BLOCK + "mlp."


def ends(c: Config) -> list[tuple]:
    """Return the rows of the embedding, the last norm and, unless it is tied, the head."""
    rows = [
        ("model.embed_tokens.weight", "embed/w", "v d -> v d"),
        ("model.norm.weight", "norm/scale", "d -> d"),
    ]
    return rows + [("lm_head.weight", "head/w", "v d -> v d")] * (not c.tied)


def attention(c: Config) -> list[tuple]:
    """Return the rows of a layer's attention."""
    rows = [
        (ATTN + "q_proj.weight", "layers/attn/q/w", "(n h) d -> d n h"),
        (ATTN + "k_proj.weight", "layers/attn/k/w", "(k h) d -> d k h"),
        (ATTN + "v_proj.weight", "layers/attn/v/w", "(k h) d -> d k h"),
        (ATTN + "o_proj.weight", "layers/attn/o/w", "d (n h) -> n h d"),
    ]
    if c.qkv_bias:
        rows += [
            (ATTN + "q_proj.bias", "layers/attn/q/b", "(n h) -> n h"),
            (ATTN + "k_proj.bias", "layers/attn/k/b", "(k h) -> k h"),
            (ATTN + "v_proj.bias", "layers/attn/v/b", "(k h) -> k h"),
        ]
    if c.out_bias:
        rows.append((ATTN + "o_proj.bias", "layers/attn/o/b", "d -> d"))
    if c.qk_norm == "head":
        rows += [
            (ATTN + "q_norm.weight", "layers/attn/q_norm/scale", "h -> h"),
            (ATTN + "k_norm.weight", "layers/attn/k_norm/scale", "h -> h"),
        ]
    return rows


def norms(c: Config) -> list[tuple]:
    """Return the rows of a layer's two norms."""
    return [
        (BLOCK + "input_layernorm.weight", "layers/attn_norm/scale", "d -> d"),
        (BLOCK + "post_attention_layernorm.weight", "layers/mlp_norm/scale", "d -> d"),
    ]


def mlp(c: Config) -> list[tuple]:
    """Return the rows of a layer's dense MLP."""
    rows = [
        (MLP + "gate_proj.weight", "layers/mlp/gate/w", "f d -> d f"),
        (MLP + "up_proj.weight", "layers/mlp/up/w", "f d -> d f"),
        (MLP + "down_proj.weight", "layers/mlp/down/w", "d f -> f d"),
    ]
    if c.mlp_bias:
        rows += [
            (MLP + "gate_proj.bias", "layers/mlp/gate/b", "f -> f"),
            (MLP + "up_proj.bias", "layers/mlp/up/b", "f -> f"),
            (MLP + "down_proj.bias", "layers/mlp/down/b", "d -> d"),
        ]
    return rows
