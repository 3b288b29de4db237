"""Llama 1, 2, 3, 3.1, 3.2: RMSNorm, rotary embedding, gated SiLU, grouped query heads.

Also IQuest-Coder's plain form, whose files are a Llama's.
"""

from collections.abc import Sequence
from typing import Any

from sftjax.families import common
from sftjax.models.decoder import Config


def config(
    hf: dict, rope_theta: float = 10_000.0, partial: float = 1.0, types: Sequence[str] = (common.FULL,), **more: Any
) -> Config:
    """decoder.Config from the fields of a Hugging Face config.json.

    rope_theta, partial: as of common.rope; types: of the layers, as of common.kinds; more: fields of the Config of a
    family alike.
    """
    hf, heads = {"max_position_embeddings": 2048} | hf, hf["num_attention_heads"]
    head_dim = hf.get("head_dim") or hf["hidden_size"] // heads
    fields: dict[str, Any] = dict(
        vocab=hf["vocab_size"],
        width=hf["hidden_size"],
        layers=hf["num_hidden_layers"],
        heads=heads,
        kv_heads=hf.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        mlp=hf["intermediate_size"],
        max_positions=hf["max_position_embeddings"],
        kinds=common.kinds(hf, types, common.rope(hf, head_dim, rope_theta, partial)),
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        tied=hf.get("tie_word_embeddings", False),
        qkv_bias=hf.get("attention_bias", False),
        out_bias=hf.get("attention_bias", False),
        mlp_bias=hf.get("mlp_bias", False),
        activation=hf.get("hidden_act", "silu"),
        init_std=hf.get("initializer_range", 0.02),
    )
    return Config(**fields | more)


def names(c: Config) -> list[tuple]:
    """(Hugging Face name, parameter, layout[, part]) rows; "{}" in a name stands for the layer.

    The layout says how the file's dimensions become the parameter's, see layout.py. Parameters under "layers/" are
    given without the stack's name.
    """
    return ends(c) + attention(c) + norms(c) + mlp(c)


# Parts, for the families that share them.

BLOCK = "model.layers.{}."
ATTN, MLP = BLOCK + "self_attn.", BLOCK + "mlp."


def ends(c: Config) -> list[tuple]:
    """Return the rows of the embedding, the last norm and, unless it is tied, the head."""
    rows = [("model.embed_tokens.weight", "embed/w", "v d -> v d"), ("model.norm.weight", "norm/scale", "d -> d")]
    return rows + [("lm_head.weight", "head/w", "v d -> v d")] * (not c.tied)


def attention(c: Config) -> list[tuple]:
    """Return the rows of a layer's attention."""
    path = "layers/attn"
    rows = common.matrices(ATTN, path, c.qkv_bias, q="q_proj", k="k_proj", v="v_proj")
    rows += common.matrices(ATTN, path, c.out_bias, o="o_proj")
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


def mlp(c: Config, each: str = "") -> list[tuple]:
    """Return the rows of a layer's MLP. each: the folder of one of several experts."""
    files = dict(gate="gate_proj", up="up_proj", down="down_proj")
    return common.matrices(MLP + each, "layers/mlp", c.mlp_bias, **files)
