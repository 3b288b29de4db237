"""Linear cross-entropy over trained positions only: no [B, S, V] array ever exists.

In each row the trained positions are moved to the front; then chunks of columns are taken until no
row has a trained position left, so the work follows the number of trained tokens at run time. Rows
stay where they are on the mesh. Each chunk's gradient is taken in the forward pass, so its logits
are formed once and dropped.
"""

import functools

import jax
import jax.numpy as jnp

CHUNK_TOKENS = 4096  # positions whose logits exist at a time, over the whole batch


def token_loss(logits, targets, label_smoothing=0.0, z_loss=0.0, real=None):
    """float32 loss of each token. logits [..., V] float32, targets int [...].

    label_smoothing spreads that share of the target mass evenly over the vocabulary; z_loss adds
    z_loss * logsumexp^2. real: bool [V], where the vocabulary has tokens; None = everywhere.
    """
    lse = jax.nn.logsumexp(logits, axis=-1, where=real)
    target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    loss = lse - target
    if label_smoothing:
        loss = (1 - label_smoothing) * loss + label_smoothing * (lse - logits.mean(-1, where=real))
    if z_loss:
        loss = loss + z_loss * lse**2
    return loss


def _chunk(opts, h, w, targets, weights, groups):
    """Weighted loss sum; (correct predictions, loss sums of groups). h [B, C, D], w [V, D]."""
    label_smoothing, z_loss, softcap, scale, accuracy, vocab, n_groups = opts
    logits = jnp.einsum("bcd,vd->bcv", h, w.astype(h.dtype), preferred_element_type=jnp.float32)
    if scale != 1.0:
        logits = logits * scale
    if softcap:
        logits = softcap * jnp.tanh(logits / softcap)
    real = None
    if vocab and vocab < w.shape[0]:
        real = jnp.arange(w.shape[0]) < vocab
        logits = jnp.where(real, logits, jnp.finfo(jnp.float32).min)
    loss = token_loss(logits, targets, label_smoothing, z_loss, real) * weights
    hits = jnp.sum((jnp.argmax(logits, -1) == targets) * (weights > 0)) if accuracy else 0.0
    return jnp.sum(loss), (jnp.asarray(hits, jnp.float32), group_sums(loss, groups, n_groups))


def group_sums(values, groups, n):
    """float32 [n]: the sums of values [B, C] over each group's positions; None without groups."""
    if groups is None:
        return None
    return jnp.sum(jnp.where(groups[..., None] == jnp.arange(n), values[..., None], 0), (0, 1))


def _compact(targets, weights, groups, chunk):
    """Trained positions first in each row, in whole chunks; and how many chunks hold any."""
    trained = weights != 0
    order = jnp.argsort(~trained, axis=1, stable=True)
    pad = -order.shape[1] % chunk
    most = jnp.max(jnp.sum(trained, axis=1))
    order = jnp.pad(order, ((0, 0), (0, pad)))
    columns = (targets, weights, groups)
    targets, weights, groups = jax.tree.map(
        lambda x: jnp.take_along_axis(x, order, axis=1), columns
    )
    weights = jnp.where(jnp.arange(order.shape[1]) < trained.sum(1, keepdims=True), weights, 0.0)
    return order, (targets, weights, groups), -(-most // chunk)


def _columns(x, i, chunk):
    """Chunk i of the columns of an array [B, S], or of a tuple of them."""
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, i * chunk, chunk, axis=1), x)


def _zeros(opts, groups):
    """What `_chunk` returns, of no chunk at all."""
    return jnp.float32(0), (jnp.float32(0), None if groups is None else jnp.zeros(opts[-1]))


def _take(h, order, i, chunk):
    return jnp.take_along_axis(h, _columns(order, i, chunk)[..., None], axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _fused(opts, chunk, h, w, targets, weights, groups):
    order, rest, n = _compact(targets, weights, groups, chunk)

    def body(i, sums):
        out = _chunk(opts, _take(h, order, i, chunk), w, *_columns(rest, i, chunk))
        return jax.tree.map(jnp.add, sums, out)

    return jax.lax.fori_loop(0, n, body, _zeros(opts, groups))


def _forward(opts, chunk, *primals):
    h_trained, w_trained = primals[0].perturbed, primals[1].perturbed
    h, w, targets, weights, groups = (None if p is None else p.value for p in primals)
    order, rest, n = _compact(targets, weights, groups, chunk)
    rows = jnp.arange(h.shape[0])[:, None]

    def body(i, carry):
        sums, dh, dw = carry
        columns = _columns(rest, i, chunk)
        where = _columns(order, i, chunk)
        hi = jnp.take_along_axis(h, where[..., None], axis=1)
        # Only what is trained is differentiated: a frozen head costs no gradient of its own.
        if w_trained:
            loss, vjp, aux = jax.vjp(lambda x, w: _chunk(opts, x, w, *columns), hi, w, has_aux=True)
            dhi, dwi = vjp(jnp.float32(1))
            dw = dw + dwi.astype(jnp.float32)
        else:
            loss, vjp, aux = jax.vjp(lambda x: _chunk(opts, x, w, *columns), hi, has_aux=True)
            (dhi,) = vjp(jnp.float32(1))
        # Positions past a row's trained ones point at column 0 with weight 0: they add zero.
        dh = dh.at[rows, where].add(dhi)
        return jax.tree.map(jnp.add, sums, (loss, aux)), dh, dw

    dw = jnp.zeros(w.shape, jnp.float32) if w_trained else None
    start = (_zeros(opts, groups), jnp.zeros_like(h), dw)
    sums, dh, dw = jax.lax.fori_loop(0, n, body, start)
    return sums, (dh if h_trained else None, None if dw is None else dw.astype(w.dtype))


def _backward(opts, chunk, saved, cotangents):
    g = cotangents[0]
    g = jnp.float32(0) if isinstance(g, jax.custom_derivatives.SymbolicZero) else g
    return (*(None if d is None else (d * g).astype(d.dtype) for d in saved), None, None, None)


_fused.defvjp(_forward, _backward, symbolic_zeros=True)


def linear_cross_entropy(
    h,
    w,
    targets,
    weights,
    *,
    label_smoothing=0.0,
    z_loss=0.0,
    softcap=0.0,
    scale=1.0,
    accuracy=False,
    chunk_tokens=CHUNK_TOKENS,
    vocab=0,
    groups=None,
    n_groups=0,
):
    """(sum of weights * loss, number of correct trained tokens), both float32 scalars.

    With groups, int32 [B, S] from 0 to n_groups - 1, a third value: the sum of weights * loss over
    each group's positions, float32 [n_groups], not differentiated.

    h [B, S, D] hidden states, w [V, D] head, targets int32 [B, S], weights float32 [B, S] (0 = not
    trained; not differentiated). The logits are scale * h @ w.T, soft-capped when softcap > 0; rows
    of w from `vocab` on (0 = none) are padding, no tokens. The second value is 0 unless `accuracy`.
    All weights zero gives 0 with zero gradients.
    """
    B, S = targets.shape
    chunk = min(S, max(1, -(-chunk_tokens // B)))
    opts = (label_smoothing, z_loss, softcap, scale, accuracy, vocab, n_groups)
    total, (hits, sums) = _fused(opts, chunk, h, w, targets, weights.astype(jnp.float32), groups)
    return (total, hits) if groups is None else (total, hits, sums)
