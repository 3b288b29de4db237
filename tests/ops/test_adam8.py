"""Moments of 8 bits, and bfloat16 parameters: what they are worth over steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import PartitionSpec as P

import sftjax
from sftjax import config as config_lib
from sftjax import losses, optim, parallel
from sftjax import params as params_lib
from sftjax.ops import adam8
from sftjax.training import build


@pytest.mark.parametrize("root", adam8.ROOTS)
def test_codes_are_exact_in_the_mean_over_steps(root):
    x = jax.random.normal(jax.random.key(0), (4, 1000)) ** 3
    x = jnp.abs(x) if root == 4 else x
    again = jax.jit(lambda step: adam8._decode(*adam8._encode(x, root, step), root))
    drawn = jnp.stack([again(jnp.int32(step)) for step in range(200)])
    top = jnp.abs(x).reshape(4, 4, 250).max(-1).repeat(250, 1)
    assert float(jnp.abs(drawn[0] - x).max() / jnp.abs(x).max()) < 0.04  # one step of the format
    assert float((jnp.abs(drawn.mean(0) - x) / top).max()) < 1e-3
    assert not (root == 4 and (drawn == 0).any())


def test_a_moment_that_hardly_moves_is_not_stuck():
    """To the nearest code, 0.999 of a number would be that number again."""
    x, start = jnp.linspace(0.5, 1, 256), jnp.linspace(0.5, 1, 256)
    for step in range(300):
        x = 0.999 * adam8._decode(*adam8._encode(x, 4, jnp.int32(step)), 4)
    np.testing.assert_allclose(x / start, 0.999**300, rtol=0.05)


def test_a_bfloat16_parameter_keeps_small_steps():
    """Steps of a hundred-thousandth, far below the format's, add up to a thousandth in the mean."""
    p = jnp.full((4096,), -1.0, jnp.bfloat16)
    for step in range(100):
        p = adam8.add(p, jnp.full(p.shape, -1e-5), jnp.int32(step))
    assert p.dtype == jnp.bfloat16 and float(jnp.mean(p.astype(jnp.float32))) == pytest.approx(-1.001, abs=1e-4)
    assert adam8.add(jnp.float32(1.0), jnp.float32(1e-5), jnp.int32(0)) == jnp.float32(1.0) + jnp.float32(1e-5)


def trained(name, dtype=jnp.float32, mesh=None, steps=30, **changes):
    """(losses, state) of a tiny model on one batch."""
    model = tiny.model(width=64, mlp=128, **changes)
    params = jax.tree.map(lambda x: x.astype(dtype), tiny.params(model))
    on = jax.tree.map(lambda _: True, params)
    c = config_lib.get_default().optim
    c.name, c.weight_decay = name, 0.01
    tx = optim.make(c, optax.constant_schedule(3e-3), model.abstract, on)
    state = sftjax.TrainState.create(params=params, tx=tx, trainable=on)
    run = functools.partial(sftjax.train_step, loss_fn=losses.causal_lm(model), tx=tx)
    batch, found = tiny.batch(), []
    if mesh is not None:
        section = config_lib.get_default().model
        target = build.abstract_state(section, model, on, tx, mesh)
        state = jax.device_put(state, build.shardings_of(target))
        batch = parallel.put_batch(mesh, batch, 8)
        run = jax.jit(run, out_shardings=(build.shardings_of(state), None))
    run = run if mesh is not None else jax.jit(run)
    with jax.set_mesh(mesh or parallel.make_mesh({}, jax.devices()[:1])):
        for _ in range(steps):
            state, metrics = run(state, batch)
            found.append(float(metrics["loss"]))
    return found, state


@pytest.mark.slow
def test_eight_bits_learn_as_adam_does():
    (full, _), (less, state) = trained("adamw"), trained("adamw8")
    assert full[-1] < 0.5 * full[0]
    np.testing.assert_allclose(less, full, rtol=0.03)
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    large = [x for x in jax.tree.leaves(state.params) if not adam8._small(x)]
    assert {x.dtype.name for x in moments} == {"int8", "float32"}
    assert sum(x.nbytes for x in moments if x.dtype == jnp.int8) == 2 * sum(x.size for x in large)
    assert params_lib.nbytes(moments) < 3 * params_lib.count(state.params)  # heads of 8 numbers keep float32


@pytest.mark.slow
def test_bfloat16_parameters_have_float32_moments_and_learn():
    full, _ = trained("adamw")
    short, state = trained("adamw", jnp.bfloat16)
    assert {x.dtype.name for x in jax.tree.leaves(state.params)} == {"bfloat16"}
    assert {x.dtype.name for x in jax.tree.leaves(state.opt_state) if x.ndim} == {"float32"}
    np.testing.assert_allclose(short[-1], full[-1], rtol=0.1)


@pytest.mark.slow
def test_eight_devices_are_one():
    one, _ = trained("adamw8", steps=4)
    many, state = trained("adamw8", mesh=parallel.make_mesh({"fsdp": 4, "tensor": 2}), steps=4)
    np.testing.assert_allclose(many, one, rtol=1e-4)
    [mu] = [s.mu for s in state.opt_state if hasattr(s, "mu")]
    codes, scales = (next(iter(x["layers"].values()))["mlp"]["up"]["w"] for x in mu)
    assert codes.sharding.spec == P(None, "fsdp", "tensor") and scales.sharding.spec[:2] == (None, "fsdp")
