"""GPT-2: learned positions, LayerNorm, GELU, biases everywhere, tied head.

Weights are stored [in, out]. Its dropout is not applied: sftjax trains without.
"""

from sftjax.families import common
from sftjax.models.decoder import Config, Kind


def config(hf: dict) -> Config:
    """decoder.Config from the fields of a Hugging Face config.json."""
    common.refuse(hf, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    return Config(
        vocab=hf["vocab_size"],
        width=hf["n_embd"],
        layers=hf["n_layer"],
        heads=hf["n_head"],
        kv_heads=hf["n_head"],
        head_dim=hf["n_embd"] // hf["n_head"],
        mlp=hf.get("n_inner") or 4 * hf["n_embd"],
        max_positions=hf.get("n_positions", 1024),
        kinds=(Kind(rope=None),),
        norm="layer",
        norm_eps=hf.get("layer_norm_epsilon", 1e-5),
        tied=hf.get("tie_word_embeddings", True),
        learned_positions=True,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        gated=False,
        activation=hf.get("activation_function", "gelu_new"),
        init_std=hf.get("initializer_range", 0.02),
    )


def names(c: Config) -> list[tuple]:
    """Rows as in llama.names."""
    block, n = "transformer.h.{}.", c.heads
    qkv, out = block + "attn.c_attn.", block + "attn.c_proj."
    up, down = block + "mlp.c_fc.", block + "mlp.c_proj."
    rows: list[tuple] = [
        ("transformer.wte.weight", "embed/w", "v d -> v d"),
        ("transformer.wpe.weight", "positions/w", "p d -> p d"),
        (out + "weight", "layers/attn/o/w", "(n h) d -> n h d"),
        (out + "bias", "layers/attn/o/b", "d -> d"),
        (up + "weight", "layers/mlp/up/w", "d f -> d f"),
        (up + "bias", "layers/mlp/up/b", "f -> f"),
        (down + "weight", "layers/mlp/down/w", "f d -> f d"),
        (down + "bias", "layers/mlp/down/b", "d -> d"),
    ]
    for i, (name, heads) in enumerate([("q", "n"), ("k", "k"), ("v", "k")]):
        part = {heads: (i * n, 3 * n)}
        rows += [
            (qkv + "weight", f"layers/attn/{name}/w", f"d ({heads} h) -> d {heads} h", part),
            (qkv + "bias", f"layers/attn/{name}/b", f"({heads} h) -> {heads} h", part),
        ]
    places = [(block + "ln_1", "layers/attn_norm"), (block + "ln_2", "layers/mlp_norm")]
    for file, path in [*places, ("transformer.ln_f", "norm")]:
        rows += common.layer_norm(file, path)
    return rows + [("lm_head.weight", "head/w", "v d -> v d")] * (not c.tied)
