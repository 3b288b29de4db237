"""Steps that are not finite, and spikes: skipped, written down, stopped, rolled back."""

import functools
import json
import math
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

import sftjax
from sftjax import config as config_lib
from sftjax import parallel
from sftjax.errors import ConfigError, DivergenceError
from sftjax.step import Loss, TrainState
from sftjax.tasks.causal_lm import CausalLM
from sftjax.train import train
from sftjax.training import build, health, nan

NONE = SimpleNamespace(wait=lambda: None)  # checkpoints
FEED = SimpleNamespace(documents=lambda step: [f"train.jsonl:{step}"])


def section(**changes):
    c = config_lib.get_default().train
    for key, value in changes.items():
        c[key] = value
    return c


def metrics(loss, skipped=0.0):
    return {"loss": np.float32(loss), "grad_norm": np.float32(1), "skipped": np.float32(skipped)}


def suspects(workdir):
    return [json.loads(x) for x in (workdir / "suspects.jsonl").read_text().splitlines()]


# ---- the step ------------------------------------------------------------------------------


def quadratic(params, batch, rng, model_state=None):
    loss = jnp.sum((params["w"] * batch["x"]) ** 2)
    state = None if model_state is None else {"mean": batch["x"].mean()}
    return Loss(loss, jnp.float32(batch["x"].size), state=state)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("stateful", [False, True])
def test_an_update_that_is_not_finite_is_skipped_and_the_next_is_not(bad, micro_batches, stateful):
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1))
    own = {"mean": jnp.float32(0)} if stateful else None
    state = TrainState.create(params={"w": jnp.ones(3)}, tx=tx, model_state=own)
    step = jax.jit(functools.partial(sftjax.train_step, loss_fn=quadratic, tx=tx, micro_batches=micro_batches))
    good = {"x": jnp.ones((2, 3))}
    state, found = step(state, good)
    assert found["skipped"] == 0 and found["loss"] == 1
    after, found = step(state, {"x": good["x"].at[0, 1].set(bad)})
    assert found["skipped"] == 1 and not np.isfinite(found["loss"])
    assert after.step == 2
    old, new = (s.replace(step=0, rng=0) for s in (state, after))
    jax.tree.map(np.testing.assert_array_equal, new, old)
    last, found = step(after, good)
    assert found["skipped"] == 0 and last.params["w"][0] < after.params["w"][0]


def test_an_update_too_large_for_floats_is_skipped():
    tx = optax.sgd(1e38)
    state = TrainState.create(params={"w": jnp.ones(3)}, tx=tx)
    after, found = sftjax.train_step(state, {"x": jnp.ones((2, 3))}, loss_fn=quadratic, tx=tx)
    assert found["skipped"] == 1 and np.isfinite(found["loss"])
    np.testing.assert_array_equal(after.params["w"], state.params["w"])


# ---- what is done on the host --------------------------------------------------------------


def test_bad_steps_are_counted_with_their_documents_until_there_are_too_many(tmp_path, caplog):
    watch = health.Health(section(bad_steps=3), tmp_path, FEED)
    watch.see(1, [metrics(2), metrics(math.nan, 1), metrics(2), metrics(math.nan, 1)])
    assert watch.state == dict(skipped=2, spikes=0, rollbacks=0, lag=2)
    assert not watch.ill and not watch.sound
    again = [metrics(math.inf, 1), metrics(math.nan, 1)]
    watch.see(5, again)
    watch.see(5, again)  # the same ones
    assert watch.ill and watch.state["skipped"] == 4
    assert [m["lag"] for m in again] == [2, 3]
    assert [(s["step"], s["loss"], s["documents"]) for s in suspects(tmp_path)] == [
        (n, None, [f"train.jsonl:{n}"]) for n in (2, 4, 5, 6)
    ]
    assert {s["reason"] for s in suspects(tmp_path)} == {"nonfinite"}
    assert "step 2 is not finite: loss nan" in caplog.text and "suspects.jsonl" in caplog.text
    with pytest.raises(DivergenceError, match=r"step 6: .* not finite in 3 steps in a row; 4 of 6"):
        watch.mend(None, 6, None, SimpleNamespace(latest_step=lambda: None, wait=lambda: None))


def test_a_run_whose_last_step_is_not_finite_is_an_error_however_short(tmp_path):
    watch = health.Health(section(), tmp_path, FEED)
    watch.finish(0, NONE)
    watch.see(1, [metrics(1)])
    watch.finish(1, NONE)
    watch.see(2, [metrics(math.nan, 1)])
    with pytest.raises(DivergenceError, match="1 of 2 updates were skipped"):
        watch.finish(2, NONE)


def test_no_checkpoint_is_made_of_what_is_not_finite(tmp_path, caplog):
    watch = health.Health(section(), tmp_path, FEED)
    state = TrainState.create(params={"w": jnp.ones(3)}, tx=optax.adam(1.0))
    watch.see(1, [metrics(1)])
    assert watch.may_save(1, state)
    broken = state.replace(params={"w": jnp.array([1, jnp.nan, 1])})
    assert not watch.may_save(1, broken)
    assert "no checkpoint of step 1: params/w of its state is not finite" in caplog.text
    with pytest.raises(DivergenceError, match="the weights: not finite in 1 arrays: params/w"):
        watch.check(broken, "the weights")
    watch.see(2, [metrics(math.nan, 1)])
    assert not watch.may_save(2, state)


def test_the_check_before_a_save_is_compiled_once():
    before = health._finite._cache_size()
    tree = {"a": jnp.ones(7), "b": {"c": jnp.full((2, 5), 3.0)}, "n": jnp.int32(1)}
    for _ in range(3):
        assert health.not_finite(tree) == []
    assert health._finite._cache_size() == before + 1
    assert health.not_finite(tree | {"a": jnp.full(7, jnp.nan)}) == ["a"]


def test_spikes_are_losses_far_above_those_before(tmp_path, caplog):
    usual = [2 + 0.1 * (-1) ** n for n in range(health.FEWEST)]  # their deviation is 0.1
    watch = health.Health(section(spike=6.0, bad_steps=2, on_spike="stop"), tmp_path, FEED)
    watch.see(1, list(map(metrics, [*usual[1:], 9])))  # too few before it to tell
    assert watch.state["spikes"] == 0
    watch = health.Health(section(spike=6.0, bad_steps=2, on_spike="stop"), tmp_path, FEED)
    watch.see(1, list(map(metrics, [*usual, 2.59, 9])))
    assert watch.state["spikes"] == 1 and watch.sound and not watch.ill
    assert suspects(tmp_path)[0]["reason"] == "spike" and suspects(tmp_path)[0]["loss"] == 9
    assert "is a spike: loss 9" in caplog.text
    watch.see(40, [metrics(8)])
    assert watch.ill
    with pytest.raises(DivergenceError, match="losses of 2 steps in a row are far above"):
        watch.mend(None, 40, None, SimpleNamespace(latest_step=lambda: 3, wait=lambda: None))


def test_a_resumed_run_judges_as_it_would_have(tmp_path):
    usual = [2 + 0.1 * (-1) ** n for n in range(health.FEWEST)]
    rule = section(spike=6.0, bad_steps=2, on_spike="stop")
    watch = health.Health(rule, tmp_path, FEED)
    watch.see(1, list(map(metrics, [*usual, 9])))
    resumed = health.Health(rule, tmp_path, FEED, json.loads(json.dumps(watch.record())))
    assert resumed.state == watch.state and resumed.record() == watch.record()
    resumed.see(34, [metrics(8)])
    assert resumed.ill and "losses of 2 steps in a row" in resumed.ill[1]


def test_spikes_are_only_written_down_unless_the_config_says_more(tmp_path):
    watch = health.Health(section(bad_steps=1), tmp_path, FEED)
    watch.see(1, [metrics(50 if n >= 40 else 2 + 0.1 * (n % 2)) for n in range(45)])
    assert watch.state["spikes"] == 5 and not watch.ill
    none = health.Health(section(spike=0.0), tmp_path, FEED)
    none.see(1, [metrics(50 if n == 40 else 2) for n in range(41)])
    assert none.state["spikes"] == 0


def test_a_rollback_takes_the_newest_checkpoint_for_the_present_step(tmp_path):
    watch = health.Health(section(bad_steps=1, on_nonfinite="rollback"), tmp_path, FEED)
    tx = optax.adam(1.0)
    make = lambda value: TrainState.create(params={"w": jnp.full(3, value)}, tx=tx)  # noqa: E731
    saved = {"health": dict(lag=1)}
    checkpoints = SimpleNamespace(
        latest_step=lambda: 4,
        frozen=True,
        restore=lambda target, frozen=None: (make(4.0).replace(step=4), saved),
        wait=lambda: None,
    )
    for n in range(health.ROLLBACKS):
        watch.see(9, [metrics(math.nan, 1)])
        state = make(9.0).replace(step=jnp.int32(9))
        state = watch.mend(state, 9, None, checkpoints)
        assert state.step == 9 and state.params["w"][0] == 4
        assert watch.state["rollbacks"] == n + 1 and not watch.ill
        assert watch.state["lag"] == 9 - 4 + 1  # updates that the optimizer has not seen
    watch.see(10, [metrics(math.nan, 1)])
    with pytest.raises(DivergenceError, match="can't be rolled back: it was, 3 times"):
        watch.mend(state, 10, None, checkpoints)
    nothing = SimpleNamespace(latest_step=lambda: None, wait=lambda: None)
    with pytest.raises(DivergenceError, match="there is no checkpoint"):
        watch.mend(state, 10, None, nothing)


# ---- the first operation -------------------------------------------------------------------


def debugged(fn, params, batch=None, tx=None, model_state=None):
    """What --debug.nan says of a step with fn(params, batch) for the sum of its losses."""

    def loss_fn(params, batch, rng, state=None):
        state = None if state is None else jnp.log(state * batch.min())
        return Loss(fn(params, batch), jnp.float32(1), state=state)

    tx = tx or optax.sgd(0.1)
    state = TrainState.create(params=params, tx=tx, model_state=model_state)
    step = jax.jit(functools.partial(sftjax.train_step, loss_fn=loss_fn, tx=tx))
    state, metrics = step(state, batch)
    try:
        nan.check(7, metrics, state, batch, loss_fn, tx)
    except DivergenceError as e:
        return str(e)


def test_the_first_operation_is_named_with_its_line_in_a_scan_and_past_masks():
    def fn(params, x):
        def body(carry, y):
            return carry + jnp.log(params * y), jnp.where(y > 0, -jnp.inf, 0.0)

        total, masks = jax.lax.scan(jax.checkpoint(body), 0.0, x)
        masked = jax.lax.cond(x[0] > 0, jnp.exp, jnp.sin, masks[:2])  # exp(-inf) is no mistake
        pooled = jax.lax.reduce_window(params * x, -jnp.inf, jax.lax.max, (2,), (1,), "SAME")
        seen = jax.nn.softmax(jnp.where(x > 1, params * x, -jnp.inf))
        return pooled.sum() + seen.sum() + total + masked.sum()

    found = debugged(fn, jnp.ones(()), jnp.array([1.0, 2, -3]))
    line = fn.__code__.co_firstlineno + 2  # that of the logarithm
    assert found.startswith("step 7: loss nan, gradient norm ")
    assert re.search(rf"; log makes a NaN at \S*test_health.py:{line} ", found)
    assert debugged(fn, jnp.ones(()), jnp.full(3, 2.0)) is None


def test_the_first_operation_of_the_backward_pass_the_update_and_a_state():
    found = debugged(lambda w, _: jnp.sqrt(w * w).sum(), jnp.zeros(2))
    assert re.search(r"loss 0, gradient norm nan; mul makes a NaN at \S*test_health.py", found)
    update = lambda grads, *_: jax.tree.map(lambda g: jnp.log(-g), grads)  # noqa: E731
    found = debugged(lambda w, _: w.sum(), jnp.ones(2), tx=optax.stateless(update))
    assert re.search(r"loss 2, gradient norm 1.414; log makes a NaN at \S*test_health.py", found)
    for x, expected in ((1, None), (-1, "loss -2, gradient norm 1.414; log makes a NaN at ")):
        batch = jnp.full(2, jnp.float32(x))
        found = debugged(lambda w, x: (w * x).sum(), jnp.ones(2), batch, None, jnp.ones(()))
        assert found is expected or expected in found


def test_a_weight_that_is_not_finite_is_named_too():
    found = debugged(lambda p, _: (p["w"] - p["w"]).sum(), {"w": jnp.array([1, jnp.inf])})
    assert "; not finite before it: params/w; sub makes a NaN at " in found
    assert "\n  called at " in found and "/jax/" not in found


def test_an_inf_without_a_nan_is_a_division_by_0_or_too_large_a_number():
    found = debugged(lambda w, _: jnp.log(w).sum(), jnp.zeros(2))
    assert re.search(r"loss -inf, gradient norm inf; div divides by 0 at \S*test_health.py", found)
    found = debugged(lambda w, _: (w**2).sum(), jnp.full(2, 1e30))
    assert found == f"step 7: loss inf, gradient norm inf; {nan.NOTHING}"


@pytest.mark.slow
def test_the_first_operation_on_a_mesh_is_named_in_a_layer_of_a_model():
    model, tx = tiny.model(), optax.sgd(0.1)
    loss_fn = sftjax.losses.causal_lm(model)
    mesh = parallel.make_mesh({"fsdp": 2, "tensor": 2}, jax.devices()[:4])
    with jax.set_mesh(mesh):
        params = jax.device_put(tiny.params(model), parallel.param_shardings(mesh, model.abstract))
        weight = params["layers"]["0-3"]["attn"]["o"]
        weight["w"] = weight["w"].at[1, 1, 1, 1].set(jnp.inf)
        state = TrainState.create(params=params, tx=tx)
        batch = parallel.put_batch(mesh, tiny.batch(), 8)
        state, metrics = jax.jit(functools.partial(sftjax.train_step, loss_fn=loss_fn, tx=tx))(state, batch)
        with pytest.raises(DivergenceError) as raised:
            nan.check(1, metrics, state, batch, loss_fn, tx)
    found = str(raised.value)
    assert "not finite before it: params/layers/0-3/attn/o/w; dot_general makes a NaN at" in found
    assert re.search(r"called at \S*layer.py:\d+ \(_attention\)", found)


def test_a_loss_whose_operations_can_not_be_checked_is_said():
    def fn(w, _):  # needs the mesh, which the check does without
        return jnp.log(jax.lax.with_sharding_constraint(w, jax.P("data"))).sum()

    with jax.set_mesh(parallel.make_mesh({}, jax.devices()[:1])):
        found = debugged(fn, -jnp.ones(2))
    assert "step 7: loss nan, gradient norm" in found and "its operations can't be check" in found


# ---- runs whose every step would do nothing ------------------------------------------------


def optim(**changes):
    c = config_lib.get_default().optim
    for key, value in changes.items():
        c[key] = value
    return c


@pytest.mark.parametrize("warmup", ["3%", "1 step", "10 steps"])
def test_the_warm_up_of_a_run_of_one_step_is_cut_and_said(warmup, capsys):
    schedule = build.make_schedule(optim(warmup=warmup, schedule="linear"), 1)
    assert schedule(0) == np.float32(2e-5)
    assert "it is cut" in capsys.readouterr().out


def test_a_learning_rate_that_is_0_at_every_step_is_an_error():
    with pytest.raises(ConfigError, match="0 at each of 7 steps; nothing would be trained"):
        build.make_schedule(optim(lr=0.0), 7)
    assert build.make_schedule(optim(warmup="9 steps"), 2)(1) > 0


# ---- whole runs ----------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path):
    """Forty steps of one row each on rows of one document; a checkpoint after every fourth."""
    c = config_lib.get_default()
    c.model.path, c.model.init = str(tiny.directory(tmp_path / "model")), "random"
    lines = (tiny.QUICKSTART / "data" / "train.jsonl").read_text().splitlines()[:320]
    lines = [json.dumps({"prompt": json.loads(x)["prompt"], "completion": "yes"}) for x in lines]
    lines[77] = json.dumps({"prompt": "a b c", "completion": "@"})
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n")
    c.data.train = str(tmp_path / "train.jsonl")
    c.model.dtype, c.data.max_length, c.data.packing, c.train.batch_size = "float32", 96, "none", 8
    c.train.duration, c.train.log_every, c.train.checkpoint_every = "40 steps", "2 steps", "4 steps"
    c.optim.lr, c.train.export, c.train.tensorboard = 3e-3, False, False
    return c


def poison(monkeypatch):
    """A loss that is not a number where a batch trains what only row 78 of the file holds."""
    usual = CausalLM.loss_fn

    def loss_fn(self, *args):
        [bad] = self.tokenizer("@", add_special_tokens=False)["input_ids"][-1:]
        inner = usual(self, *args)

        def poisoned(params, batch, *rest):
            loss = inner(params, batch, *rest)
            hit = ((batch["targets"] == bad) & (batch["weights"] > 0)).any()
            return loss.replace(sum=jnp.where(hit, jnp.log(hit - 2.0), loss.sum))

        return poisoned

    monkeypatch.setattr(CausalLM, "loss_fn", loss_fn)


def lines(workdir):
    found = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {x["step"]: x for x in found if "loss" in x}


@pytest.mark.slow
def test_the_documents_of_a_bad_step_are_found_and_the_run_goes_on(config, tmp_path, monkeypatch):
    poison(monkeypatch)
    workdir = tmp_path / "run"
    assert train(config, workdir)["steps"] == 40
    [found] = suspects(workdir)
    assert f"{config.data.train}:78" in found["documents"] and len(found["documents"]) == 8
    logged = lines(workdir)
    [at] = [step for step, x in logged.items() if x["skipped"]]
    assert at in (found["step"], found["step"] + 1)
    schedule = build.make_schedule(config.optim, 40)
    assert logged[40]["lr"] == float(schedule(38))  # an update behind
    state = json.loads((workdir / "checkpoints" / "40" / "extra" / "metadata").read_text())
    assert state["health"].items() >= dict(skipped=1, spikes=0, rollbacks=0, lag=1).items()


@pytest.mark.slow
def test_a_run_rolls_back_past_the_batch(config, tmp_path, monkeypatch, capsys):
    poison(monkeypatch)
    config.train.bad_steps, config.train.on_nonfinite = 1, "rollback"
    assert train(config, tmp_path / "run")["steps"] == 40
    [found] = suspects(tmp_path / "run")
    assert "rollback  to step" in capsys.readouterr().out
    assert set(lines(tmp_path / "run")) == set(range(2, 41, 2))
    config.train.on_nonfinite = "stop"
    with pytest.raises(DivergenceError, match=f"^step {found['step']}: .* in 1 steps in a row"):
        train(config, tmp_path / "stopped")
    saved = (tmp_path / "stopped" / "checkpoints").iterdir()
    newest = max(int(p.name) for p in saved if p.name.isdigit())
    assert found["step"] - 4 <= newest < found["step"]


@pytest.mark.slow
def test_debug_nan_names_the_operation(config, tmp_path, monkeypatch):
    poison(monkeypatch)
    with pytest.raises(DivergenceError, match=r"log makes a NaN at .*test_health.py:\d+ \(\S*poisoned\)"):
        train(config, tmp_path / "run", debug_nan=True)
