"""Rotary position embedding: frequency tables by name, and the rotation.

The half-split form of Hugging Face checkpoints: dimension i is paired with i + H/2. The formulas are those of
transformers' modeling_rope_utils.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sftjax.errors import ModelError


@dataclasses.dataclass(frozen=True)
class Rope:
    """How positions are rotated: base, rotated width, and the variant's settings."""

    theta: float = 10_000.0
    dim: int = 0  # the first so many dimensions of a head; 0 = all
    scaling: tuple[tuple[str, Any], ...] = ()  # rope_type and its fields, as in a config.json

    @property
    def kind(self) -> str:
        """Return the name of the variant, a key of FREQUENCIES if the variant is supported."""
        return dict(self.scaling).get("rope_type", "default")


# Each takes (theta, dim, settings, lengths) and returns (angular frequencies, factor on sine and cosine). lengths:
# float32 [B, S, 1, 1], tokens in the document of each token. Frequencies that follow from the settings alone are numpy
# float64 [dim/2].


def _default(theta, dim, s, lengths):
    return 1.0 / theta ** (np.arange(0, dim, 2, dtype=np.float64) / dim), 1.0


def _llama3(theta, dim, s, lengths):
    """Llama 3.1: long wavelengths are slowed by `factor`, short ones kept, a ramp between."""
    freqs = _default(theta, dim, s, lengths)[0]
    original = s["original_max_position_embeddings"]
    low, high = s["low_freq_factor"], s["high_freq_factor"]
    ramp = np.clip((original * freqs / (2 * math.pi) - low) / (high - low), 0.0, 1.0)
    return (1 - ramp) * freqs / s["factor"] + ramp * freqs, 1.0


def _yarn(theta, dim, s, lengths):
    """YaRN: interpolated below `low`, kept above `high`, a ramp between; attention sharpened."""
    freqs = _default(theta, dim, s, lengths)[0]
    original = s["original_max_position_embeddings"]
    factor = s.get("factor") or s["max_position_embeddings"] / original

    def place(turns):  # the dimension that makes so many turns over the original length
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = place(s.get("beta_fast") or 32), place(s.get("beta_slow") or 1)
    if s.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high += 0.001 * (low == high)
    ramp = np.clip((np.arange(dim // 2) - low) / (high - low), 0.0, 1.0)

    def sharpen(by):
        return 0.1 * by * math.log(factor) + 1.0 if factor > 1 else 1.0

    attention = s.get("attention_factor")
    if attention is None:
        attention = sharpen(1.0)
        if s.get("mscale") and s.get("mscale_all_dim"):
            attention = sharpen(s["mscale"]) / sharpen(s["mscale_all_dim"])
    return ramp * freqs / factor + (1 - ramp) * freqs, attention


def _dynamic(theta, dim, s, lengths):
    """Dynamic NTK: the base grows with the part of the document beyond the trained length."""
    trained, factor = s["max_position_embeddings"], s["factor"]
    beyond = factor * jnp.maximum(lengths, trained) / trained - (factor - 1)
    base = theta * beyond ** (dim / (dim - 2))
    return base ** -jnp.asarray(np.arange(0, dim, 2) / dim, jnp.float32), 1.0


def _longrope(theta, dim, s, lengths):
    """LongRoPE: one factor for each frequency, from two lists for short and long documents."""
    freqs = _default(theta, dim, s, lengths)[0]
    original = s["original_max_position_embeddings"]
    for name in ("short_factor", "long_factor"):
        if len(s[name]) != dim // 2:
            raise ModelError(f"{name} has {len(s[name])} entries, expected {dim // 2}")
    short, long = (np.float32(freqs / np.array(s[k])) for k in ("short_factor", "long_factor"))
    factor = s.get("factor") or s["max_position_embeddings"] / original
    attention = s.get("attention_factor")
    if attention is None:
        attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return jnp.where(lengths > original, long, short), attention


FREQUENCIES = {
    "default": _default,
    "linear": lambda theta, dim, s, n: (_default(theta, dim, s, n)[0] / s["factor"], 1.0),
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
BY_LENGTH = ("dynamic", "longrope")  # these look at the lengths


def frequencies(rope: Rope, head_dim: int, lengths: jax.Array | None = None) -> tuple[np.ndarray | jax.Array, float]:
    """(float32 angular frequencies [..., dim/2], factor on sine and cosine)."""
    if rope.kind not in FREQUENCIES:
        raise ModelError(f"rope type {rope.kind!r} is not supported; known: {', '.join(FREQUENCIES)}")
    settings = {k: v for k, v in rope.scaling if v is not None}
    lengths = jnp.zeros((1, 1, 1, 1)) if lengths is None else lengths
    try:
        with np.errstate(divide="raise", over="raise", invalid="raise"):
            out = FREQUENCIES[rope.kind](rope.theta, rope.dim or head_dim, settings, lengths)
    except KeyError as e:
        raise ModelError(f"rope type {rope.kind!r} needs the field {e}") from None
    except ArithmeticError as e:
        raise ModelError(
            f"rope type {rope.kind!r}: no frequencies for theta {rope.theta} and {settings}: {e}"
        ) from None
    return out[0].astype(np.float32), out[1]


def angles(
    rope: Rope, head_dim: int, positions: jax.Array, lengths: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """(sin, cos), each float32 [B, S, 1, dim/2], computed once for all layers.

    positions: int32 [B, S]. lengths: int32 [B, S], for the kinds in BY_LENGTH.
    """
    if lengths is not None:
        lengths = lengths[..., None, None].astype(jnp.float32)
    freqs, factor = frequencies(rope, head_dim, lengths)
    a = positions[..., None, None].astype(jnp.float32) * freqs
    return jnp.sin(a) * factor, jnp.cos(a) * factor


def rotate(x: jax.Array, sin: jax.Array, cos: jax.Array) -> jax.Array:
    """Rotate the first 2 * sin.shape[-1] dimensions of x [B, S, N, H]; computed in float32."""
    half = sin.shape[-1]
    x1, x2 = (x[..., i * half : (i + 1) * half].astype(jnp.float32) for i in (0, 1))
    y = jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)
    rest = x[..., 2 * half :]
    return jnp.concatenate([y, rest], axis=-1) if rest.shape[-1] else y
