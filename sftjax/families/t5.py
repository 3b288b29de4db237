"""T5 1.0, 1.1 and Flan-T5: distances in buckets, RMSNorm, no biases, scores that are not scaled.

1.0 has one MLP matrix before its ReLU and reads its logits from the scaled embedding; 1.1 a gated GELU and a head of
its own. dropout_rate is applied where encoder_decoder.py says.
"""

import dataclasses
from collections.abc import Container

from sftjax.errors import ModelError
from sftjax.families import common
from sftjax.models.encoder_decoder import Config

COPIES = r"(encoder|decoder)\.embed_tokens\.weight"  # of the embedding, in old files
ACTIVATIONS = {"relu": "relu", "gated-gelu": "gelu_new", "gated-silu": "silu"}


def config(hf: dict) -> Config:
    """encoder_decoder.Config from the fields of a Hugging Face config.json."""
    form = hf.get("feed_forward_proj", "relu")
    if form not in ACTIVATIONS:
        raise ModelError(f"feed_forward_proj {form!r} is not supported: {', '.join(ACTIVATIONS)}")
    tied, heads = hf.get("tie_word_embeddings", True), hf["num_heads"]
    buckets = hf.get("relative_attention_num_buckets", 32)
    if buckets < 4 or (furthest := hf.get("relative_attention_max_distance", 128)) <= buckets // 2:
        raise ModelError(f"relative_attention_num_buckets={buckets} do not fit the max_distance")
    return Config(
        vocab=hf["vocab_size"],
        width=hf["d_model"],
        layers=hf.get("num_decoder_layers") or hf["num_layers"],
        heads=heads,
        kv_heads=heads,
        head_dim=hf["d_kv"],
        mlp=hf["d_ff"],
        encoder_layers=hf["num_layers"],
        encoder_heads=heads,
        encoder_mlp=hf["d_ff"],
        norm_eps=hf.get("layer_norm_epsilon", 1e-6),
        attn_scale=1.0,
        buckets=buckets,
        furthest=furthest,
        gated=form.startswith("gated"),
        activation=ACTIVATIONS[form],
        tied=tied,
        logit_scale=hf["d_model"] ** -0.5 if hf.get("scale_decoder_outputs", tied) else 1.0,
        dropout=hf.get("dropout_rate", 0.1),
        start_id=hf.get("decoder_start_token_id") or 0,
    )


def as_stored(c: Config, files: Container[str]) -> Config:
    """Untied where the files hold a head: transformers 5 calls a 1.1 tied, and writes its head."""
    own = c.logit_scale == 1 and "lm_head.weight" in files
    return dataclasses.replace(c, tied=False) if own else c


def names(c: Config) -> list[tuple]:
    """Rows as in llama.names."""
    rows: list[tuple] = [("shared.weight", "embed/w", "v d -> v d")]
    for side, own in (("encoder", c.encoder), ("decoder", c)):
        path, block = "encoder/" * (own is not c), f"{side}.block.{{}}.layer."
        parts = [("attn", "SelfAttention")] + [("cross", "EncDecAttention")] * own.cross
        for i, (part, file) in enumerate(parts):
            file, letters = f"{block}{i}.{file}.", {x: x for x in "qkvo"}
            rows += common.matrices(file, f"{path}layers/{part}", False, **letters)
        mlp, ups = f"{block}{len(parts)}.DenseReluDense.", dict(gate="wi_0", up="wi_1")
        ups = ups if own.gated else dict(up="wi")
        rows += common.matrices(mlp, f"{path}layers/mlp", False, **ups, down="wo")
        for i, part in enumerate([*(part for part, _ in parts), "mlp"]):
            norm = f"{path}layers/{part}_norm/scale"
            rows.append((f"{block}{i}.layer_norm.weight", norm, "d -> d"))
        table = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        rows.append((table, f"{path}distances/w", "b n -> n b"))
        rows.append((f"{side}.final_layer_norm.weight", f"{path}norm/scale", "d -> d"))
    return rows + [("lm_head.weight", "head/w", "v d -> v d")] * (not c.tied)
