"""Phi-3, 3.5 and 4: a Llama whose files fuse query, key and value, and gate and up."""

import dataclasses

from sftjax.families import common, llama
from sftjax.models.decoder import Config


def config(hf: dict) -> Config:
    """decoder.Config from the fields of a Hugging Face config.json."""
    hf = {"max_position_embeddings": 4096, "original_max_position_embeddings": 4096} | hf
    scaling = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    kind = scaling.get("rope_type") or scaling.get("type")
    if kind in ("su", "yarn"):  # early names of longrope
        hf["rope_scaling"] = scaling | {"rope_type": "longrope", "type": "longrope"}
    c = llama.config({"rms_norm_eps": 1e-5} | hf)
    return dataclasses.replace(c, kinds=common.kinds(hf, [common.SLIDING], c.kinds[0].rope))


def names(c: Config) -> list[tuple]:
    """Rows as in llama.names."""
    attn, mlp, n, k = llama.ATTN, llama.MLP, c.heads, c.kv_heads
    qkv, gate_up, heads, f = attn + "qkv_proj.weight", mlp + "gate_up_proj.weight", n + 2 * k, c.mlp
    rows = [
        (qkv, "layers/attn/q/w", "(n h) d -> d n h", {"n": (0, heads)}),
        (qkv, "layers/attn/k/w", "(k h) d -> d k h", {"k": (n, heads)}),
        (qkv, "layers/attn/v/w", "(k h) d -> d k h", {"k": (n + k, heads)}),
        (attn + "o_proj.weight", "layers/attn/o/w", "d (n h) -> n h d"),
        (gate_up, "layers/mlp/gate/w", "f d -> d f", {"f": (0, 2 * f)}),
        (gate_up, "layers/mlp/up/w", "f d -> d f", {"f": (f, 2 * f)}),
        (mlp + "down_proj.weight", "layers/mlp/down/w", "d f -> f d"),
    ]
    return llama.ends(c) + llama.norms(c) + rows
