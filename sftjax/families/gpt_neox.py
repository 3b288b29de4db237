"""GPT-NeoX and Pythia: LayerNorm, GELU, partly rotated heads, attention and MLP side by side."""

from sftjax.families import common, llama
from sftjax.models.decoder import Config


def config(hf: dict) -> Config:
    """decoder.Config from the fields of a Hugging Face config.json."""
    # rotary_pct and rotary_emb_base are the names of the time before transformers 5.
    return llama.config(
        {"attention_bias": True, "hidden_act": "gelu"} | hf | {"num_key_value_heads": None},
        rope_theta=hf.get("rotary_emb_base") or 10_000.0,
        partial=hf.get("rotary_pct") or 0.25,
        norm="layer",
        norm_eps=hf.get("layer_norm_eps", 1e-5),
        parallel=hf.get("use_parallel_residual", True),
        mlp_bias=True,
        gated=False,
    )


def names(c: Config) -> list[tuple]:
    """Rows as in llama.names."""
    block, attn = "gpt_neox.layers.{}.", "gpt_neox.layers.{}.attention."
    rows: list[tuple] = [("gpt_neox.embed_in.weight", "embed/w", "v d -> v d")]
    rows += common.matrices(attn, "layers/attn", c.out_bias, o="dense")
    rows += common.matrices(block + "mlp.", "layers/mlp", up="dense_h_to_4h", down="dense_4h_to_h")
    for i, name in enumerate("qkv"):  # of each head in turn
        qkv, part = f"layers/attn/{name}", {"c": (i, 3)}
        rows += common.linear(attn + "query_key_value", qkv, "(n c h) d -> d n h", c.qkv_bias, part)
    for file, path in [
        (block + "input_layernorm", "layers/attn_norm"),
        (block + "post_attention_layernorm", "layers/mlp_norm"),
        ("gpt_neox.final_layer_norm", "norm"),
    ]:
        rows += common.layer_norm(file, path)
    return rows + [("embed_out.weight", "head/w", "v d -> v d")] * (not c.tied)
