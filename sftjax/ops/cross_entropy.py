"""Linear cross-entropy over trained positions only: no [B, S, V] array ever exists.

Each device moves its trained positions to the front; then chunks of them are taken until no device has any left, so the
work follows the number of trained tokens at run time. A chunk's hidden states are gathered over the devices that share
the vocabulary, each of which holds its rows of the head: the head is never gathered, its gradient is never scattered,
and a device with few trained tokens helps one with many. Each chunk's gradient is taken in the forward pass, so its
logits are formed once and dropped.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from sftjax import parallel
from sftjax.ops import weight

CHUNK_TOKENS = 4096  # positions whose logits exist at a time, over the devices of one vocabulary
LOGITS = 2**27  # at most so many of them on a device: half a GiB, however large the vocabulary
# Then a multiple of this: whole tiles; and at sizes that models have (width 2048, vocabulary 128256) the compiler then
# finds room for the logits in the buffer of the head's gradient.
TILE = 128
# A device takes at most an eighth of its positions at a time (but this many), or the last chunk, half empty, would cost
# what the trained positions save.
LEAST = 256


@dataclasses.dataclass(frozen=True)
class Options:
    """What the loss of a token is; see linear_cross_entropy."""

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float = 0.0
    scale: float = 1.0
    dft: bool = False
    accuracy: bool = False
    vocab: int = 0
    n_groups: int = 0


@dataclasses.dataclass(frozen=True)
class _Axes:
    """Mesh axes by what they share in the loss; all empty without a mesh."""

    tokens: tuple[str, ...] = ()  # the positions
    vocab: tuple[str, ...] = ()  # the rows of the head
    mesh: bool = False

    @property
    def gathered(self):  # each shard's positions meet the others' rows of the head
        return tuple(a for a in self.vocab if a in self.tokens)

    @property
    def apart(self):  # replicas of the head's rows
        return tuple(a for a in self.tokens if a not in self.vocab)


def _axes(rows: int) -> _Axes:
    """The axes of the mesh that share a head of so many rows: as many as divide it."""
    # But not `data`, which may cross slices.
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return _Axes()
    vocab, parts = [], 1
    for axis in ("tensor", "fsdp", "expert", "context"):
        if axis not in mesh.manual_axes and rows % (parts * mesh.shape[axis]) == 0:
            vocab.append(axis)
            parts *= mesh.shape[axis]
    tokens = (*parallel.RULES["batch"], parallel.RULES["seq"])
    return _Axes(tuple(a for a in tokens if a not in mesh.manual_axes), tuple(vocab), True)


def _logits(o, h, w, b, first):
    """float32 [C, rows of w], and which of the rows are tokens (None: all)."""
    logits = jnp.einsum("cd,vd->cv", h, w, preferred_element_type=jnp.float32)
    if o.scale != 1.0:
        logits = logits * o.scale
    if b is not None:
        logits = logits + b
    if o.softcap:
        logits = o.softcap * jnp.tanh(logits / o.softcap)
    if not o.vocab:
        return logits, None
    real = first + jnp.arange(w.shape[0]) < o.vocab
    return jnp.where(real, logits, jnp.finfo(jnp.float32).min), real


def _chunk(o, axes, n_vocab, h, w, b, targets, weights, groups):
    """(sums of a chunk, float32 gradient [C, rows of w] of its scaled logits).

    h [C, D], w the device's rows of the head and b of its bias, targets, weights and groups [C].
    """
    total = functools.partial(_collect, jax.lax.psum, axes.vocab)
    first = jax.lax.axis_index(axes.vocab) * w.shape[0] if axes.vocab else 0
    logits, real = _logits(o, h, w, b, first)
    own = targets - first  # the target's row here, if it is here
    here = jnp.arange(w.shape[0]) == own[:, None]
    top = _collect(jax.lax.pmax, axes.vocab, logits.max(-1))
    exp = jnp.exp(logits - top[:, None])
    lse = top + jnp.log(total(exp.sum(-1)))
    target = total(jnp.sum(jnp.where(here, logits, 0.0), -1))
    loss = lse - target
    if o.label_smoothing:
        mean = total(jnp.sum(logits if real is None else jnp.where(real, logits, 0.0), -1)) / n_vocab
        loss = (1 - o.label_smoothing) * loss + o.label_smoothing * (lse - mean)
    if o.z_loss:
        loss = loss + o.z_loss * lse**2
    if o.dft:
        weights = weights * jnp.exp(target - lse)
    loss = loss * weights
    hits = jnp.float32(0)
    if o.accuracy:
        best = jnp.where(logits.max(-1) == top, first + jnp.argmax(logits, -1), 2**31 - 1)
        best = _collect(jax.lax.pmin, axes.vocab, best)  # the first of equals
        hits = jnp.sum((best == targets) & (weights > 0), dtype=jnp.float32)
    sums = (jnp.sum(loss), hits, group_sums(loss, groups, o.n_groups))

    grad = exp * ((1 + 2 * o.z_loss * lse) * weights * jnp.exp(top - lse))[:, None]
    grad = grad - jnp.where(here, ((1 - o.label_smoothing) * weights)[:, None], 0.0)
    if o.label_smoothing:
        share = o.label_smoothing / n_vocab * weights[:, None]
        grad = grad - (share if real is None else jnp.where(real, share, 0.0))
    if o.softcap:
        grad = grad * (1 - jnp.where(jnp.abs(logits) > o.softcap, 0, logits / o.softcap) ** 2)
    return sums, grad


def _collect(op, axes, x):
    return op(x, axes) if axes else x


FEW = 64  # groups that are summed by comparing with each, which no scatter is as fast as


def group_sums(values: jax.Array, groups: jax.Array | None, n: int) -> jax.Array | None:
    """float32 [n]: the sums of values over each group's positions (of one shape); None without."""
    if groups is None:
        return None
    if n > FEW:
        return jax.ops.segment_sum(values.ravel(), groups.ravel(), n)
    return jnp.sum(jnp.where(groups[..., None] == jnp.arange(n), values[..., None], 0), range(values.ndim))


# ---- the loop over chunks, on one device's positions -----------------------------------------


def _compact(weights, chunk):
    """Of weights [T] the trained, first, in whole chunks; the place of each there; their number."""
    trained = weights != 0
    place = jnp.cumsum(trained) - 1
    T, count = weights.shape[0], jnp.sum(trained)
    order = jnp.zeros(T + -T % chunk, jnp.int32)
    order = order.at[jnp.where(trained, place, order.size)].set(jnp.arange(T), mode="drop")
    return order, jnp.where(trained, place, 0), count


def _shard(o, axes, chunk, trained, h, w, b, targets, weights, groups):
    """One device's part of the loss -> (sums over all devices, gradients of h, w, b or None).

    trained: which of the three have a gradient.
    """
    shape, n_vocab = h.shape, o.vocab or w.shape[0] * math.prod(map(jax.lax.axis_size, axes.vocab))
    h = h.reshape(-1, h.shape[-1])
    targets, weights, groups = jax.tree.map(jnp.ravel, (targets, weights, groups))
    order, place, count = _compact(weights, chunk)
    n = _collect(jax.lax.pmax, axes.tokens, -(-count // chunk))
    gather = functools.partial(jax.lax.all_gather, axis_name=axes.gathered, tiled=True)

    with_dh, with_dw, with_db = trained

    def body(i, carry):
        sums, dh, dw, db = carry
        rows = jax.lax.dynamic_slice_in_dim(order, i * chunk, chunk)
        live = i * chunk + jnp.arange(chunk) < count
        part: list[Any] = [x if x is None else x[rows] for x in (h, targets, weights, groups)]
        part[2] = jnp.where(live, part[2], 0.0)
        if axes.gathered:
            part = [x if x is None else gather(x) for x in part]
        new, grad = _chunk(o, axes, n_vocab, part[0], w, b, *part[1:])
        dz = (grad * o.scale if o.scale != 1.0 else grad).astype(h.dtype)
        if with_dh:
            dx = jnp.einsum("cv,vd->cd", dz, w, preferred_element_type=jnp.float32)
            dx = _collect(jax.lax.psum, tuple(a for a in axes.vocab if a not in axes.gathered), dx)
            dx = dx.astype(h.dtype)
            if axes.gathered:
                dx = jax.lax.psum_scatter(dx, axes.gathered, tiled=True)
            dh = jax.lax.dynamic_update_slice_in_dim(dh, dx, i * chunk, 0)
        if with_dw:
            dw = dw + jnp.einsum("cv,cd->vd", dz, part[0], preferred_element_type=jnp.float32)
        if with_db:
            db = db + jnp.sum(grad, 0)
        return jax.tree.map(jnp.add, sums, new), dh, dw, db

    zero = jnp.float32(0)
    sums = (zero, zero, None if groups is None else jnp.zeros(o.n_groups))
    dh = jnp.zeros((order.size, h.shape[1]), h.dtype) if with_dh else None
    dw = jnp.zeros(w.shape, jnp.float32) if with_dw else None
    db = jnp.zeros(b.shape, jnp.float32) if with_db else None
    sums, dh, dw, db = jax.lax.fori_loop(0, n, body, (sums, dh, dw, db))
    sums, dw, db = _collect(jax.lax.psum, axes.apart, (sums, dw, db))
    if with_dh:
        dh = jnp.where((weights != 0)[:, None], dh[place], 0).reshape(shape)
    return sums, dh, dw, db


def _run(o, chunk_tokens, trained, h, w, b, *rest: jax.Array):
    """`_shard` on each device of the mesh, or here."""
    axes = _axes(w.shape[0])
    mesh = jax.sharding.get_abstract_mesh()
    parts = math.prod(mesh.shape[a] for a in axes.gathered)
    per_device = h.shape[0] * h.shape[1] // math.prod(mesh.shape[a] for a in axes.tokens)
    shared = math.prod(mesh.shape[a] for a in axes.vocab)
    most = min(chunk_tokens, max(LOGITS * shared // w.shape[0] // TILE, 1) * TILE)
    chunk = min(-(-most // parts), max(LEAST, per_device // 8), per_device)
    fn = functools.partial(_shard, o, axes, chunk, trained)
    # The head goes to its devices in the dtype of the matmul.
    args = (h, w.astype(h.dtype), b, *rest)
    if not axes.mesh:
        return fn(*args)
    rows, vocab = parallel.spec(("batch", "seq")), axes.vocab or None
    specs = (P(*rows, None), P(vocab, None), P(vocab))
    grads = (spec if on else None for spec, on in zip(specs, trained, strict=True))
    return parallel.shard_map(fn, (*specs, rows, rows, rows), (P(), *grads))(*args)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _fused(o, chunk_tokens, *primals: jax.Array):
    return _run(o, chunk_tokens, (False,) * 3, *primals)[0]


def _forward(o, chunk_tokens, *primals: Any):
    # Only what is trained is differentiated: a frozen head costs no gradient of its own.
    trained = tuple(p is not None and p.perturbed for p in primals[:3])
    values: list[Any] = [None if p is None else p.value for p in primals]
    sums, dh, *grads = _run(o, chunk_tokens, trained, *values)
    pairs = zip(grads, values[1:3], strict=True)
    return sums, (dh, *(None if d is None else d.astype(x.dtype) for d, x in pairs))


def _backward(o, chunk_tokens, saved, cotangents):
    g = cotangents[0]
    g = jnp.float32(0) if isinstance(g, jax.custom_derivatives.SymbolicZero) else g
    return (*(None if d is None else (d * g).astype(d.dtype) for d in saved), None, None, None)


_fused.defvjp(_forward, _backward, symbolic_zeros=True)


@jax.named_scope("linear_cross_entropy")
def linear_cross_entropy(
    h: jax.Array,
    w: weight.Weight,
    targets: jax.Array,
    weights: jax.Array,
    *,
    bias: jax.Array | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
    groups: jax.Array | None = None,
    **options: Any,
) -> tuple[jax.Array, ...]:
    """(sum of weights * loss, number of correct trained tokens), both float32 scalars.

    With groups, int32 [B, S] from 0 to n_groups - 1, a third value: the sum of weights * loss over each group's
    positions, float32 [n_groups], not differentiated.

    h [B, S, D] hidden states, w [V, D] head (a weight: see ops.weight), targets int32 [B, S], weights float32 [B, S] (0
    = not trained; not differentiated). options: the fields of Options. The logits are scale * h @ w.T + bias [V],
    soft-capped when softcap > 0; rows of w from `vocab` on (0 = none) are padding, no tokens. dft weighs each token by
    its own probability, not differentiated (Dynamic Fine-Tuning, Wu et al. 2025, arXiv 2508.05629). The second value is
    0 unless `accuracy`. All weights zero gives 0 with zero gradients.
    """
    o = Options(**options)
    h, w = weight.as_head(h, w)
    if o.vocab >= w.shape[0]:
        o = dataclasses.replace(o, vocab=0)
    args = jax.tree.map(jnp.asarray, (h, w, bias, targets, weights.astype(jnp.float32), groups))
    sums = _fused(o, chunk_tokens, *args)
    return sums if groups is not None else sums[:2]
