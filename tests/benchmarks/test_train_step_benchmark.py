"""The driver of benchmarks/train_step.py and its workers, at the toy shape, with sftjax alone."""

import math
from pathlib import Path

import jax
import numpy as np
import pytest

import sftjax
from sftjax import data, hf

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.syspath_prepend(BENCHMARKS / "peers")
    import train_step

    return train_step


@pytest.fixture
def job(bench, tmp_path):
    config, rows, length = bench.SHAPES["T"]
    bench.drive.write_model(tmp_path, config)
    job = dict(model=str(tmp_path), rows=rows, length=length, trained=0.5, work="steps")
    return job | dict(dtype="float32")


@pytest.mark.slow
def test_worker_trains_the_weights_and_tokens_it_was_given(bench, job, tmp_path):
    import worker

    with bench.start("sftjax", "sftjax", job, tmp_path) as process:
        answer = process.ask(2)
    docs = worker.examples(job)
    model, params = hf.load_pretrained(job["model"])
    loss = sftjax.losses.causal_lm(model)(params, data.make_batch(docs), None)
    assert answer["losses"][0] == pytest.approx(float(loss.sum / loss.weight), rel=1e-5)
    assert answer["losses"][1] < answer["losses"][0]
    assert answer["tokens"] == [job["rows"] * job["length"]] * 2
    assert len(answer["seconds"]) == 2 and min(answer["seconds"]) > 0
    assert process.process.returncode == 0
    assert process.facts["versions"]["jax"] == jax.__version__


def test_worker_that_fails_says_why(bench, job, tmp_path):
    with pytest.raises(bench.drive.WorkerError, match="(?s)no_such.*ended with exit status 1"):
        bench.start("sftjax", "sftjax", job | dict(model="no_such"), tmp_path)


def test_lengths_are_log_normal_with_a_mean_of_120(job):
    import worker

    docs = worker.examples(job | dict(work="lengths", length=512))
    lengths = np.array([len(tokens) for tokens, _ in docs])
    assert len(docs) == 512 and lengths.min() >= 16 and lengths.max() <= 512
    assert 110 < lengths.mean() < 125 and lengths.std() > 70
    assert all(abs(trained.sum() - n / 2) <= 0.5 for n, (_, trained) in zip(lengths, docs, strict=True))


def test_half_of_the_tokens_are_trained(job):
    import worker

    tokens, trained = worker.batch(job)
    assert tokens.shape == trained.shape == (job["rows"], job["length"])
    assert trained.mean() == 0.5 and trained[:, -1].all() and not trained[:, 0].any()


@pytest.mark.parametrize("peers, said", [("tunics", "expected all or some"), ("trl", "install.sh")])
def test_peers_asked_for_must_be_there(bench, peers, said, monkeypatch, tmp_path):
    monkeypatch.setattr(bench.drive, "HOMES", tmp_path)
    with pytest.raises(SystemExit, match=said):
        bench.chosen(peers, "float32")
    assert bench.chosen("all", "float32") == ["sftjax, huge pages"]


def test_other_work_is_an_error(bench, job):
    bench.same_work("x", job, [math.log(512)], [math.log(512) * 1.00005])
    with pytest.raises(bench.drive.WorkerError, match="not the same work"):
        bench.same_work("x", job, [math.log(512)], [math.log(512) / 2])


def test_share_counts_the_vocabulary_for_trained_tokens_only(bench):
    config, rows, length = bench.SHAPES["S"]
    layers = 6 * 6 * (4 * 288 * 288 + 3 * 288 * 768)
    head = 6 * 32000 * 288 * 0.5
    attention = 12 * 288 * 6 * (length + 1) / 2
    each = bench.step_flops(config, rows, length) / (rows * length)
    assert each == pytest.approx(layers + head + attention)
