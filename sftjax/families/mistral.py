"""Mistral: a Llama with sliding-window attention."""

import dataclasses

from sftjax.families import common, llama
from sftjax.models.decoder import Config

names = llama.names


def config(hf: dict) -> Config:
    """decoder.Config from the fields of a Hugging Face config.json."""
    common.refuse(hf, layer_types=None)
    hf = {"sliding_window": 4096, "num_key_value_heads": 8} | hf
    hf = hf | {"max_position_embeddings": hf.get("max_position_embeddings", 4096 * 32)}
    c = llama.config(hf)
    return dataclasses.replace(c, kinds=common.kinds(hf, [common.SLIDING], c.kinds[0].rope))
