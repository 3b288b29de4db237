"""Qwen2 and 2.5: a Llama with biases on query, key and value; later layers may have a window."""

from typing import Any

from sftjax.families import common, llama
from sftjax.models.decoder import Config

names = llama.names


def config(hf: dict) -> Config:
    """decoder.Config from the fields of a Hugging Face config.json."""
    return windowed(hf, qkv_bias=True, out_bias=False)


def windowed(hf: dict, **more: Any) -> Config:
    """Of Qwen2 and Qwen3: windows from layer max_window_layers on, where they are used at all."""
    default = {"max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28}
    hf, depth = default | hf, hf["num_hidden_layers"]
    first = hf["max_window_layers"] if hf.get("use_sliding_window") else depth
    types = hf.get("layer_types") or [common.SLIDING if i >= first else common.FULL for i in range(depth)]
    if not hf.get("use_sliding_window"):
        hf = hf | {"sliding_window": 0}
    return llama.config(hf, types=types, **more)
