"""The task of experiments/fraud: its model beside numpy, its statistics, metrics, runs, table."""

import json
import shutil

import jax
import numpy as np
import pytest
import test_all_tasks as every
from sklearn import metrics as sk

from sftjax import config as config_lib
from sftjax import parallel, tasks
from sftjax import params as params_lib
from sftjax import train as train_lib
from sftjax.data import DataError, build_store, open_source
from sftjax.errors import ConfigError
from sftjax.files import load_python
from sftjax.training.data import Feed

FOLDER = every.REPO / "experiments" / "fraud"
task_lib = load_python(str(FOLDER / "task.py"), "task")
data_lib = load_python(str(FOLDER / "make_data.py"), "make_data")
Fraud = task_lib.Fraud


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a small table."""
    where = tmp_path_factory.mktemp("fraud")
    data_lib.main(where, {"train": 400, "validation": 200, "test": 300})
    return where


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def setting(made):
    c = config_lib.load(f"{FOLDER / 'config.py'}")
    c.task = f"{FOLDER / 'task.py'}:Fraud"
    for name in ("train", "validation", "test"):
        c.data[name] = str(made / f"{name}.jsonl")
    c.train.tensorboard = False
    return c


def numbers(rows):
    """float64 [n, NUMBERS] of records, as the model reads them before it normalises."""
    of = lambda name, x: np.log1p(x) if name in task_lib.SKEWED else x  # noqa: E731
    return np.array([[of(name, row[name]) for name in task_lib.NUMBERS] for row in rows], float)


def test_the_model_is_a_plain_forward_pass_in_float64(made):
    rows, task = read(made / "train.jsonl")[:50], Fraud()
    task.mean, task.std = numbers(rows).mean(0), numbers(rows).std(0)
    model = task.load_model(None)
    params = params_lib.init(model.abstract, jax.random.key(1))
    state = params_lib.init(model.state, jax.random.key(2))
    np.testing.assert_allclose(state["mean"], task.mean, rtol=1e-6)
    stacked = [np.stack(x) for x in zip(*(e.arrays for e in task.examples(rows, rows)), strict=True)]
    given = model.apply(params, state, *stacked[:2])
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    x = [(numbers(rows) - task.mean) / task.std]
    for name, known in task_lib.CATEGORIES.items():
        x.append(p["embed"][name]["w"][[known.index(row[name]) for row in rows]])
    x = np.concatenate(x, 1)
    for i in ("0", "1"):
        x = np.maximum(x @ p["layers"][i]["w"] + p["layers"][i]["b"], 0)
    expected = (x @ p["layers"]["2"]["w"] + p["layers"]["2"]["b"])[:, 0]
    np.testing.assert_allclose(given, expected, rtol=1e-4, atol=1e-4)
    assert np.std(expected) > 0.1
    # The loss, with a row that is blank, and a weight for each class.
    label = np.array([i % 3 == 0 for i in range(50)], np.float32)
    keys = ("numbers", "categories")
    batch = dict(zip(keys, stacked, strict=False)) | {"fraud": label}
    batch["weights"] = np.float32(np.arange(50) != 7)
    loss_fn = task.loss_fn(model, {"class_weights": "1,4"})
    loss = loss_fn(params, batch, None, state)
    each = np.log1p(np.exp(expected)) - label * expected
    w = np.where(label > 0, 4.0, 1.0) * batch["weights"]
    np.testing.assert_allclose(loss.sum, (each * w).sum(), rtol=1e-4)
    np.testing.assert_allclose(loss.weight, w.sum())
    # Dropout changes the training loss, and its mean over draws comes near the plain one's logits.
    some = [float(loss_fn(params, batch, jax.random.key(i), state).sum) for i in range(2)]
    assert some[0] != some[1]
    plain, found = task.eval_fn(model, {})(params, batch, state)
    np.testing.assert_allclose(plain.sum, (each * batch["weights"]).sum(), rtol=1e-4)
    np.testing.assert_allclose(found["given"], given, rtol=1e-6)


def test_statistics_are_those_of_the_training_rows_alone(made, tmp_path):
    config = setting(made)
    rows = read(made / "validation.jsonl")
    far = [row | {"amount": 1e6, "age": 1000} for row in rows]
    config.data.validation = every.write(tmp_path / "far.jsonl", far)
    task = tasks.make(config, None)
    with jax.set_mesh(mesh := parallel.make_mesh({"fsdp": -1})):
        feed = Feed(config, task, tmp_path / "feed", mesh)
    assert list(feed.sets) == ["far"] and feed.sets["far"].report["documents"] == 200
    x = numbers(read(made / "train.jsonl"))
    np.testing.assert_allclose(task.mean, x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(task.std, x.std(0), rtol=1e-5)
    assert task.share == pytest.approx(np.mean([r["fraud"] for r in read(made / "train.jsonl")]))


def test_a_constant_column_is_divided_by_one(made, tmp_path):
    rows = [row | {"hour": 7} for row in read(made / "train.jsonl")]
    source, task = open_source(every.write(tmp_path / "a.jsonl", rows)), Fraud()
    task.saw([build_store(source, task, 0, "error", tmp_path / "cache").report])
    assert task.std[task_lib.NUMBERS.index("hour")] == 1.0


def test_class_weights():
    task = Fraud()
    task.share = 0.02
    assert task.class_weights("balanced") == pytest.approx((0.5 / 0.98, 25.0))
    assert task.class_weights("") == (1.0, 1.0) and task.class_weights("1, 2.5") == (1.0, 2.5)
    for text in ("1", "a,b", "1,-2", "0,0", "1,inf"):
        with pytest.raises(ConfigError, match=f"loss.class_weights='{text}': expected 'balanced'"):
            task.class_weights(text)
    task.share = 0.0
    with pytest.raises(ConfigError, match="the training rows have one class"):
        task.class_weights("balanced")


def test_metrics_are_scikit_learns():
    rng, task = np.random.default_rng(0), Fraud()
    for ties in (False, True):
        wanted = (rng.uniform(size=300) < 0.1).astype(np.float32)
        given = rng.normal(size=300) + wanted
        given = np.round(given, 0 if ties else 9).astype(np.float32)
        weights = np.ones(300, np.float32)
        weights[:20] = 0  # blank rows of a batch count for nothing
        found = task.score(0.0, dict(wanted=wanted, given=given, weights=weights), errors=True)
        y, s = wanted[20:], given[20:].astype(float)
        assert found.values["auroc"] == pytest.approx(sk.roc_auc_score(y, s), abs=1e-12)
        average = sk.average_precision_score(y, s)
        assert found.values["average_precision"] == pytest.approx(average, abs=1e-12)
        # Every threshold tried, by hand.
        tried = [(y[s >= t].sum() / y.sum(), y[s >= t].mean()) for t in np.unique(s)]
        best = max(precision for recall, precision in tried if recall >= 0.5)
        assert found.values["precision_at_recall"] == pytest.approx(best, abs=1e-9)
        assert all(0 < found.errors[k] < 0.2 for k in task.metrics)
        assert found.baselines["all alike"]["auroc"] == 0.5
        assert found.baselines["all alike"]["average_precision"] == pytest.approx(y.mean())
    assert task_lib.scores(np.zeros(3), np.arange(3.0)) == {}


GOOD = dict(
    amount=3.5, hour=2, age=40, account_days=10, distance_km=0.0, payments_last_hour=0,
    country="DE", shop="fuel", channel="chip", fraud=1,
)  # fmt: skip
BAD = [
    ({"amount": -1}, "field 'amount' is -1, expected a finite number of 0 or more"),
    ({"age": "40"}, "field 'age' is '40', expected a finite number"),
    ({"age": float("nan")}, "field 'age' is nan"),
    ({"hour": True}, "field 'hour' is True"),
    ({"country": "XX"}, "field 'country' is 'XX', expected one of DE, FR"),
    ({"fraud": 2}, "field 'fraud' is 2, expected 0 or 1"),
    ({"fraud": float("nan")}, "field 'fraud' is nan, expected 0 or 1"),
]


@pytest.mark.parametrize("change, message", BAD)
def test_a_bad_record_is_refused_with_its_row(change, message):
    assert Fraud().examples([GOOD], ["f:1"])
    with pytest.raises(DataError, match=f"^f:1: {message}"):
        Fraud().examples([GOOD | change], ["f:1"])


def test_a_missing_column_is_named():
    record = {k: v for k, v in GOOD.items() if k != "shop"}
    with pytest.raises(DataError, match="^f:1: no field 'shop'; the row has 'amount'"):
        Fraud().examples([record], ["f:1"])
    assert Fraud().fields_read(GOOD | {"note": 1}) == set(GOOD)


def test_the_table_has_what_it_promises(made):
    found = data_lib.main(made / "again", {"train": 3000})
    assert 30 < found["train"]["fraud"] < 100 and 0.85 < found["train"]["auroc"] < 1
    rows, other = (read(made / "again" / f"{k}.jsonl") for k in ("train", "shuffled_1"))
    columns = lambda row: {k: v for k, v in row.items() if k != "fraud"}  # noqa: E731
    assert [columns(r) for r in rows] == [columns(r) for r in other]
    labels = [[r["fraud"] for r in some] for some in (rows, other)]
    assert sum(labels[0]) == sum(labels[1]) and labels[0] != labels[1]
    assert len(Fraud().examples(rows, rows)) == 3000
    texts = read(made / "again" / "text_train.jsonl")
    assert len(texts) == 2000 and [t["label"] for t in texts] == labels[0][:2000]
    assert f"amount {rows[0]['amount']:.2f}, shop {rows[0]['shop']}" in texts[0]["text"]


def lines(workdir):
    found = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {x["step"]: (x["loss"], x["grad_norm"]) for x in found if "grad_norm" in x}


def test_a_run_learns_and_resumes_bit_equal(made, tmp_path):
    config = setting(made)
    rows = read(made / "train.jsonl")  # a rule that is easily learned
    rule = [r | {"fraud": int(r["channel"] == "online" and r["hour"] < 18)} for r in rows]
    config.data.train = every.write(tmp_path / "rule.jsonl", rule[:300])
    config.data.validation = every.write(tmp_path / "held.jsonl", rule[300:])
    config.data.test = ""
    config.train.batch_size, config.train.duration, config.eval.every = 64, "60 steps", "0"
    config.train.checkpoint_every, config.train.log_every = "40 steps", "1"
    result = train_lib.train(config, tmp_path / "run")
    before, after = (result[k]["losses"] for k in ("before", "after"))
    assert after["held/auroc"] > 0.9 and after["held/loss"] < 0.7 * before["held/loss"]
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "60")
    assert train_lib.train(config, tmp_path / "again")["after"] == result["after"]
    assert lines(tmp_path / "again") == lines(tmp_path / "run")


def test_the_table_of_results_is_written_between_its_marks(made, tmp_path, monkeypatch):
    compare = load_python(str(FOLDER / "compare.py"), "compare")
    monkeypatch.setattr(compare.metrics, "RESAMPLES", 3)
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{compare.BEGIN}\nold\n{compare.END}\nafter\n")
    for seed, value in enumerate((0.8, 0.9)):
        result = {"losses": {f"test/{k}": value for k in Fraud.metrics}, "errors": {}}
        path = tmp_path / f"fraud_{seed}" / "result.json"
        path.parent.mkdir()
        path.write_text(json.dumps({"after": result}))
    monkeypatch.setattr(compare, "BOOSTING", {"trees": dict(max_iter=3)})
    found = compare.main(made, tmp_path, readme)
    text = readme.read_text()
    assert text == "\n".join(["before", compare.BEGIN, *found, compare.END, "after", ""])
    assert "| **MLP, mean of 2 seeds** | 0.850 ± 0.071 |" in text and "| MLP, seed 1 | 0.900" in text
    test = compare.arrays(made / "test.jsonl")
    assert f"all alike | 0.500 | {test[2].mean():.3f}" in text
    # Logistic regression beside a plain one's scores, from features made by hand.
    from sklearn.linear_model import LogisticRegression

    train, rows = (read(made / f"{k}.jsonl") for k in ("train", "test"))
    hot = lambda r: [r[k] == v for k, some in task_lib.CATEGORIES.items() for v in some]  # noqa: E731
    mean, std = numbers(train).mean(0), numbers(train).std(0)
    make = lambda some: np.c_[(numbers(some) - mean) / std, list(map(hot, some))]  # noqa: E731
    plain = LogisticRegression(max_iter=2000).fit(make(train), [r["fraud"] for r in train])
    auroc = sk.roc_auc_score([r["fraud"] for r in rows], plain.predict_proba(make(rows))[:, 1])
    assert "| logistic regression (average precision on validation.jsonl" in text
    [row] = [line for line in found if "logistic" in line]
    assert float(row.split("|")[2].split("±")[0]) == pytest.approx(auroc, abs=2e-3)


@pytest.mark.parametrize("name", ["config", "config_text"])
def test_configs_are_short_and_checked(name):
    file = FOLDER / f"{name}.py"
    assert len(file.read_text().splitlines()) <= 40
    config_lib.check(config_lib.load(str(file)))
