"""Attention on TPU: JAX's splash kernel, which never forms the scores and skips what no mask shows.

A place is an index into the row. Inside a document places rise with positions, so causality and windows by place are
those by position; segments keep documents apart. On a mesh with a `context` axis each shard holds some places of every
row (parallel.places) and the keys of all.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from sftjax import parallel
from sftjax.errors import ConfigError
from sftjax.ops.attention.asked import Extra, Options, Where

INTERPRET = False  # run the kernels as plain JAX, on any platform: for tests
LANES = 128  # a block is a multiple of it
# Largest blocks of queries and of keys by the width of a head. Whole steps with heads of 64 and 128 compile with them
# for v5e and v5p; no TPU has timed them yet: benchmarks/splash_blocks.py does.
BLOCKS = {64: (1024, 1024), 128: (1024, 1024), 256: (512, 512)}


class _Places(masks._ComputableMask):
    """Which keys the queries at the given places see; computed inside the kernel."""

    def __init__(self, places: np.ndarray, length: int, causal: bool, window: int) -> None:
        def seen(q, k):
            ok = q >= k if causal else (q >= k) | (q < k)
            if window:
                ok &= q - k < window
                ok = ok if causal else ok & (k - q < window)
            return ok

        super().__init__((len(places), length), seen)
        self.q_sequence = np.asarray(places, np.int32)
        self.key = (self.q_sequence.tobytes(), length, causal, window)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Places) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


def block(length: int, most: int) -> int:
    """The largest block, a multiple of LANES and at most `most`, that divides a row's length."""
    # A quarter of the row at most: of a block on the diagonal, half the work is for nothing.
    most = max(min(most, length // 4), LANES)
    sizes = [n for n in range(LANES, most + 1, LANES) if length % n == 0]
    if not sizes:
        raise ConfigError(
            f"attention backend 'splash' needs rows of a multiple of {LANES} tokens on each shard of mesh.context,"
            f" found {length}: change data.max_length, or take model.attention='xla'"
        )
    return sizes[-1]


def _kernel(places, shards, length, heads, head_dim, causal, window, softcap):
    """The kernel for the queries of every shard; places: theirs, one shard after the other."""
    most = BLOCKS[next((w for w in BLOCKS if w >= head_dim), max(BLOCKS))]
    q, kv = block(len(places) // shards, most[0]), block(length, most[1])
    at_once = 512 if kv % 512 == 0 else kv
    sizes = kernel.BlockSizes(
        block_q=q, block_kv=kv, block_kv_compute=at_once, block_q_dkv=q, block_kv_dkv=kv,
        block_kv_dkv_compute=at_once, block_q_dq=q, block_kv_dq=kv,
    )  # fmt: skip
    mask = masks.MultiHeadMask([_Places(places, length, causal, window)] * heads)
    return kernel.make_splash_mha(
        mask,
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=shards,
        attn_logits_soft_cap=softcap or None,
        residual_checkpoint_name="attention",
        interpret=INTERPRET,
    )


def splash(q: jax.Array, k: jax.Array, v: jax.Array, extra: Extra, where: Where, o: Options) -> jax.Array:
    """A backend of ops.attention, for one device's part of the mesh. S and T multiples of LANES."""
    T, shards = k.shape[1], k.shape[1] // q.shape[1]
    places, q_seg, kv_seg = parallel.places(T, shards), where.q_seg, where.kv_seg
    run = _kernel(places, shards, T, q.shape[2], q.shape[3], o.causal, o.window, o.softcap)
    if shards > 1:
        run = _own(run, jax.lax.axis_index(parallel.RULES["seq"]), shards)
        back = np.argsort(places)
        k, v, kv_seg = k[:, back], v[:, back], kv_seg[:, back]
    q, k, v = (x.swapaxes(1, 2) for x in (q * jnp.asarray(o.scale, q.dtype), k, v))  # [B, N, S, H]

    def row(q, k, v, q_seg, kv_seg):
        return run(q, k, v, kernel.SegmentIds(q_seg, kv_seg), sinks=extra.sinks)

    return jax.vmap(row)(q, k, v, q_seg, kv_seg).swapaxes(1, 2)


def _own(run, shard, shards):
    """The kernel of one shard's queries, from that of all."""

    def part(x, axis):
        n = x.shape[axis] // shards
        return jax.lax.dynamic_slice_in_dim(x, shard * n, n, axis)

    def own(info):
        blocks = {k: getattr(info, k) for k in ("data_next", "mask_next", "block_mask")}
        blocks = {k: part(x, 1) for k, x in blocks.items() if x is not None}
        return info._replace(**blocks, q_sequence=part(info.q_sequence, 0))

    infos = (own(run.fwd_mask_info), own(run.dq_mask_info), own(run.dkv_mask_info))
    return kernel.SplashAttentionKernel(*infos, **run.kwargs)
