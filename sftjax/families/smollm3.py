"""SmolLM3: a Llama where every fourth layer has no rotary embedding (SmolLM 1 and 2 are Llamas)."""

import dataclasses
import itertools

from sftjax.families import common, llama
from sftjax.models.decoder import Config

names = llama.names


def config(hf: dict) -> Config:
    """decoder.Config from the fields of a Hugging Face config.json."""
    default = {"num_key_value_heads": 4, "tie_word_embeddings": True}
    default |= {"max_position_embeddings": 32768}
    hf, depth = default | hf, hf["num_hidden_layers"]
    every = hf.get("no_rope_layer_interval") or 4
    rotated = hf.get("no_rope_layers") or [(i + 1) % every != 0 for i in range(depth)]
    sliding = hf.get("use_sliding_window") and hf.get("sliding_window")
    types = hf.get("layer_types") or [common.SLIDING if sliding and not on else common.FULL for on in rotated]
    hf = hf if sliding else hf | {"sliding_window": 0}
    c = llama.config(hf, rope_theta=2_000_000.0, types=types)
    each = zip(itertools.cycle(c.kinds), rotated, strict=False)
    kinds = (kind if on else dataclasses.replace(kind, rope=None) for kind, on in each)
    return dataclasses.replace(c, kinds=tuple(kinds))
