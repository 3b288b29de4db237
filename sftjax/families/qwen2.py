"""Qwen2 and 2.5: a Llama with biases on query, key and value; later layers may have a window."""

import dataclasses

from sftjax.families import common, llama
from sftjax.models.decoder import Config, Kind

names = llama.names


def config(hf: dict) -> Config:
    """decoder.Config from the fields of a Hugging Face config.json."""
    c = llama.config({"max_position_embeddings": 32768} | hf)
    return dataclasses.replace(c, qkv_bias=True, out_bias=False, kinds=kinds(hf, c))


def kinds(hf: dict, c: Config) -> tuple[Kind, ...]:
    """Of Qwen2 and Qwen3: windows from layer max_window_layers on, where they are used at all."""
    hf = {"sliding_window": 4096, "max_window_layers": 28} | hf
    first = hf["max_window_layers"] if hf.get("use_sliding_window") else c.layers
    types = hf.get("layer_types") or [
        common.SLIDING if i >= first else common.FULL for i in range(c.layers)
    ]
    if not hf.get("use_sliding_window"):
        hf = hf | {"sliding_window": 0}
    return common.kinds(hf, types, c.kinds[0].rope)
