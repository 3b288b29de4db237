"""Granite 3: a Llama with constant multipliers on embedding, attention, residual and logits."""

from sftjax.families import llama
from sftjax.models.decoder import Config

names = llama.names


def config(hf: dict) -> Config:
    """decoder.Config from the fields of a Hugging Face config.json."""
    return llama.config(
        hf,
        embed_scale=float(hf.get("embedding_multiplier", 1.0)),
        attn_scale=float(hf.get("attention_multiplier", 1.0)),
        residual_scale=float(hf.get("residual_multiplier", 1.0)),
        logit_scale=1.0 / hf.get("logits_scaling", 1.0),
    )
