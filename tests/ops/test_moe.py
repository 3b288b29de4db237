"""Mixtures of experts: the layer, its load-balancing loss, a mesh; FLOPs of every kind of model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

import sftjax
from sftjax import parallel
from sftjax import params as params_lib
from sftjax.models import decoder, flops
from sftjax.ops import moe
from sftjax.ops.rope import Rope

B, S, D, F, E = 8, 6, 12, 10, 8
MESH = {"expert": 2, "fsdp": 2, "tensor": 2}


def glu(gate, up):
    return jax.nn.silu(gate) * (up + 1)


def layer(bias, seed=0):
    """(x, router logits, params, cotangent). Expert 0 is never chosen, the others unevenly."""
    rng = np.random.default_rng(seed)
    shapes = {"gate": (E, D, F), "up": (E, D, F), "down": (E, F, D)}
    p = {n: {"w": rng.normal(size=s) * s[1] ** -0.5} for n, s in shapes.items()}
    for name, shape in shapes.items():
        if bias:
            p[name]["b"] = rng.normal(size=(E, shape[2]))
    logits = rng.normal(size=(B, S, E)) + np.array([-20.0, -2.0, 3.0, 0.0, 1.0, 0.0, -1.0, 0.0])
    x, cotangent = rng.normal(size=(2, B, S, D))
    return jax.tree.map(np.float32, (x, logits, p, cotangent))


def mixture(x, logits, p, cotangent, k, renormalise):
    """(sum of output x cotangent, output) of sftjax."""
    chosen, weights, _ = moe.route(logits, k, renormalise)
    y = moe.mixture(x, chosen, weights, p, glu)
    return jnp.sum(y * cotangent), y


def loop(x, logits, p, cotangent, k, renormalise):
    """The same: every expert for every token, the tokens that did not choose it weighing 0."""
    probs = jnp.exp(logits) / jnp.exp(logits).sum(-1, keepdims=True)
    kth = jnp.sort(probs, -1)[..., -k, None]
    weights = jnp.where(probs >= kth, probs, 0.0)
    if renormalise:
        weights /= weights.sum(-1, keepdims=True)
    y = 0.0
    for e in range(E):
        gate, up = (x @ p[n]["w"][e] + p[n].get("b", np.zeros((E, 1)))[e] for n in ("gate", "up"))
        out = glu(gate, up) @ p["down"]["w"][e] + p["down"].get("b", np.zeros((E, 1)))[e]
        y += weights[..., e, None] * out
    return jnp.sum(y * cotangent), y


def close(ours, expected, tolerance):
    """Every leaf: max |difference| / max |expected|."""
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


@pytest.mark.parametrize("k, renormalise, bias", [(2, True, True), (3, False, False), (1, False, True)])
def test_the_layer_equals_a_float64_loop_over_experts(k, renormalise, bias):
    args = layer(bias)
    counts = np.bincount(np.argsort(args[1], -1)[..., -k:].ravel(), minlength=E)
    assert counts[0] == 0 and counts.max() > 3 * counts[counts > 0].min()

    def both(fn):
        fn = functools.partial(fn, k=k, renormalise=renormalise)
        return jax.jit(jax.value_and_grad(fn, argnums=(0, 1, 2), has_aux=True))

    (_, y), grads = both(mixture)(*args)
    with jax.enable_x64(True):
        (_, expected), expected_grads = both(loop)(*jax.tree.map(np.float64, args))
        assert expected.dtype == np.float64
    close(y, expected, 1e-6)
    close(grads, expected_grads, 2e-6)
    assert not np.any(grads[2]["up"]["w"][0])  # of the expert without a token


@pytest.mark.parametrize("sizes", [MESH, {"expert": 4, "tensor": 2}, {"context": 2, "data": 2, "expert": 2}], ids=str)
def test_the_layer_on_a_mesh_equals_one_device(sizes):
    args, mesh = layer(bias=True), parallel.make_mesh(sizes)
    fn = functools.partial(mixture, k=2, renormalise=True)
    fn = jax.value_and_grad(fn, argnums=(0, 1, 2), has_aux=True)
    expected = jax.jit(fn)(*args)
    with jax.set_mesh(mesh):
        close(jax.jit(fn)(*args), expected, 2e-6)


@jax.custom_vjp
def careless_dot(rows, w, sizes):
    """ragged_dot as a kernel may do it: rows past the last group are neither read nor written."""
    return careless_forward(rows, w, sizes)[0]


def unwritten(y, sizes):
    return jnp.where(jnp.arange(len(y))[:, None] < sizes.sum(), y, jnp.nan)


def careless_forward(rows, w, sizes, dot=jax.lax.ragged_dot):
    y, vjp = jax.vjp(lambda rows, w: dot(rows, w, sizes), rows, w)
    return unwritten(y, sizes), (vjp, sizes)


def careless_backward(saved, g):
    vjp, sizes = saved
    rows, w = vjp(jnp.where(jnp.arange(len(g))[:, None] < sizes.sum(), g, 0))
    return unwritten(rows, sizes), w, None


careless_dot.defvjp(careless_forward, careless_backward)


def test_rows_of_other_shards_experts_may_come_back_as_anything(monkeypatch):
    args = layer(bias=True)
    fn = functools.partial(mixture, k=2, renormalise=True)
    fn = jax.value_and_grad(fn, argnums=(0, 1, 2), has_aux=True)
    expected = jax.jit(fn)(*args)
    monkeypatch.setattr(jax.lax, "ragged_dot", careless_dot)
    with jax.set_mesh(parallel.make_mesh(MESH)):
        close(jax.jit(fn)(*args), expected, 2e-6)


def test_load_balance_is_the_switch_formula():
    rng, k, L = np.random.default_rng(0), 2, 3
    logits = rng.normal(size=(L, B, S, E))
    real = np.arange(S) < rng.integers(1, S, (B, 1))

    def balance(logits):
        sums = []
        for layer in logits:
            chosen, _, probs = moe.route(layer, k, True)
            sums.append(moe.routing_sums(chosen, probs, real))
        return moe.load_balance(jax.tree.map(lambda *a: sum(a), *sums))

    # Of the tokens of all layers in one list: E x sum over experts of (how often it is among a
    # token's first k) x (its mean probability).
    tokens = logits[:, real].reshape(-1, E)
    probs = np.exp(tokens) / np.exp(tokens).sum(-1, keepdims=True)
    often = np.zeros(E)
    for token in tokens:
        often[np.argsort(token)[-k:]] += 1 / len(tokens)
    assert balance(logits) == pytest.approx(E * np.sum(often * probs.mean(0)), rel=1e-6)
    # Its gradient is that of the probabilities alone; padding has none.
    inner = probs * (often - (probs * often).sum(-1, keepdims=True)) * E / len(tokens)
    expected = np.zeros_like(logits)
    expected[:, real] = inner.reshape(L, -1, E)
    close(jax.grad(balance)(jnp.float32(logits)), expected, 1e-5)


def _shift_biases(name, x):
    shift = 0.3 * np.sin(np.arange(x.size, dtype=np.float32)).reshape(x.shape)
    return np.asarray(x) + shift * name.endswith("/b")


@pytest.fixture(scope="module")
def setup():
    """A tiny mixture with biases, its parameters and a batch of unequal trained-token counts."""
    model = tiny.model(layers=2, mlp=24, experts=4, experts_per_token=2, mlp_bias=True)
    params = params_lib.map_named(_shift_biases, tiny.params(model))
    return model, params, tiny.batch(rows=8)


@functools.partial(jax.jit, static_argnums=(0, 3))
def loss_of(model, params, batch, load_balance=0.0):
    return sftjax.losses.causal_lm(model, load_balance=load_balance)(params, batch, None)


def test_the_model_balances_over_all_layers_at_once(setup):
    """With a router of biases alone, choices and probabilities are known."""
    model, params, batch = setup
    b = np.float32([[2.0, 1.0, 0.0, -1.0], [-1.0, 0.0, 1.5, 0.5]])
    stack = params["layers"]["0-1"]
    mlp = stack["mlp"] | {"router": {"w": np.zeros((2, 32, 4), np.float32), "b": b}}
    loss = loss_of(model, params | {"layers": {"0-1": stack | {"mlp": mlp}}}, batch)
    often = np.array([[1, 1, 0, 0], [0, 0, 1, 1]]).mean(0)
    probs = (np.exp(b) / np.exp(b).sum(-1, keepdims=True)).mean(0)
    balance, weight = loss.metrics["load_balance"]
    assert weight == batch["weights"].sum()
    assert balance / weight == pytest.approx(4 * np.sum(often * probs), rel=1e-6)


def test_padding_is_not_balanced(setup):
    model, params, batch = setup
    padding = batch["segments"] == 0
    assert padding.sum() > 8
    other = batch | {"tokens": np.where(padding, 33, batch["tokens"])}
    found = [loss_of(model, params, b).metrics["load_balance"] for b in (batch, other)]
    assert found[0] == found[1]


@pytest.mark.slow
def test_the_loss_adds_it_weighed_by_trained_tokens(setup):
    model, params, batch = setup
    halves = [{k: v[i::2] for k, v in batch.items()} for i in range(2)]
    parts = [loss_of(model, params, half) for half in halves]
    weights = [float(part.weight) for part in parts]
    assert weights[0] != weights[1]
    tokens = float(sum(part.sum for part in parts)) / sum(weights)
    means = [float(part.metrics["load_balance"][0] / part.weight) for part in parts]
    assert means[0] != pytest.approx(means[1], rel=1e-3)
    balance = np.average(means, weights=weights)

    tx = optax.sgd(0.1)
    loss_fn = sftjax.losses.causal_lm(model, load_balance=0.01)
    step = functools.partial(sftjax.train_step, loss_fn=loss_fn, tx=tx, micro_batches=2)
    state = sftjax.TrainState.create(params=params, tx=tx)
    state, metrics = jax.jit(step)(state, batch)
    assert metrics["load_balance"] == pytest.approx(balance, rel=1e-5)
    assert metrics["loss"] == pytest.approx(tokens + 0.01 * balance, rel=1e-6)

    mesh = parallel.make_mesh(MESH)
    with jax.set_mesh(mesh):
        params = jax.device_put(params, parallel.param_shardings(mesh, model.abstract))
        start = sftjax.TrainState.create(params=params, tx=tx)
        sharded, again = jax.jit(step)(start, parallel.put_batch(mesh, batch, 8))
    for name in ("loss", "load_balance", "grad_norm"):
        np.testing.assert_allclose(again[name], metrics[name], rtol=1e-5)
    close(sharded.params, state.params, 1e-5)


# ---- FLOPs ---------------------------------------------------------------------------------

PAIRS = {0: 1000, 9: 70, 5: 50}
SIZE = dict(vocab=64, width=32, heads=4, kv_heads=2, head_dim=8, mlp=24)
ATTENTION = 32 * 8 * (4 + 2 + 2 + 4)  # weights of a layer
SEEN = 4 * 4 * 8  # FLOPs of a pair


def flops_of(config, trained=r".*", tokens=100, trained_tokens=10):
    rules = ((trained, True), (".*", False)) if trained != ".*" else ((".*", True),)
    on = params_lib.match_rules(rules, decoder.abstract(config), "trainable")
    return flops.train_flops(config, on)(tokens, trained_tokens, PAIRS.__getitem__)


def test_flops_count_the_chosen_experts_alone():
    config = decoder.Config(**SIZE, layers=3, experts=8, experts_per_token=2)
    weights = ATTENTION + 32 * 8 + 2 * 3 * 32 * 24
    expected = 6 * (100 * 3 * weights + 10 * 64 * 32) + 3 * 3 * SEEN * 1000
    assert flops_of(config) == expected


def test_flops_count_each_layer_window():
    kinds = (decoder.Kind(9, Rope()), decoder.Kind(9, Rope()), decoder.Kind(0, Rope()))
    config = decoder.Config(**SIZE, layers=7, kinds=kinds)
    weights = ATTENTION + 3 * 32 * 24
    expected = 6 * (100 * 7 * weights + 10 * 64 * 32) + 3 * SEEN * (5 * 70 + 2 * 1000)
    assert flops_of(config) == expected


def test_flops_count_every_loop():
    """A later pass attends twice. The gates, a vector a head, count in each pass."""
    config = decoder.Config(**SIZE, layers=3, loops=2, loop_window=5)
    weights = ATTENTION + 3 * 32 * 24 + 4 * 8
    expected = 6 * (100 * 2 * 3 * weights + 10 * 64 * 32) + 3 * 3 * SEEN * (2 * 1000 + 50)
    assert flops_of(config) == expected


def test_flops_of_a_frozen_prefix_are_those_of_its_forward_pass():
    config = decoder.Config(**SIZE, layers=3, split=(2,))
    weights = ATTENTION + 3 * 32 * 24
    expected = 100 * (2 * 2 + 6) * weights + 10 * 4 * 64 * 32 + (2 + 3) * SEEN * 1000
    assert flops_of(config, "layers/2-2/.*") == expected
    # A second pass goes back through the frozen layers to the trained ones of the first.
    config = decoder.Config(**SIZE, layers=3, split=(2,), loops=2, loop_window=5)
    weights += 4 * 8
    layers = 100 * ((2 * 2 + 6) + (2 * 4 + 6)) * weights
    seen = SEEN * ((2 + 3) * 1000 + 3 * 3 * (1000 + 50))
    assert flops_of(config, "layers/2-2/.*") == layers + 10 * 4 * 64 * 32 + seen
