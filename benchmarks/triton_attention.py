"""Flash attention for NVIDIA GPUs: Pallas kernels (Triton), forward and backward.

    --config.model.attention=benchmarks/triton_attention.py:TRITON

Timed on an H100 (docs/attention.md). JAX calls its Triton backend deprecated: it is here until a
whole step has been measured beside tokamax's kernels.

Follows segments and positions without a [S, T] array: each block of queries visits only the blocks
of keys that hold something it may see, and tests the mask only where a block is not seen whole.
Query heads share their keys' head without repeating it. Padding (segment 0) sees nothing and gives
zeros. On a CPU the kernels are interpreted, which is slow and meant for tests.

Letters: B batch, S queries, T keys, N query heads, K key/value heads, G = N // K, H head width.
Softmax in powers of two, float32; see FlashAttention-2, https://arxiv.org/abs/2307.08691.
"""

import dataclasses
import functools
import math
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from sftjax import parallel
from sftjax.errors import ConfigError
from sftjax.ops.attention import KERNEL, Backend
from sftjax.ops.attention.asked import NEG_INF, Extra, Options, Where

LOG2E = math.log2(math.e)
LOWEST = NEG_INF / 2  # where the running maximum starts: what is masked is 0 beside it, never 1
NOBODY = 2**30  # segments of padding: one for queries, the next for keys, so that none match


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sizes of one kernel: rows of queries and of keys in a block, warps, pipeline stages."""

    q: int
    k: int
    warps: int
    stages: int

    def fit(self, S: int, T: int) -> Self:
        """Not larger than the row; powers of two from 16 on, which tensor cores want."""
        q, k = (max(16, pl.next_power_of_2(n)) for n in (S, T))
        return dataclasses.replace(self, q=min(self.q, q), k=min(self.k, k))


# {head width up to: (forward, backward of keys and values, backward of queries)}. Of the sizes
# usual for Hopper, those that Triton compiles for it with next to no register spilled; not timed
# yet: `benchmarks/gpu.py --tune` times these and others.
SIZES = {
    64: (Blocks(128, 64, 4, 3), Blocks(64, 64, 4, 2), Blocks(64, 64, 4, 2)),
    128: (Blocks(128, 64, 8, 3), Blocks(32, 128, 8, 2), Blocks(128, 64, 8, 2)),
    256: (Blocks(64, 32, 8, 2), Blocks(32, 64, 8, 1), Blocks(64, 32, 8, 1)),
}


@dataclasses.dataclass(frozen=True)
class How:
    """What the kernels are specialised for."""

    causal: bool
    window: int
    softcap: float
    scale: float
    sizes: tuple[Blocks, ...]


# ---- which blocks see which ----------------------------------------------------------------


def _ends(seg, pos, size):
    """First and last (segment, position) of each block, in lexicographic order; each [B, n]."""
    seg, pos = (x.reshape(x.shape[0], -1, size) for x in (seg, pos))
    first, last = seg.min(-1), seg.max(-1)
    low = jnp.where(seg == first[..., None], pos, jnp.iinfo(jnp.int32).max).min(-1)
    high = jnp.where(seg == last[..., None], pos, jnp.iinfo(jnp.int32).min).max(-1)
    return first, low, last, high


def block_map(
    how: How,
    blocks: Blocks,
    q_seg: jax.Array,
    kv_seg: jax.Array,
    q_pos: jax.Array,
    kv_pos: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """(connected, whole), bool [B, queries' blocks, keys' blocks].

    connected: False only where no query of the block sees a key of the other. whole: True only
    where each query sees every key. Linear in the row: only the blocks' ends are compared.
    """
    qs0, qp0, qs1, qp1 = (x[:, :, None] for x in _ends(q_seg, q_pos, blocks.q))
    ks0, kp0, ks1, kp1 = (x[:, None, :] for x in _ends(kv_seg, kv_pos, blocks.k))
    connected = (ks0 <= qs1) & (ks1 >= qs0)
    whole = (qs0 == qs1) & (ks0 == ks1) & (qs0 == ks0)
    if how.causal:
        connected &= (ks0 < qs1) | (kp0 <= qp1)
        whole &= kp1 <= qp0
    if how.window:
        connected &= (ks1 > qs0) | (kp1 > qp0 - how.window)
        whole &= qp1 - kp0 < how.window
        if not how.causal:
            connected &= (ks0 < qs1) | (kp0 < qp1 + how.window)
            whole &= kp1 - qp0 < how.window
    return connected, whole & connected


def ranges(connected: jax.Array, whole: jax.Array) -> jax.Array:
    """int32 [B, n, 4]: blocks 0..1 and 2..3 of these bounds are visited masked, 1..2 unmasked."""
    n = connected.shape[-1]
    i = jnp.arange(n)
    lo = jnp.where(connected, i, n).min(-1)
    hi = jnp.where(connected, i + 1, 0).max(-1)
    start = jnp.where(whole, i, n).min(-1)
    stop = jnp.where((i >= start[..., None]) & ~whole, i, n).min(-1)
    lo, some = jnp.minimum(lo, hi), start < n
    start, stop = jnp.where(some, start, lo), jnp.where(some, stop, lo)
    return jnp.stack([lo, start, stop, hi], -1).astype(jnp.int32)


def _visit(bounds, body, carry):
    lo, start, stop, hi = (bounds[i] for i in range(4))
    carry = jax.lax.fori_loop(lo, start, functools.partial(body, masked=True), carry)
    carry = jax.lax.fori_loop(start, stop, functools.partial(body, masked=False), carry)
    return jax.lax.fori_loop(stop, hi, functools.partial(body, masked=True), carry)


# ---- kernels -------------------------------------------------------------------------------


def _dot(a, b):
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def _rows(i, size):
    return pl.ds(i * size, size)


def _scores(how, q, k, where, masked):
    """(scores times log2 e, d score / d product without the scale), both [q, k] float32."""
    x = _dot(q, k.T) * how.scale
    slope = None
    if how.softcap:
        t = jnp.tanh(x / how.softcap)
        x, slope = how.softcap * t, 1 - t * t
    x = x * LOG2E
    if masked:
        q_seg, kv_seg, q_pos, kv_pos = where
        behind = q_pos[:, None] - kv_pos[None, :]
        seen = q_seg[:, None] == kv_seg[None, :]
        if how.causal:
            seen &= behind >= 0
        if how.window:
            seen &= (behind if how.causal else jnp.abs(behind)) < how.window
        x = jnp.where(seen, x, NEG_INF)
    return x, slope


def _forward_kernel(how, bounds, sink, q_seg, kv_seg, q_pos, kv_pos, q, k, v, out, lse):
    """One block of queries of one head, over the keys. bounds [4]; q [q, H]; k, v [T, H]."""
    blocks, queries = how.sizes[0], q[...]

    def body(j, carry, masked):
        acc, top, total = carry
        rows = _rows(j, blocks.k)
        where = (q_seg[...], kv_seg[rows], q_pos[...], kv_pos[rows]) if masked else None
        x, _ = _scores(how, queries, k[rows, :], where, masked)
        new = jnp.maximum(top, x.max(-1))
        p, shrink = jnp.exp2(x - new[:, None]), jnp.exp2(top - new)
        acc = acc * shrink[:, None] + _dot(p.astype(v.dtype), v[rows, :])
        return acc, new, total * shrink + p.sum(-1)

    top = jnp.full(blocks.q, LOWEST, jnp.float32)
    total = jnp.zeros(blocks.q, jnp.float32)
    if sink is not None:  # a score without a value
        top, total = jnp.maximum(top, sink[...] * LOG2E), total + 1
    acc = jnp.zeros(queries.shape, jnp.float32)
    acc, top, total = _visit(bounds, body, (acc, top, total))
    total = jnp.maximum(total, 1e-30)  # of a query that sees nothing
    out[...] = (acc / total[:, None]).astype(out.dtype)
    lse[...] = top + jnp.log2(total)


def _backward_scores(how, q, k, v, do, lse, delta, where, masked):
    """(probabilities, gradient of the product of q and k), [q, k] float32."""
    x, slope = _scores(how, q, k, where, masked)
    p = jnp.exp2(x - lse[:, None])
    ds = p * (_dot(do, v.T) - delta[:, None]) * how.scale
    return p, ds if slope is None else ds * slope


def _keys_kernel(how, bounds, q_seg, kv_seg, q_pos, kv_pos, q, k, v, do, lse, delta, dk, dv):
    """One block of keys of one head, over the queries of all G heads that use it.

    q, do [S, G, H]; k, v [k, H]; lse, delta [G, S].
    """
    blocks, keys, values = how.sizes[1], k[...], v[...]

    def head(g, carry):
        def body(i, carry, masked):
            dk, dv = carry
            rows = _rows(i, blocks.q)
            where = (q_seg[rows], kv_seg[...], q_pos[rows], kv_pos[...]) if masked else None
            qi, doi = q[rows, g, :], do[rows, g, :]
            p, ds = _backward_scores(how, qi, keys, values, doi, lse[g, rows], delta[g, rows], where, masked)
            dv += _dot(p.astype(doi.dtype).T, doi)
            dk += _dot(ds.astype(qi.dtype).T, qi)
            return dk, dv

        return _visit(bounds, body, carry)

    zero = jnp.zeros(keys.shape, jnp.float32)
    sums = jax.lax.fori_loop(0, q.shape[1], head, (zero, zero))
    dk[...], dv[...] = sums[0].astype(dk.dtype), sums[1].astype(dv.dtype)


def _queries_kernel(how, bounds, q_seg, kv_seg, q_pos, kv_pos, q, k, v, do, lse, delta, dq):
    """One block of queries of one head, over the keys. q, do [q, H]; k, v [T, H]; lse [q]."""
    blocks, queries, cotangent = how.sizes[2], q[...], do[...]

    def body(j, dq, masked):
        rows = _rows(j, blocks.k)
        where = (q_seg[...], kv_seg[rows], q_pos[...], kv_pos[rows]) if masked else None
        keys = k[rows, :]
        _, ds = _backward_scores(how, queries, keys, v[rows, :], cotangent, lse[...], delta[...], where, masked)
        return dq + _dot(ds.astype(keys.dtype), keys)

    dq[...] = _visit(bounds, body, jnp.zeros(queries.shape, jnp.float32)).astype(dq.dtype)


# ---- calls ---------------------------------------------------------------------------------


def _call(kernel, name, blocks, grid, in_specs, args, out_specs, out_shape):
    """The kernel on a GPU; interpreted on a CPU."""

    def run(interpret, *args: jax.Array):
        return pl.pallas_call(
            kernel,
            name=name,
            grid=grid,
            in_specs=in_specs,
            out_specs=out_specs,
            out_shape=out_shape,
            interpret=interpret,
            compiler_params=plgpu.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        )(*args)

    return jax.lax.platform_dependent(*args, cpu=functools.partial(run, True), default=functools.partial(run, False))


def _whole_row(n):
    return pl.BlockSpec((None, n), lambda i, h, b: (b, 0))


def _block(n):
    return pl.BlockSpec((None, n), lambda i, h, b: (b, i))


BOUNDS = pl.BlockSpec((None, None, 4), lambda i, h, b: (b, i, 0))


def _forward(how, q, k, v, sinks, where):
    """(out [B, S, N, H], log2 of the softmax's total [B, N, S])."""
    (B, S, N, H), (T, K), blocks = q.shape, k.shape[1:3], how.sizes[0]
    bounds = ranges(*block_map(how, blocks, *where))
    ours = pl.BlockSpec((None, blocks.q, None, H), lambda i, h, b: (b, i, h, 0))
    keys = pl.BlockSpec((None, T, None, H), lambda i, h, b: (b, 0, h // (N // K), 0))
    places = [_block(blocks.q), _whole_row(T), _block(blocks.q), _whole_row(T)]
    sink = None if sinks is None else pl.BlockSpec((None,), lambda i, h, b: (h,))
    return _call(
        functools.partial(_forward_kernel, how),
        "attention",
        blocks,
        (S // blocks.q, N, B),
        [BOUNDS, sink, *places, ours, keys, keys],
        (bounds, sinks, *where, q, k, v),
        [ours, pl.BlockSpec((None, None, blocks.q), lambda i, h, b: (b, h, i))],
        [jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((B, N, S), jnp.float32)],
    )


def _keys_backward(how, q, k, v, where, do, lse, delta):
    (B, S, N, H), (T, K), blocks = q.shape, k.shape[1:3], how.sizes[1]
    connected, whole = block_map(how, blocks, *where)
    bounds = ranges(connected.swapaxes(1, 2), whole.swapaxes(1, 2))
    queries = pl.BlockSpec((None, S, N // K, H), lambda j, h, b: (b, 0, h, 0))
    ours = pl.BlockSpec((None, blocks.k, None, H), lambda j, h, b: (b, j, h, 0))
    stat = pl.BlockSpec((None, N // K, S), lambda j, h, b: (b, h, 0))
    places = [_whole_row(S), _block(blocks.k), _whole_row(S), _block(blocks.k)]
    return _call(
        functools.partial(_keys_kernel, how),
        "attention_backward_keys",
        blocks,
        (T // blocks.k, K, B),
        [BOUNDS, *places, queries, ours, ours, queries, stat, stat],
        (bounds, *where, q, k, v, do, lse, delta),
        [ours, ours],
        [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)],
    )


def _queries_backward(how, q, k, v, where, do, lse, delta):
    (B, S, N, H), (T, K), blocks = q.shape, k.shape[1:3], how.sizes[2]
    bounds = ranges(*block_map(how, blocks, *where))
    ours = pl.BlockSpec((None, blocks.q, None, H), lambda i, h, b: (b, i, h, 0))
    keys = pl.BlockSpec((None, T, None, H), lambda i, h, b: (b, 0, h // (N // K), 0))
    stat = pl.BlockSpec((None, None, blocks.q), lambda i, h, b: (b, h, i))
    places = [_block(blocks.q), _whole_row(T), _block(blocks.q), _whole_row(T)]
    return _call(
        functools.partial(_queries_kernel, how),
        "attention_backward_queries",
        blocks,
        (S // blocks.q, N, B),
        [BOUNDS, *places, ours, keys, keys, ours, stat, stat],
        (bounds, *where, q, k, v, do, lse, delta),
        ours,
        jax.ShapeDtypeStruct(q.shape, q.dtype),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(how, q, k, v, sinks, where):
    return _forward(how, q, k, v, sinks, where)[0]


def _attention_forward(how, q, k, v, sinks, where):
    # Named for remat: what is saved under this name is not computed a second time.
    out, lse = checkpoint_name(_forward(how, q, k, v, sinks, where), "attention")
    return out, (q, k, v, sinks, where, out, lse)


def _attention_backward(how, saved, do):
    q, k, v, sinks, where, out, lse = saved
    delta = jnp.einsum("bsnh,bsnh->bns", out, do, preferred_element_type=jnp.float32)
    dk, dv = _keys_backward(how, q, k, v, where, do, lse, delta)
    dq = _queries_backward(how, q, k, v, where, do, lse, delta)
    dsinks = None
    if sinks is not None:
        share = jnp.exp2(sinks[:, None] * LOG2E - lse)
        dsinks = -jnp.sum(share * delta, (0, 2))
    return dq, dk, dv, dsinks, None


_attention.defvjp(_attention_forward, _attention_backward)


def _pad(x, rows, width=0, value=0):
    """Pad x [B, S, ...] till S is a multiple of `rows`, and its last axis `width` wide."""
    pads = [(0, 0), (0, -x.shape[1] % rows)] + [(0, 0)] * (x.ndim - 2)
    if width:
        pads[-1] = (0, width - x.shape[-1])
    return jnp.pad(x, pads, constant_values=value)


def triton(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    extra: Extra,
    where: Where,
    o: Options,
    sizes: tuple[Blocks, ...] | None = None,
) -> jax.Array:
    """A backend of ops.attention; sizes: of the blocks of its three kernels, None = SIZES'."""
    q_seg, kv_seg, q_pos, kv_pos, _ = where
    if k.shape[1] > q.shape[1]:  # a shard of `context`: keys in the row's order, for the ranges
        back = np.argsort(parallel.places(k.shape[1], k.shape[1] // q.shape[1]))
        k, v, kv_seg, kv_pos = (x[:, back] for x in (k, v, kv_seg, kv_pos))
    (_, S, _, H), T = q.shape, k.shape[1]
    width = max(16, pl.next_power_of_2(H))
    if sizes is None and width > max(SIZES):
        raise ConfigError(f"attention backend 'triton': head_dim={H}; at most {max(SIZES)}")
    sizes = sizes or next(sizes for most, sizes in SIZES.items() if width <= most)
    sizes = tuple(blocks.fit(S, T) for blocks in sizes)
    q_rows, k_rows = (max(getattr(b, x) for b in sizes) for x in "qk")
    q_seg, kv_seg, q_pos, kv_pos = map(jnp.int32, (q_seg, kv_seg, q_pos, kv_pos))
    padded = (
        _pad(jnp.where(q_seg == 0, NOBODY, q_seg), q_rows, value=NOBODY),
        _pad(jnp.where(kv_seg == 0, NOBODY + 1, kv_seg), k_rows, value=NOBODY + 1),
        _pad(q_pos, q_rows),
        _pad(kv_pos, k_rows),
    )
    how = How(o.causal, o.window, float(o.softcap), float(o.scale), sizes)
    sinks = None if extra.sinks is None else extra.sinks.astype(jnp.float32)
    out = _attention(how, _pad(q, q_rows, width), _pad(k, k_rows, width), _pad(v, k_rows, width), sinks, padded)
    return out[:, :S, :, :H]


TRITON = Backend(triton, ("gpu",), KERNEL)
