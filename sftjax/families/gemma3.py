"""Gemma 3, text: Gemma 2 without soft caps, with normalised queries and keys."""

# To each global layer it has five local ones, with a rotary base of their own.

import dataclasses

from sftjax.errors import ModelError
from sftjax.families import common, gemma2
from sftjax.models.decoder import Config, Kind

names = gemma2.names


def config(hf: dict) -> Config:
    """decoder.Config from the fields of a Hugging Face config.json."""
    hf = {"max_position_embeddings": 131072, "sliding_window": 4096} | hf
    hf = {"attn_logit_softcapping": None, "final_logit_softcapping": None} | hf
    if not hf["sliding_window"]:
        raise ModelError("sliding_window is 0 or null, expected a positive whole number")
    nested = hf.get("rope_parameters") or {}
    each = {name: nested.get(name) for name in (common.FULL, common.SLIDING)}
    period = hf.get("sliding_window_pattern") or hf.get("_sliding_window_pattern") or 6
    types = hf.get("layer_types") or common.alternating(hf["num_hidden_layers"], period)
    flat = {k: v for k, v in hf.items() if k != "rope_parameters"}
    c = gemma2.config(flat | {"layer_types": types})
    local = {k: v for k, v in flat.items() if k not in ("rope_theta", "rope_scaling")}
    local_theta = hf.get("rope_local_base_freq") or 10_000.0
    ropes = {
        0: common.rope(flat, c.head_dim, 1_000_000.0, of=each[common.FULL]),
        hf["sliding_window"]: common.rope(local, c.head_dim, local_theta, of=each[common.SLIDING]),
    }
    return dataclasses.replace(c, qk_norm="head", kinds=tuple(Kind(k.window, ropes[k.window]) for k in c.kinds))
