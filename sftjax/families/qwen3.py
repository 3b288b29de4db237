"""Qwen3: a Llama whose queries and keys are normalised head by head."""

import dataclasses

from sftjax.families import llama, qwen2
from sftjax.models.decoder import Config

names = llama.names


def config(hf: dict) -> Config:
    """decoder.Config from the fields of a Hugging Face config.json."""
    c = llama.config({"max_position_embeddings": 32768, "head_dim": 128} | hf)
    return dataclasses.replace(c, qk_norm="head", kinds=qwen2.kinds(hf, c))
