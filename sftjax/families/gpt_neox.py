"""GPT-NeoX and Pythia: LayerNorm, GELU, partly rotated heads, attention and MLP side by side."""

from sftjax.families import common
from sftjax.models.decoder import Config, Kind


def config(hf: dict) -> Config:
    """decoder.Config from the fields of a Hugging Face config.json."""
    hf, heads = {"max_position_embeddings": 2048} | hf, hf["num_attention_heads"]
    head_dim = hf["hidden_size"] // heads
    # rotary_pct and rotary_emb_base are the names of the time before transformers 5.
    rope = common.rope(
        hf, head_dim, hf.get("rotary_emb_base") or 10_000.0, hf.get("rotary_pct") or 0.25
    )
    return Config(
        vocab=hf["vocab_size"],
        width=hf["hidden_size"],
        layers=hf["num_hidden_layers"],
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        mlp=hf["intermediate_size"],
        max_positions=hf["max_position_embeddings"],
        kinds=(Kind(rope=rope),),
        norm="layer",
        norm_eps=hf.get("layer_norm_eps", 1e-5),
        parallel=hf.get("use_parallel_residual", True),
        tied=hf.get("tie_word_embeddings", False),
        qkv_bias=hf.get("attention_bias", True),
        out_bias=hf.get("attention_bias", True),
        mlp_bias=True,
        gated=False,
        activation=hf.get("hidden_act", "gelu"),
        init_std=hf.get("initializer_range", 0.02),
    )


def names(c: Config) -> list[tuple]:
    """Rows as in llama.names."""
    block = "gpt_neox.layers.{}."
    qkv, out = block + "attention.query_key_value.", block + "attention.dense."
    up, down = block + "mlp.dense_h_to_4h.", block + "mlp.dense_4h_to_h."
    rows: list[tuple] = [
        ("gpt_neox.embed_in.weight", "embed/w", "v d -> v d"),
        (out + "weight", "layers/attn/o/w", "d (n h) -> n h d"),
        (up + "weight", "layers/mlp/up/w", "f d -> d f"),
        (up + "bias", "layers/mlp/up/b", "f -> f"),
        (down + "weight", "layers/mlp/down/w", "d f -> f d"),
        (down + "bias", "layers/mlp/down/b", "d -> d"),
    ]
    for i, name in enumerate("qkv"):  # of each head in turn
        part = {"c": (i, 3)}
        rows.append((qkv + "weight", f"layers/attn/{name}/w", "(n c h) d -> d n h", part))
        if c.qkv_bias:
            rows.append((qkv + "bias", f"layers/attn/{name}/b", "(n c h) -> n h", part))
    if c.out_bias:
        rows.append((out + "bias", "layers/attn/o/b", "d -> d"))
    for file, path in [
        (block + "input_layernorm", "layers/attn_norm"),
        (block + "post_attention_layernorm", "layers/mlp_norm"),
        ("gpt_neox.final_layer_norm", "norm"),
    ]:
        rows += common.layer_norm(file, path)
    return rows + [("embed_out.weight", "head/w", "v d -> v d")] * (not c.tied)
