"""IQuest-Coder-V1's loop form: a Llama whose layers are run twice (the plain form is a Llama).

In the second pass each head mixes, by a gate on its rotated query, attention to the first pass's keys and values with
windowed attention to its own.
"""

from sftjax.families import common, llama
from sftjax.models.decoder import Config


def config(hf: dict) -> Config:
    """decoder.Config from the fields of a Hugging Face config.json."""
    return llama.config(
        hf, rope_theta=500_000.0, loops=hf.get("loop_num", 2), loop_window=hf.get("loop_window_size", 64)
    )


def names(c: Config) -> list[tuple]:
    """Rows as in llama.names."""
    if c.loops == 1:
        return llama.names(c)
    gates = common.linear("model.gate_projections.{}", "layers/attn/mix", "n h -> n h")
    return llama.names(c) + gates
