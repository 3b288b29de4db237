"""Phi-3, 3.5 and 4: a Llama whose files fuse query, key and value, and gate and up."""

from sftjax.families import common, llama
from sftjax.models.decoder import Config


def config(hf: dict) -> Config:
    """decoder.Config from the fields of a Hugging Face config.json."""
    hf = {"max_position_embeddings": 4096, "original_max_position_embeddings": 4096} | hf
    scaling = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    kind = scaling.get("rope_type") or scaling.get("type")
    if kind in ("su", "yarn"):  # early names of longrope
        hf["rope_scaling"] = scaling | {"rope_type": "longrope", "type": "longrope"}
    return llama.config({"rms_norm_eps": 1e-5} | hf, types=[common.SLIDING])


def names(c: Config) -> list[tuple]:
    """Rows as in llama.names."""
    attn, mlp, n, k, f = llama.ATTN, llama.MLP, c.heads, c.kv_heads, c.mlp
    rows = common.fused(attn + "qkv_proj", "layers/attn", False, q=n, k=k, v=k)
    rows += common.matrices(attn, "layers/attn", False, o="o_proj")
    rows += common.fused(mlp + "gate_up_proj", "layers/mlp", False, gate=f, up=f)
    rows += common.matrices(mlp, "layers/mlp", False, down="down_proj")
    return llama.ends(c) + llama.norms(c) + rows
