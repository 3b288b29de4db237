"""Schedules against transformers' formulas, optimizers by name, rules, frozen prefixes."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

import sftjax
from sftjax import config as config_lib
from sftjax import optim
from sftjax import params as params_lib


def settings(**changes):
    c = config_lib.get_default().optim
    for k, v in changes.items():
        c[k] = v
    return c


def everything(tree):
    return jax.tree.map(lambda _: True, tree, is_leaf=params_lib.is_param)


def test_schedules_follow_the_reference_formulas_at_every_step():
    total, warmup, decay, floor = 50, 10, 15, 0.1
    half = lambda t: 0.5 * (1 + math.cos(math.pi * (t - warmup) / (total - warmup)))  # noqa: E731
    reference = {
        "constant": lambda t: 1.0,
        "linear": lambda t: floor + (1 - floor) * (total - t) / (total - warmup),
        "cosine": lambda t: floor + (1 - floor) * half(t),
        "inverse_sqrt": lambda t: max(math.sqrt(warmup / t), floor),
        "wsd": lambda t: 1.0 if t < 35 else floor + (1 - floor) * (total - t) / decay,
    }
    assert set(reference) == set(optim.SCHEDULES)
    for name, formula in reference.items():
        lr = optim.schedule(name, 3e-4, total, warmup, decay, floor)
        for t in range(total + 1):
            expected = 3e-4 * (t / warmup if t < warmup else formula(t))
            np.testing.assert_allclose(lr(t), expected, rtol=1e-5, err_msg=f"{name} step {t}")
    with pytest.raises(ValueError, match="optim.schedule='cosin'; known: constant, linear"):
        optim.schedule("cosin", 1.0, 10)


FAST = ("adamw", "muon")


@pytest.mark.parametrize(
    "name",
    [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in optim.OPTIMIZERS],
)
def test_every_optimizer_lowers_the_loss(name):
    model = tiny.model()
    params, batch = tiny.params(model), tiny.batch()
    lr = {"sgd": 0.3, "lion": 1e-3}.get(name, 5e-3)
    decay = 0.0 if name == "adam" else 0.01
    tx = optim.make(
        settings(name=name, weight_decay=decay), lambda _: lr, model.abstract,
        everything(model.abstract),
    )  # fmt: skip
    state = sftjax.TrainState.create(params=params, tx=tx)
    step = jax.jit(functools.partial(sftjax.train_step, loss_fn=sftjax.losses.causal_lm(model), tx=tx))
    losses = []
    for _ in range(8):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.97 * losses[0]


def test_adamw_equals_optax_adamw_and_decays_neither_norms_nor_biases():
    model = tiny.model(qkv_bias=True)
    params = tiny.params(model)
    grads = jax.tree.map(jnp.cos, params)
    c = settings(name="adamw", weight_decay=0.1, clip=0.0)
    tx = optim.make(c, lambda _: 1e-2, model.abstract, everything(model.abstract))
    mask = params_lib.map_named(lambda name, _: not name.endswith(("norm/scale", "/b")), params)
    assert sum(not m for m in jax.tree.leaves(mask)) == 2 + 1 + 3
    reference = optax.adamw(1e-2, b1=c.b1, b2=c.b2, eps=c.eps, weight_decay=0.1, mask=mask)
    for t in (tx, reference):
        update, _ = t.update(grads, t.init(params), params)
        if t is tx:
            mine = update
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(update), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9)


def test_learning_rate_multipliers_and_clipping():
    model = tiny.model()
    params = tiny.params(model)
    grads = jax.tree.map(jnp.ones_like, params)
    c = settings(name="sgd", momentum=0.0, clip=1.0, lr_multipliers=(("embed/w", 0.1), (".*", 1.0)))
    tx = optim.make(c, lambda _: 1.0, model.abstract, everything(model.abstract))
    update, _ = tx.update(grads, tx.init(params), params)
    named = params_lib.flatten(update)
    one = 1 / math.sqrt(params_lib.count(params))  # clipped to a global norm of 1
    np.testing.assert_allclose(named["norm/scale"], -one, rtol=1e-5)
    np.testing.assert_allclose(named["embed/w"], -0.1 * one, rtol=1e-5)


def test_the_learning_rate_falls_with_the_depth():
    model = tiny.model(split=(3,))
    c = settings(name="sgd", momentum=0.0, clip=0.0, layer_decay=0.5)
    trainable = everything(model.abstract)
    tx = optim.make(c, lambda step: 1.0, model.abstract, trainable)
    params = tiny.params(model)
    ones = jax.tree.map(jnp.ones_like, params)
    updates, _ = tx.update(ones, tx.init(params), params)
    found = {k: -np.asarray(v) for k, v in params_lib.flatten(updates).items()}
    first, last = found["layers/0-2/attn/q/w"], found["layers/3-3/mlp/up/w"]
    assert [float(x.mean()) for x in first] == [0.125, 0.25, 0.5] and last.min() == last.max() == 1
    assert found["embed/w"].max() == 0.0625 and found["norm/scale"].min() == 1
    with pytest.raises(ValueError, match="optim.layer_decay=0.5: the model has no stack of layers"):
        optim.make(c, lambda step: 1.0, {"w": params_lib.Param((2,), (None,))}, {"w": True})


def test_muon_updates_are_orthogonal_per_layer_and_frozen_leaves_have_none():
    model = tiny.model()
    params = tiny.params(model)
    c = settings(name="muon", clip=0.0)
    trainable = params_lib.map_named(lambda n, _: "/attn/" not in n, model.abstract)
    tx = optim.make(c, lambda _: 1.0, model.abstract, trainable)
    trained, _ = params_lib.partition(params, trainable)
    update, _ = tx.update(jax.tree.map(jnp.sin, trained), tx.init(trained), trained)
    up = params_lib.flatten(update)["layers/0-3/mlp/up/w"][0]
    values = np.linalg.svd(up, compute_uv=False) / (0.2 * math.sqrt(64))
    assert values.min() > 0.5 and values.max() < 1.4  # Newton-Schulz: near 1
    assert params_lib.flatten(update).keys() == params_lib.flatten(trained).keys()


def test_errors_name_the_setting():
    model = tiny.model()
    on = everything(model.abstract)
    for changes, message in [
        (dict(name="adamm"), "optim.name='adamm'; known: adamw"),
        (dict(name="adam", weight_decay=0.1), "has no weight decay; use 'adamw'"),
        (dict(lr_multipliers=(("embed.*", 2.0),)), "optim.lr_multipliers: no rule covers"),
        (dict(weight_decay=0.1, decay=(("emb", 1.0), (".*", 1.0))), "optim.decay: rule 'emb' mat"),
        (dict(lr_multipliers=(("(", 1.0),)), "is not a regular expression"),
    ]:
        with pytest.raises(ValueError, match=message.replace("(", "\\(")):
            optim.make(settings(**changes), lambda _: 1.0, model.abstract, on)


@pytest.mark.slow
def test_a_frozen_prefix_costs_no_backward_by_compiled_flops():
    """Unrolled, so that XLA's FLOP count sees every layer."""

    def flops(rules, split=()):
        model = tiny.model(layers=8, scan=False, split=split)
        params, batch = tiny.params(model), tiny.batch()
        tx = optax.sgd(0.1)
        state = sftjax.TrainState.create(params=params, tx=tx, trainable=rules)
        step = functools.partial(sftjax.train_step, loss_fn=sftjax.losses.causal_lm(model), tx=tx)
        return jax.jit(step).lower(state, batch).compile().cost_analysis()["flops"]

    forward_share = 1 / 3
    whole = flops(((".*", True),))
    last_two = flops((("layers/6-7/.*", True), ("norm.*", True), (".*", False)), split=(6,))
    # 6 of 8 layers lose their backward, two thirds of their cost.
    assert last_two < (forward_share + (1 - forward_share) * 0.25) * 1.15 * whole
    biases = flops((("layers/0-7/attn_norm/scale", True), (".*", False)))
    assert biases < 0.85 * whole  # no weight gradients, though the backward goes all the way


def test_frozen_parts_of_any_choice():
    model = tiny.model(split=(1,))
    rules = (("layers/1-3/attn/[qv]/w", True), (".*", False))
    trained = params_lib.match_rules(rules, model.abstract, "optim.trainable")
    assert [n for n, t in params_lib.flatten(trained).items() if t] == [
        "layers/1-3/attn/q/w", "layers/1-3/attn/v/w",
    ]  # fmt: skip
