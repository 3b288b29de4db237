"""Mistral: a Llama with sliding-window attention."""

from sftjax.families import common, llama
from sftjax.models.decoder import Config

names = llama.names


def config(hf: dict) -> Config:
    """decoder.Config from the fields of a Hugging Face config.json."""
    common.refuse(hf, layer_types=None)
    hf = {"sliding_window": 4096, "num_key_value_heads": 8} | hf
    return llama.config({"max_position_embeddings": 4096 * 32} | hf, types=[common.SLIDING])
