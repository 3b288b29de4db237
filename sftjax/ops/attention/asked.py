"""What every backend of attention is asked: which keys a query sees, and what its scores are."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

NEG_INF = -0.7 * float(jnp.finfo(jnp.float32).max)  # the score of a key that is not seen


class Where(NamedTuple):
    """Segments and positions, int32: of the queries [B, S], and of the keys [B, T]."""

    q_seg: jax.Array
    kv_seg: jax.Array
    q_pos: jax.Array
    kv_pos: jax.Array


class Options(NamedTuple):
    """What the scores and the mask are; see ops.attention.attention."""

    causal: bool
    window: int
    softcap: float
    scale: float
