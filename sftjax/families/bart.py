"""BART: learned positions, LayerNorm of the embeddings and after each sum, GELU, biases everywhere.

`dropout` is applied where encoder_decoder.py says; attention_dropout and activation_dropout are not. final_logits_bias,
which no training changes, must be 0.
"""

from sftjax.errors import ModelError
from sftjax.families import common
from sftjax.models.encoder_decoder import Config

COPIES = r"(model\.)?(encoder|decoder)\.embed_tokens\.weight|lm_head\.weight"
ZEROS = r"final_logits_bias"


def config(hf: dict) -> Config:
    """encoder_decoder.Config from the fields of a Hugging Face config.json."""
    common.refuse(hf, tie_word_embeddings=True)
    width, heads = hf["d_model"], hf["decoder_attention_heads"]
    for key in ("decoder_attention_heads", "encoder_attention_heads"):
        if width % hf[key]:
            raise ModelError(f"d_model={width} does not divide over {key}={hf[key]}")
    return Config(
        vocab=hf["vocab_size"],
        width=width,
        layers=hf["decoder_layers"],
        heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        mlp=hf["decoder_ffn_dim"],
        encoder_layers=hf["encoder_layers"],
        encoder_heads=hf["encoder_attention_heads"],
        encoder_mlp=hf["encoder_ffn_dim"],
        max_positions=hf.get("max_position_embeddings", 1024),
        learned_positions=True,
        first_position=2,
        norm="layer",
        norms="residual",
        embed_norm=True,
        final_norm=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        gated=False,
        activation=hf.get("activation_function", "gelu"),
        tied=True,
        embed_scale=width**0.5 if hf.get("scale_embedding") else 1.0,
        init_std=hf.get("init_std", 0.02),
        dropout=hf.get("dropout", 0.1),
        start_id=2 if (start := hf.get("decoder_start_token_id")) is None else start,
    )


def names(c: Config) -> list[tuple]:
    """Rows as in llama.names."""
    rows: list[tuple] = [("model.shared.weight", "embed/w", "v d -> v d")]
    attn = dict(q="q_proj", k="k_proj", v="v_proj", o="out_proj")
    for side, own in (("encoder", c.encoder), ("decoder", c)):
        path, file = "encoder/" * (own is not c), f"model.{side}."
        block = file + "layers.{}."
        rows.append((f"{file}embed_positions.weight", f"{path}positions/w", "p d -> p d"))
        norms = [(f"{file}layernorm_embedding", f"{path}embed_norm")]
        for part, name in (("attn", "self_attn"), ("cross", "encoder_attn"))[: 1 + own.cross]:
            rows += common.matrices(f"{block}{name}.", f"{path}layers/{part}", True, **attn)
            norms.append((f"{block}{name}_layer_norm", f"{path}layers/{part}_sum_norm"))
        rows += common.matrices(block, f"{path}layers/mlp", up="fc1", down="fc2")
        norms.append((f"{block}final_layer_norm", f"{path}layers/mlp_sum_norm"))
        rows += [row for norm in norms for row in common.layer_norm(*norm)]
    return rows
