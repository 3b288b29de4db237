"""The TPU's attention, its kernels interpreted on a CPU: against the reference, and on a mesh."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sftjax import parallel
from sftjax.ops.attention import attention, splash

B, S, N, K, H = 2, 512, 4, 2, 64
CASES = [
    {},
    {"causal": False},
    {"window": 100, "softcap": 5.0, "sinks": jnp.array([0.1, 0.2, 0.3, -1.0])},
]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setattr(splash, "INTERPRET", True)


@pytest.fixture(scope="module")
def inputs():
    """q, k, v, and documents with padding after them."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.float32(rng.normal(size=(B, S, n, H))) for n in (N, K, K))
    segments, positions = np.zeros((2, B, S), np.int32)
    for row, cuts in enumerate([[0, 100, 300, 450], [0, 37, S]]):
        for i, (a, b) in enumerate(itertools.pairwise(cuts)):
            segments[row, a:b], positions[row, a:b] = i + 1, np.arange(b - a)
    return (q, k, v), dict(segments=segments, positions=positions)


def run(backend, args, where, **how):
    """(output where there is a token, gradients) of a sum that weighs each value differently."""

    def total(*args):
        out = attention(*args, **where, **how, backend=backend)
        out = jnp.where((where["segments"] > 0)[..., None, None], out, 0)
        return jnp.sum(jnp.sin(out)), out

    return jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))(*args)


def close(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


@pytest.mark.slow
@pytest.mark.parametrize("how", CASES, ids=lambda how: "-".join(how) or "causal")
def test_values_and_gradients_are_those_of_the_reference(inputs, how):
    args, where = inputs
    close(run("splash", args, where, **how), run("xla", args, where, **how))


@pytest.mark.slow
@pytest.mark.parametrize("how", [CASES[0], CASES[2]], ids=["causal", "all"])
def test_on_a_context_axis_each_shard_has_its_places_and_all_keys(inputs, how):
    args, where = inputs
    expected = run("xla", args, where, **how)
    mesh = parallel.make_mesh({"context": 2, "tensor": 2, "data": 2})

    def spread(x):  # as forward does it; the outputs are put back
        return x[:, parallel.places(S, 2)]

    moved = {k: spread(v) for k, v in where.items()}
    with jax.set_mesh(mesh):
        found = run("splash", [spread(x) for x in args], moved, **how)
    back = np.argsort(parallel.places(S, 2))
    close(jax.tree.map(lambda x: np.asarray(x)[:, back], found), expected)


def test_places_share_causal_work_evenly_between_shards():
    assert parallel.places(8, 1).tolist() == list(range(8))
    assert parallel.places(8, 2).tolist() == [0, 1, 6, 7, 2, 3, 4, 5]
    for shards in (2, 4):
        work = (parallel.places(64, shards) + 1).reshape(shards, -1).sum(1)
        assert len(set(work.tolist())) == 1
    with pytest.raises(parallel.MeshError, match="12 tokens .* twice mesh.context=4"):
        parallel.places(12, 4)


def test_a_row_is_put_into_the_order_of_the_context_axis_and_back():
    x = jnp.arange(4 * 32 * 3, dtype=jnp.float32).reshape(4, 32, 3)
    with jax.set_mesh(parallel.make_mesh({"context": 4, "data": 2})):
        there = jax.jit(parallel.spread)(x)
        back = jax.jit(lambda x: parallel.spread(x, back=True))(there)
    np.testing.assert_array_equal(there, x[:, parallel.places(32, 4)])
    np.testing.assert_array_equal(back, x)


def test_blocks_divide_the_row_and_grow_with_it():
    assert [splash.block(n, 1024) for n in (128, 640, 2048, 4096, 8192)] == [
        128,
        128,
        512,
        1024,
        1024,
    ]
    with pytest.raises(ValueError, match="a multiple of 128 tokens .* found 200.*data.max_length"):
        splash.block(200, 1024)
