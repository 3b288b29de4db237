"""The step's contract: one global division, any split, any mesh, frozen leaves untouched."""

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


def train(model, params, batches, micro=1, mesh=None, tx=None, trainable=((".*", True),), **loss):
    """[losses and gradient norms], and the final state, of training on the batches."""
    tx = tx or optax.adam(1e-3, eps=1e-5)
    loss_fn = sftjax.losses.causal_lm(model, **loss)
    step = functools.partial(sftjax.train_step, loss_fn=loss_fn, tx=tx, micro_batches=micro)
    mesh = mesh or parallel.make_mesh({}, jax.devices()[:1])
    with jax.set_mesh(mesh):
        params = jax.tree.map(jnp.copy, params)  # the state is donated
        params = jax.device_put(params, parallel.param_shardings(mesh, model.abstract))
        state = sftjax.TrainState.create(params=params, tx=tx, trainable=trainable)
        jitted, out = jax.jit(step, donate_argnums=0), []
        for b in batches:
            state, metrics = jitted(state, parallel.put_batch(mesh, b, len(b["tokens"])))
            out.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    return np.array(out), state


@pytest.fixture(scope="module")
def setup():
    model = tiny.model()
    batches = [tiny.batch(seed=i) for i in range(20)]
    return model, tiny.params(model), batches


@pytest.fixture(scope="module")
def reference(setup):
    return train(*setup)


def close(a, b, tolerance=1e-5):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param({"data": 8}, marks=pytest.mark.long),
        {"fsdp": 8},
        pytest.param({"tensor": 2, "fsdp": 4}, marks=pytest.mark.slow),
        {"data": 2, "fsdp": 2, "tensor": 2},
        pytest.param({"data": 4, "tensor": 2}, marks=pytest.mark.long),
        pytest.param({"data": 2, "context": 2, "tensor": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_every_mesh_gives_the_same_losses_over_20_steps(setup, reference, sizes):
    out, state = train(*setup, mesh=parallel.make_mesh(sizes))
    close(out, reference[0])
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(reference[1].params), strict=True):
        close(a, b, 1e-4)


@pytest.mark.parametrize("micro", [2, pytest.param(4, marks=pytest.mark.slow), pytest.param(8, marks=pytest.mark.slow)])
def test_every_split_into_micro_batches_gives_the_same_losses(setup, reference, micro):
    counts = setup[2][0]["weights"].reshape(-1, micro, 32).sum((0, 2))
    assert len(set(counts.tolist())) > 1, "the micro-batches must train unequal token counts"
    close(train(*setup, micro=micro)[0], reference[0])


@pytest.mark.slow
def test_micro_batches_on_a_mesh(setup, reference):
    mesh = parallel.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    close(train(*setup, micro=2, mesh=mesh)[0], reference[0])


@pytest.mark.parametrize(
    "loss",
    [
        pytest.param({"label_smoothing": 0.1}, marks=pytest.mark.slow),
        pytest.param({"z_loss": 1e-2}, marks=pytest.mark.long),
        {"normalise": "documents"},
    ],
    ids=str,
)
def test_loss_variants_are_normalised_the_same_way(setup, loss):
    model, params, batches = setup
    whole = train(model, params, batches[:3], **loss)[0]
    mesh = parallel.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    close(train(model, params, batches[:3], micro=2, mesh=mesh, **loss)[0], whole)


def test_an_all_masked_micro_batch_adds_exactly_nothing(setup):
    model, params, (batch, *_) = setup
    empty = {k: np.zeros_like(v) for k, v in batch.items()}
    doubled = {k: np.stack([batch[k], empty[k]], 1).reshape(16, 32) for k in batch}
    a, _ = train(model, params, [batch])
    b, _ = train(model, params, [doubled], micro=2)
    close(a, b, 1e-6)


def test_x3_all_weights_zero_is_loss_0_and_gradients_0(setup):
    model, params, (batch, *_) = setup
    batch = batch | {"weights": np.zeros_like(batch["weights"])}
    out, state = train(model, params, [batch], tx=optax.sgd(1.0))
    assert out.tolist() == [[0.0, 0.0]]
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_frozen_leaves_stay_bit_equal_and_have_no_optimizer_state(setup):
    model, params, batches = setup
    rules = (("layers/.*/mlp/.*", True), (".*", False))
    _, state = train(model, params, batches[:3], trainable=rules)
    trained = params_lib.flatten(state.params)
    assert trained and all("/mlp/" in name for name in trained)
    before = params_lib.flatten(params)
    for name, leaf in params_lib.flatten(state.frozen).items():
        np.testing.assert_array_equal(leaf, before[name])
    for name, leaf in trained.items():
        assert np.abs(leaf - before[name]).max() > 0
    slots = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert params_lib.count(slots) == 2 * params_lib.count(trained)


def test_the_whole_state_is_donated(setup):
    model, params, (batch, *_) = setup
    tx = optax.adamw(1e-3)
    step = functools.partial(sftjax.train_step, loss_fn=sftjax.losses.causal_lm(model), tx=tx, micro_batches=1)
    state = sftjax.TrainState.create(params=params, tx=tx)
    compiled = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
    assert compiled.memory_analysis().alias_size_in_bytes >= 3 * params_lib.nbytes(params)


def test_metrics_count_cells_tokens_and_trained_tokens(setup):
    model, params, (batch, *_) = setup
    tx = optax.sgd(0.0)
    state = sftjax.TrainState.create(params=params, tx=tx)
    loss_fn = sftjax.losses.causal_lm(model)
    _, m = jax.jit(functools.partial(sftjax.train_step, loss_fn=loss_fn, tx=tx))(state, batch)
    assert m["cells"] == 8 * 32
    assert m["tokens"] == (batch["segments"] > 0).sum()
    assert m["trained_tokens"] == (batch["weights"] > 0).sum()


def test_errors(setup):
    model, params, (batch, *_) = setup
    tx = optax.sgd(0.1)
    with pytest.raises(ValueError, match="rule 'layer/.*' matches no parameter.*embed/w"):
        sftjax.TrainState.create(params=params, tx=tx, trainable=(("layer/.*", True), (".*", False)))
    with pytest.raises(ValueError, match="no rule covers parameter"):
        sftjax.TrainState.create(params=params, tx=tx, trainable=(("layers/.*", True),))
    with pytest.raises(ValueError, match="every parameter is frozen"):
        sftjax.TrainState.create(params=params, tx=tx, trainable=((".*", False),))
    state = sftjax.TrainState.create(params=params, tx=tx)
    loss_fn = sftjax.losses.causal_lm(model)
    with pytest.raises(ValueError, match="8 does not divide into 3 micro-batches"):
        sftjax.train_step(state, batch, loss_fn=loss_fn, tx=tx, micro_batches=3)
    with pytest.raises(ValueError, match="normalise='rows'"):
        sftjax.losses.causal_lm(model, normalise="rows")
