"""Qwen3: a Llama whose queries and keys are normalised head by head."""

from sftjax.families import llama, qwen2
from sftjax.models.decoder import Config

names = llama.names


def config(hf: dict) -> Config:
    """decoder.Config from the fields of a Hugging Face config.json."""
    return qwen2.windowed({"head_dim": 128} | hf, qk_norm="head")
