"""The GPU attention kernels, interpreted, against the reference; and lowered for CUDA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import sftjax
from benchmarks.gpu import TRITON, stand_in
from benchmarks.triton_attention import NOBODY, Blocks, How, block_map, ranges, triton
from sftjax import parallel
from sftjax.ops import attention as attention_lib
from sftjax.ops.attention.asked import Extra

SMALL = (Blocks(32, 16, 4, 2), Blocks(16, 32, 4, 2), Blocks(32, 32, 4, 2))  # many blocks a row


def row(*lengths, pad=0):
    """(segments, positions) of documents of these lengths, then padding."""
    segments = np.repeat([*range(1, len(lengths) + 1), 0], [*lengths, pad])
    positions = np.concatenate([np.arange(n) for n in lengths] + [np.zeros(pad, int)])
    return segments, positions


def value_and_grads(fn, arrays, cotangent, where, causal, window, softcap, sinks, **more):
    places = attention_lib.Where(*(x for x in where for _ in "qk"))
    uses_sinks = sinks

    def loss(q, k, v, sinks):
        o = attention_lib.Options(causal, window, softcap, q.shape[-1] ** -0.5)
        out = fn(q, k, v, Extra(sinks if uses_sinks else None), places, o, **more)
        return jnp.sum(out * cotangent), out

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))(*arrays)


@pytest.mark.parametrize(
    "heads, kv_heads, width, how",
    [
        (4, 2, 16, dict()),
        (2, 2, 24, dict(window=19, sinks=True)),
        (3, 1, 8, dict(softcap=2.0)),
        (2, 1, 16, dict(causal=False, window=19)),
    ],
    ids=str,
)
def test_equals_the_reference(heads, kv_heads, width, how):
    """Value and every gradient, over rows of unequal documents, with padding and without."""
    rng = np.random.default_rng(0)
    rows = [row(37, 1, 60, 2, pad=11), row(111)]
    where = tuple(jnp.asarray(np.stack(x)) for x in zip(*rows, strict=True))
    shapes = [(2, 111, n, width) for n in (heads, kv_heads, kv_heads)] + [(heads,)]
    arrays = [jnp.asarray(2 * rng.normal(size=s), jnp.float32) for s in shapes]
    real = (where[0] > 0)[:, :, None, None]
    cotangent = jnp.asarray(rng.normal(size=shapes[0]), jnp.float32) * real
    how = dict(causal=True, window=0, softcap=0.0, sinks=False) | how
    (_, expected), exact = value_and_grads(attention_lib.xla, arrays, cotangent, where, **how)
    (_, out), grads = value_and_grads(triton, arrays, cotangent, where, **how, sizes=SMALL)
    np.testing.assert_allclose(out * real, expected * real, atol=5e-6)
    assert not np.any(np.where(real, 0, out))  # padding sees nothing
    for ours, theirs in zip(grads, exact, strict=True):
        assert jnp.linalg.norm(ours - theirs) <= 1e-5 * jnp.linalg.norm(theirs)


def test_documents_do_not_see_each_other():
    """A model run by the kernel: another first document leaves the second bit-equal."""
    model = tiny.model(attention=TRITON, layers=2)
    params = tiny.params(model)
    segments, positions = (x[None] for x in row(20, 30, pad=6))
    tokens = np.random.default_rng(0).integers(1, 64, (1, 56))
    other = np.where(segments == 1, (tokens + 5) % 64, tokens)
    apply = jax.jit(model.apply)
    first, second = (
        np.asarray(apply(params, dict(tokens=t, segments=segments, positions=positions))) for t in (tokens, other)
    )
    np.testing.assert_array_equal(first[0, 20:50], second[0, 20:50])
    assert np.abs(first - second)[0, :20].max() > 0.1


@pytest.mark.slow
def test_on_a_mesh_as_on_one_device():
    """Heads, rows and queries shared; keys gathered over a context axis of balanced parts."""
    model = tiny.model(attention=TRITON, layers=1)
    params, batch = tiny.params(model), tiny.batch(rows=2, length=64)
    loss_fn = sftjax.losses.causal_lm(model)

    def run(batch):
        fn = jax.value_and_grad(lambda p: loss_fn(p, batch, None).sum)
        return jax.jit(fn)(params)

    alone = run(batch)
    mesh = parallel.make_mesh({"data": 2, "tensor": 2, "context": 2})
    with jax.set_mesh(mesh):
        shared = run(parallel.put_batch(mesh, batch, 2))
    for ours, theirs in zip(*map(jax.tree.leaves, (shared, alone)), strict=True):
        assert np.linalg.norm(ours - theirs) <= 1e-5 * np.linalg.norm(theirs)


def brute_map(how, blocks, where):
    seen = attention_lib.mask(attention_lib.Where(*where), how.causal, how.window)
    B, S, T = seen.shape
    seen = seen.reshape(B, S // blocks.q, blocks.q, T // blocks.k, blocks.k)
    return seen.any((2, 4)), seen.all((2, 4))


@pytest.mark.parametrize("causal, window", [(True, 0), (True, 40), (False, 0), (False, 40)])
def test_block_map_loses_no_pair_and_wastes_no_block(causal, window):
    blocks, how = Blocks(32, 16, 4, 2), How(causal, window, 0.0, 1.0, ())
    packed = row(128, 30, 3, 60, 99, 64, pad=128)
    shuffled = np.random.default_rng(1).permutation(512)
    rows = [packed, row(512), tuple(x[shuffled] for x in packed)]
    segments, positions = (jnp.asarray(np.stack(x)) for x in zip(*rows, strict=True))
    where = (
        jnp.where(segments == 0, NOBODY, segments), jnp.where(segments == 0, NOBODY + 1, segments),
        positions, positions,
    )  # fmt: skip
    connected, whole = block_map(how, blocks, *where)
    some, every = brute_map(how, blocks, where)
    assert not np.any(some & ~connected)
    np.testing.assert_array_equal(whole, every)
    # In rows as the packer makes them, a block is visited in vain only beside padding.
    np.testing.assert_array_equal(connected[:2, :-5], some[:2, :-5])
    lo, start, stop, hi = np.moveaxis(np.asarray(ranges(connected, whole)), -1, 0)
    for b, i, j in np.ndindex(*connected.shape):
        assert lo[b, i] <= j < hi[b, i] or not some[b, i, j]
        assert not (start[b, i] <= j < stop[b, i]) or every[b, i, j]
    assert np.all((lo <= start) & (start <= stop) & (stop <= hi))


def test_a_packed_row_costs_what_its_documents_cost():
    blocks, how = Blocks(64, 64, 4, 2), How(True, 0, 0.0, 1.0, ())

    def visits(*lengths):
        segments, positions = (jnp.asarray(x)[None] for x in row(*lengths))
        bounds = ranges(*block_map(how, blocks, segments, segments, positions, positions))
        return int((bounds[..., 3] - bounds[..., 0]).sum())

    assert visits(4096) == 64 * 65 // 2
    assert visits(*[256] * 16) == 16 * (4 * 5 // 2)


@pytest.mark.parametrize(
    "N, K, H, how",
    [(32, 8, 64, {}), (32, 8, 128, dict(window=1024, softcap=50.0, sinks=True))],
    ids=["1B", "8B"],
)
def test_lowers_for_cuda_without_a_score_matrix(N, K, H, how):
    S = 8192

    def loss(q, k, v, sinks, segments, positions):
        out = attention_lib.attention(
            q, k, v, segments=segments, positions=positions, backend=TRITON,
            **how | ({"sinks": sinks} if "sinks" in how else {}),
        )  # fmt: skip
        return jnp.sum(out, dtype=jnp.float32)

    half = [jax.ShapeDtypeStruct((1, S, n, H), jnp.bfloat16) for n in (N, K, K)]
    where = [jax.ShapeDtypeStruct((1, S), jnp.int32)] * 2
    sinks = jax.ShapeDtypeStruct((N,), jnp.float32)
    with stand_in():
        traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*half, sinks, *where)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @__gpu$xla.gpu.triton") == 3
    assert f"{S}x{S}" not in text
    assert f"x{N}x{H}xbf16" in text and f"x{S}x{K}x{N // K}x{H}x" not in text  # keys not repeated


def test_refused_where_it_cannot_run():
    with pytest.raises(ValueError, match="triton_attention.py:TRITON' does not run on cpu"):
        attention_lib.check(TRITON, {"segments", "window", "softcap", "sinks"})
    wide = tiny.model(attention=TRITON, head_dim=320)
    batch = tiny.batch(rows=1)
    params = sftjax.params.shapes(wide.abstract)
    with pytest.raises(ValueError, match="head_dim=320; at most 256"):
        jax.eval_shape(wide.apply, params, batch)
