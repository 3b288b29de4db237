"""The fused loss against the plain one (CASES X1, X3) and against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import token_loss

from sftjax import parallel
from sftjax.ops.cross_entropy import linear_cross_entropy

B, S, D, V = 4, 33, 16, 70


def inputs(dtype=np.float32, share=0.4):
    rng = np.random.default_rng(0)
    h = rng.normal(size=(B, S, D)).astype(dtype)
    w = rng.normal(size=(V, D)).astype(dtype)
    targets = rng.integers(0, 60, (B, S))
    weights = (rng.uniform(size=(B, S)) < share) * rng.uniform(0.5, 2, (B, S))
    weights[2] = 0  # a row without a trained token
    return h, w, targets, weights.astype(np.float32)


def plain(h, w, targets, weights, softcap=0.0, scale=1.0, dft=False, vocab=0, **kwargs):
    logits = jnp.einsum("bsd,vd->bsv", h, w[: vocab or None]) * scale
    logits = softcap * jnp.tanh(logits / softcap) if softcap else logits
    if dft:
        own = jnp.take_along_axis(jax.nn.softmax(logits), targets[..., None], -1)[..., 0]
        weights = weights * jax.lax.stop_gradient(own)
    return jnp.sum(token_loss(logits, targets, **kwargs) * weights)


OPTIONS = [
    {},
    {"label_smoothing": 0.1},
    {"z_loss": 0.01},
    {"softcap": 5.0, "scale": 0.5},
    {"label_smoothing": 0.2, "z_loss": 0.1, "softcap": 3.0},
    {"dft": True},
    {"vocab": 61, "label_smoothing": 0.1, "softcap": 4.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("chunk_tokens", [1, 12, 10_000])
def test_x1_value_and_gradients_equal_the_plain_loss_in_float64(options, chunk_tokens):
    h, w, targets, weights = inputs()
    with jax.enable_x64(True):
        exact = functools.partial(plain, targets=targets, weights=weights, **options)
        exact = jax.jit(jax.value_and_grad(exact, (0, 1)))  # compiled as one, sooner than by parts
        reference = exact(jnp.float64(h), jnp.float64(w))

    def fused(h, w):
        return linear_cross_entropy(h, w, targets, weights, chunk_tokens=chunk_tokens, **options)[0]

    value, grads = jax.jit(jax.value_and_grad(fused, (0, 1)))(h, w)
    np.testing.assert_allclose(value, reference[0], rtol=2e-6)
    for g, r in zip(grads, reference[1], strict=True):
        np.testing.assert_allclose(g, r, atol=1e-5 * np.abs(r).max())
    frozen_head = jax.jit(jax.grad(fused))(h, w)
    np.testing.assert_array_equal(frozen_head, grads[0])


@pytest.mark.parametrize("options", [{}, {"vocab": 61, "label_smoothing": 0.1}, {"softcap": 4.0}])
@pytest.mark.parametrize("sizes", [None, {"fsdp": 2, "tensor": 2}])
def test_a_bias_of_the_vocabulary_and_its_gradient(options, sizes):
    h, w, targets, weights = (x[:, :32] if x.shape[1] == S else x for x in inputs())
    b = np.random.default_rng(1).normal(size=V).astype(np.float32)
    vocab, softcap = options.get("vocab", V), options.get("softcap", 0.0)

    def exact(h, w, b):
        logits = jnp.einsum("bsd,vd->bsv", h, w[:vocab]) + b[:vocab]
        logits = softcap * jnp.tanh(logits / softcap) if softcap else logits
        smooth = options.get("label_smoothing", 0.0)
        return jnp.sum(token_loss(logits, targets, label_smoothing=smooth) * weights)

    def fused(h, w, b):
        return linear_cross_entropy(h, w, targets, weights, bias=b, chunk_tokens=12, **options)[0]

    with jax.enable_x64(True):
        reference = jax.jit(jax.value_and_grad(exact, (0, 1, 2)))(*map(jnp.float64, (h, w, b)))
    mesh = parallel.make_mesh(sizes, jax.devices()[: 4 if sizes else 1])
    with jax.set_mesh(mesh):
        value, grads = jax.jit(jax.value_and_grad(fused, (0, 1, 2)))(h, w, b)
    np.testing.assert_allclose(value, reference[0], rtol=3e-6)
    for ours, theirs in zip(grads, reference[1], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_x2_the_weighted_sum_and_the_normaliser_divide_as_they_should():
    h, w, targets, weights = inputs()
    total = linear_cross_entropy(h, w, targets, weights)[0]
    halved = linear_cross_entropy(h, w, targets, weights / 2)[0]
    np.testing.assert_allclose(total / 2, halved, rtol=1e-6)


def test_x3_nothing_trained_is_0_with_0_gradients():
    h, w, targets, weights = inputs()
    value, grads = jax.value_and_grad(lambda h, w: linear_cross_entropy(h, w, targets, 0 * weights)[0], (0, 1))(h, w)
    assert value == 0 and not any(np.any(g) for g in grads)


def test_accuracy_counts_first_choices_of_trained_tokens():
    h, w, targets, weights = inputs()
    best = np.argmax(np.einsum("bsd,vd->bsv", h, w), -1)
    targets = np.where(np.arange(S) % 2, best, targets)
    hits = linear_cross_entropy(h, w, targets, weights, accuracy=True)[1]
    assert hits == ((best == targets) & (weights > 0)).sum()


def test_token_loss_equals_known_values():
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.25]]))
    assert np.isclose(token_loss(logits, jnp.array([1]))[0], np.log(4))
    smooth = token_loss(logits, jnp.array([0]), label_smoothing=0.3)[0]
    assert np.isclose(smooth, 0.7 * np.log(2) + 0.3 * (np.log(2) + 2 * np.log(4)) / 3)
    assert np.isclose(token_loss(logits + 2, jnp.array([0]), z_loss=0.5)[0], np.log(2) + 0.5 * 4)


def test_x4_dft_of_equal_logits_is_half_the_loss_of_two_tokens():
    h, w, weights = np.ones((1, 3, 4), np.float32), np.zeros((2, 4), np.float32), np.ones((1, 3))
    args = (h, w, np.array([[0, 1, 1]]), weights)
    assert linear_cross_entropy(*args, dft=True)[0] == pytest.approx(3 * np.log(2) / 2)


MESHES = [
    {"fsdp": 4, "tensor": 2},
    {"data": 2, "fsdp": 2, "context": 2},
    {"expert": 2, "context": 4},
    {"data": 8},
]


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("rows", [72, 71], ids=["shared", "odd"])
def test_devices_that_share_the_vocabulary_give_the_loss_of_one(sizes, rows):
    """Of 71 rows no device can have its part: then each has the whole head."""
    rng = np.random.default_rng(1)
    h, w = rng.normal(size=(8, 32, D)), rng.normal(size=(rows, D))
    targets, weights = rng.integers(0, 70, (8, 32)), rng.uniform(0.5, 2, (8, 32))
    weights *= np.arange(8)[:, None] > rng.integers(0, 8, (8, 32))  # from none to nearly all
    groups = rng.integers(0, 3, (8, 32))
    h, w, weights = np.float32(h), np.float32(w), np.float32(weights)

    def loss(h, w):
        total, hits, sums = linear_cross_entropy(
            h, w, targets, weights, chunk_tokens=24, accuracy=True, groups=groups, n_groups=3,
            vocab=70, label_smoothing=0.1, z_loss=0.01,
        )  # fmt: skip
        return total, (hits, sums)

    run = jax.value_and_grad(loss, (0, 1), has_aux=True)
    expected = jax.jit(run)(h, w)
    with jax.set_mesh(parallel.make_mesh(sizes)):
        found = jax.jit(run)(h, w)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


def test_no_array_of_all_positions_times_vocabulary_exists():
    shape = jax.ShapeDtypeStruct
    args = (shape((8, 256, 64), jnp.float32), shape((8192, 64), jnp.float32))

    def loss(h, w):
        targets, weights = jnp.zeros((8, 256), jnp.int32), jnp.ones((8, 256))
        return linear_cross_entropy(h, w, targets, weights, chunk_tokens=64)[0]

    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*args).compile()
    logits = 8 * 256 * 8192 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < logits / 4
