"""Gemma 1: a Llama with scaled embeddings, GELU, and norm scales stored less 1."""

from typing import Any

from sftjax.families import common, llama
from sftjax.models.decoder import Config

names = llama.names


def config(hf: dict, **more: Any) -> Config:
    """decoder.Config from the fields of a Hugging Face config.json."""
    common.refuse(hf, use_bidirectional_attention=False)
    default = {"num_key_value_heads": 16, "head_dim": 256, "tie_word_embeddings": True}
    # Early configs say hidden_act "gelu" and mean the approximation, as hidden_activation does.
    act = hf.get("hidden_activation") or hf.get("hidden_act") or "gelu_pytorch_tanh"
    own: dict[str, Any] = dict(
        norm="rms_plus_one",
        embed_scale=hf["hidden_size"] ** 0.5,
        activation="gelu_pytorch_tanh" if act == "gelu" else act,
    )
    return llama.config(default | {"max_position_embeddings": 8192} | hf, **own | more)
