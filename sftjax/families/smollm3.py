"""SmolLM3: a Llama where every fourth layer has no rotary embedding (SmolLM 1 and 2 are Llamas)."""

import dataclasses

from sftjax.families import common, llama
from sftjax.models.decoder import Config

names = llama.names


def config(hf: dict) -> Config:
    """decoder.Config from the fields of a Hugging Face config.json."""
    default = {"num_key_value_heads": 4, "tie_word_embeddings": True}
    default |= {"max_position_embeddings": 32768}
    c = llama.config(default | hf, rope_theta=2_000_000.0)
    every = hf.get("no_rope_layer_interval") or 4
    rotated = hf.get("no_rope_layers") or [(i + 1) % every != 0 for i in range(c.layers)]
    sliding = hf.get("use_sliding_window") and hf.get("sliding_window")
    types = hf.get("layer_types") or [
        common.SLIDING if sliding and not on else common.FULL for on in rotated
    ]
    kinds = common.kinds(hf if sliding else hf | {"sliding_window": 0}, types, c.kinds[0].rope)
    kinds = tuple(
        kinds[i % len(kinds)] if on else dataclasses.replace(kinds[i % len(kinds)], rope=None)
        for i, on in enumerate(rotated)
    )
    return dataclasses.replace(c, kinds=kinds)
