"""The lines of metrics.jsonl are those of one run, however often it was stopped and resumed."""

import json
from types import SimpleNamespace

import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from sftjax.training.log import Log

SECTION = ConfigDict(dict(log_every=4, tensorboard=False))
FEED = SimpleNamespace(
    steps=20,
    names=("a",),
    task=SimpleNamespace(counts=("tokens",)),
    every=lambda text, what: text,
    due=lambda step, text, what: step % text == 0 or step == 20,
    position=lambda step: {},
)


def metrics(step):
    values = {"loss": step / 3, "tokens": step, "trained_tokens/a": step, "loss/a": step / 7}
    return {name: jnp.float32(value) for name, value in values.items()}


def log_of(workdir, start, steps, window=()):
    log = Log(SECTION, workdir, FEED, lambda step: step, 1.0, start, window)
    for step in steps:
        log.step(step, metrics(step), 0.0)
    return log


def lines(workdir):
    of_time = ("tokens_per_s", "step_time", "data_wait", "peak_memory")
    text = (workdir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if k not in of_time} for x in text]


@pytest.mark.parametrize("killed", [True, False])
def test_a_line_is_of_all_its_steps_wherever_the_run_was_stopped(tmp_path, killed):
    log_of(tmp_path / "one", 0, range(1, 21)).close()
    log = log_of(tmp_path / "two", 0, range(1, 7))
    with log.pause():
        saved = json.loads(json.dumps(log.state()))
    assert [m["loss"] for m in saved] == [float(jnp.float32(n / 3)) for n in (5, 6)]
    if killed:
        log.step(7, metrics(7), 0.0)
        log.step(8, metrics(8), 0.0)
    log.close(rest=False)
    log_of(tmp_path / "two", 6, range(7, 21), saved).close()
    assert lines(tmp_path / "two") == lines(tmp_path / "one")
    assert [line["step"] for line in lines(tmp_path / "two")] == [4, 8, 12, 16, 20]


def test_a_run_that_ended_inside_a_line_writes_it_once(tmp_path):
    """As early stopping ends it; started again, it trains no step."""
    log = log_of(tmp_path, 0, range(1, 7))
    saved = log.state()
    log.close()
    once = lines(tmp_path)
    assert [line["step"] for line in once] == [4, 6]
    log_of(tmp_path, 6, [], saved).close()
    assert lines(tmp_path) == once
