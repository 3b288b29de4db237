"""Every attention backend of this platform against float64, over one grid of cases."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sftjax.ops.attention import BACKENDS, attention, blockwise

# name -> (query heads, key/value heads, head width, length, documents of a row, options)
GRID = {
    "one document": (2, 2, 8, 96, [96], {}),
    "one block and a bit": (4, 2, 8, 150, [70, 60], {}),  # and 20 of padding
    "many documents": (6, 2, 16, 300, [17] * 15 + [40], {}),
    "rows apart": (3, 1, 8, 700, [130, 5, 300, 1, 64, 190], {}),
    "all heads share one key": (8, 1, 8, 200, [120, 80], {}),
    "window": (4, 4, 8, 300, [260, 30], {"window": 30}),
    "window of one": (2, 1, 8, 140, [100, 40], {"window": 1}),
    "long rows with a window": (2, 1, 8, 1100, [1000, 90], {"window": 140}),
    "softcap": (4, 2, 8, 200, [150, 40], {"softcap": 2.0}),
    "sinks": (4, 2, 8, 200, [150, 40], {"sinks": True}),
    "window, softcap and sinks": (6, 3, 16, 640, [300, 200, 100],
                                  {"window": 70, "softcap": 3.0, "sinks": True}),
    "bidirectional": (4, 2, 8, 260, [140, 90], {"causal": False}),
    "bidirectional in a window": (2, 2, 8, 600, [500, 60], {"causal": False, "window": 50}),
    "scale": (2, 1, 8, 64, [40, 20], {"scale": 0.7}),
    "documents in any order": (4, 2, 8, 640, [200, 150, 250], {"shuffle": "documents"}),
    "distances": (4, 2, 8, 300, [260, 30], {"distances": 32, "furthest": 128}),
    "distances both ways": (2, 2, 8, 300, [260, 30],
                            {"distances": 32, "furthest": 128, "causal": False}),
    "tokens in any order": (2, 1, 8, 300, [200, 80], {"shuffle": "tokens", "window": 20}),
}  # fmt: skip


def inputs(case):
    heads, kv_heads, width, length, documents, options = GRID[case]
    rng, options = np.random.default_rng(0), dict(options)
    segments = np.zeros((2, length), np.int32)
    positions = np.zeros((2, length), np.int32)
    shuffle = options.pop("shuffle", None)
    for row in range(2):
        lengths = documents[:: 1 - 2 * row]  # the second row has them the other way round
        ids = np.arange(len(lengths))
        if shuffle == "documents":
            rng.shuffle(ids)
        s, p = np.repeat(ids + 1, lengths), np.concatenate([np.arange(n) for n in lengths])
        order = rng.permutation(len(s)) if shuffle == "tokens" else np.arange(len(s))
        segments[row, : len(s)], positions[row, : len(s)] = s[order], p[order]
    q, k, v, g = (rng.normal(size=(2, length, n, width)) for n in (heads, kv_heads, kv_heads, heads))
    sinks = rng.normal(size=heads) if options.pop("sinks", False) else None
    buckets = options.pop("distances", 0)
    table = rng.normal(size=(heads, buckets)) if buckets else None
    args, g = (q, k, v, sinks, table), g * (segments > 0)[..., None, None]
    return args, g, segments, positions, options


def t5_bucket(behind, buckets, furthest, causal):
    """The bucket of a distance by T5's formula, in float64."""
    n = buckets if causal else buckets // 2
    d = np.maximum(behind, 0) if causal else np.abs(behind)
    with np.errstate(divide="ignore"):
        wide = n // 2 + np.floor(np.log2(d / (n // 2)) / np.log2(furthest / (n // 2)) * (n - n // 2))
    found = np.where(d < n // 2, d, np.minimum(wide, n - 1)).astype(int)
    return found if causal else found + n * (behind < 0)


def reference(q, k, v, sinks, table, *, segments, positions, causal=True, window=0, softcap=0,
              scale=None, furthest=0):  # fmt: skip
    """The definition, in the inputs' dtype; padding gives 0."""
    group = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))
    s = jnp.einsum("bsnh,btnh->bnst", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    s = softcap * jnp.tanh(s / softcap) if softcap else s
    behind = positions[:, :, None] - positions[:, None]
    if table is not None:
        s += jnp.moveaxis(table[:, t5_bucket(behind, table.shape[1], furthest, causal)], 0, 1)
    seen = (segments[:, :, None] == segments[:, None]) & (segments[:, :, None] > 0)
    seen &= (behind >= 0) | (not causal)
    seen &= ((behind if causal else abs(behind)) < window) | (not window)
    e = jnp.where(seen[:, None], jnp.exp(s), 0)
    total = e.sum(-1, keepdims=True) + (0 if sinks is None else jnp.exp(sinks)[:, None, None])
    return jnp.einsum("bnst,btnh->bsnh", e / jnp.where(total > 0, total, 1), v)


def runs(backend):
    """Skipped, with the reason, where the backend has another platform."""
    platforms = BACKENDS[backend].platforms
    if jax.default_backend() not in platforms:
        pytest.skip(f"{backend} runs on {', '.join(platforms)}, not on {jax.default_backend()}")


@functools.cache  # for every backend
def in_float64(case):
    """(value, gradients of q, k, v, sinks, distances) by the definition."""
    args, g, segments, positions, options = inputs(case)
    where = dict(segments=segments, positions=positions, **options)

    @jax.jit  # one program is compiled sooner than each of its operations
    def both(args, g):
        out, vjp = jax.vjp(lambda *a: reference(*a, **where), *args)
        return out * (segments > 0)[..., None, None], *vjp(g)

    with jax.enable_x64(True):
        expected = both(tuple(map(np_or_none, args)), jnp.asarray(g))
        assert expected[0].dtype == np.float64
        return jax.tree.map(np.asarray, expected)


@pytest.mark.parametrize("case", GRID)
@pytest.mark.parametrize("backend", BACKENDS)
def test_value_and_gradients_equal_float64(backend, case):
    runs(backend)
    args, g, segments, positions, options = inputs(case)
    if args[-1] is not None and "distances" not in BACKENDS[backend].features:
        pytest.skip(f"{backend} has no distances")
    where = dict(segments=segments, positions=positions, **options)
    expected = in_float64(case)

    def run(q, k, v, sinks, distances):
        return attention(q, k, v, sinks=sinks, distances=distances, backend=backend, **where)

    @jax.jit
    def both(args, g):
        out, vjp = jax.vjp(run, *args)
        return out * (segments > 0)[..., None, None], *vjp(g)

    ours = both(jax.tree.map(jnp.float32, args), jnp.float32(g))
    for name, a, b in zip(("value", *"qkv", "sinks", "distances"), ours, expected, strict=True):
        if b is not None:
            error = np.abs(a - b).max() / max(np.abs(b).max(), 1)  # q's gradient may be 0
            # A distance's gradient is a sum over all pairs of tokens so far apart.
            assert error < (2e-5 if name == "distances" else 2e-6), f"{name}: {error}"


def np_or_none(x):
    return None if x is None else jnp.asarray(x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_c12_other_documents_are_bit_equal(backend):
    runs(backend)
    (q, k, v, *_), g, segments, positions, _ = inputs("rows apart")
    q, k, v, g = map(jnp.float32, (q, k, v, g))
    touched = (segments == 1)[..., None, None]

    @jax.jit
    def both(q, k, v, g):
        run = lambda *a: attention(*a, segments=segments, positions=positions, backend=backend)  # noqa: E731
        out, vjp = jax.vjp(run, q, k, v)
        return out, *vjp(g)

    before = both(q, k, v, g)
    after = both(*(jnp.where(touched, 3 * x + 1, x) for x in (q, k, v, g)))
    other = (segments > 1)[..., None, None]
    for a, b in zip(before, after, strict=True):
        assert np.any(np.where(touched, a != b, False))
        np.testing.assert_array_equal(np.where(other, a, 0), np.where(other, b, 0))


def blocks_met(segments, positions, causal=True, window=0):
    """How many key blocks each query block of one row visits."""
    cut = [blockwise._cut(jnp.asarray(x)[None], 1, blockwise.BLOCK) for x in (segments, positions)]
    o = blockwise.Options(causal, window, 0.0, 1.0)
    return blockwise._places(o, *cut, cut[1], *cut).met[0].tolist()


def test_blockwise_visits_the_blocks_that_a_document_connects_and_no_others():
    n, size = 8, blockwise.BLOCK
    ones, at = np.ones(n * size, int), np.arange(n * size)
    assert blocks_met(ones, at) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert blocks_met(ones, at, causal=False) == [8] * 8
    assert blocks_met(ones, at, window=2) == [1] + [2] * 7
    assert blocks_met(at // size + 1, at % size) == [1] * 8
    assert blocks_met(at // 64 + 1, at % 64) == [1] * 8
    # Documents of a block and a half: 0-191, 192-383, ...
    assert blocks_met(at // 192 + 1, at % 192) == [1, 2, 2, 1, 2, 2, 1, 2]
    assert blocks_met(np.where(at < 300, 1, 0), np.where(at < 300, at, 0)) == [1, 2, 3] + [0] * 5


def test_no_array_of_queries_times_keys_exists():
    S, shape = 4096, jax.ShapeDtypeStruct
    x, row = shape((1, S, 2, 16), jnp.float32), shape((1, S), jnp.int32)

    def loss(q, k, v, row):
        return jnp.sum(attention(q, k, v, segments=row, positions=row, backend="blockwise"))

    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x, row).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * S * S * 4 / 8
