"""profile.steps: a trace of the steps named, whose events read like the source."""

import functools
import re

import jax
import jax.numpy as jnp
import optax
import pytest
import tiny

from sftjax import config as config_lib
from sftjax import losses
from sftjax.config import ConfigError
from sftjax.step import TrainState, train_step
from sftjax.training.profiler import Profiler


def profiler(where, steps, total=20):
    c = config_lib.get_default()
    c.profile.steps = steps
    return Profiler(c.profile.steps, where, total)


def run(p, steps):
    """Steps of a program of its own name each, so that a trace tells which ran in it."""
    for i in steps:
        fn = jax.jit(lambda x: jnp.sin(x @ x))
        with p.step(i), jax.profiler.TraceAnnotation(f"number {i}"):
            out = fn(jnp.ones((8, 8)))
        p.end(i, out)
    p.close()


def traces(where):
    return [f.read_bytes() for f in where.glob("profile/**/*.xplane.pb")]


@pytest.mark.parametrize(("steps", "traced"), [("3-4", {3, 4}), ("3", {3}), ("", set()), ("5-9", {5, 6})])
def test_only_the_steps_named_are_traced(tmp_path, steps, traced):
    run(profiler(tmp_path, steps), range(1, 7))  # the run may end before
    found = traces(tmp_path)
    assert len(found) == bool(traced)
    for trace in found:
        assert {i for i in range(1, 7) if f"number {i}".encode() in trace} == traced
        assert b"train_step" in trace and b"step_num" in trace


def test_a_resumed_run_does_not_trace_what_is_behind(tmp_path):
    run(profiler(tmp_path, "3-4"), range(5, 7))
    assert not traces(tmp_path)


def test_operations_are_named_by_the_parts_of_the_model():
    m = tiny.model()
    tx = optax.adam(1e-3)
    state = TrainState.create(params=tiny.params(m), tx=tx)
    step = functools.partial(train_step, loss_fn=losses.causal_lm(m), tx=tx)
    text = jax.jit(step).lower(state, tiny.batch()).as_text(debug_info=True)
    for name in ("embed", "attention", "mlp", "linear_cross_entropy", "optimizer"):
        assert re.search(rf'["/(]{name}[)/]', text), name


@pytest.mark.parametrize("steps", ["soon", "4-3", "0-2", "19-21", "3,4"])
def test_steps_that_cannot_be_are_refused(tmp_path, steps):
    with pytest.raises(ConfigError, match=f"profile.steps='{steps}': expected the first and the"):
        profiler(tmp_path, steps)
