"""Resumption: which keys may differ, what is said of versions, and files that are torn."""

import json
import types

import pytest

from sftjax import config as config_lib
from sftjax.errors import ConfigError
from sftjax.training import resume, workdir


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """A workdir with a checkpoint; begun(key=value) starts in it again with other settings."""

    def start(**overrides):
        config = config_lib.get_default()
        config.train.duration = "10 steps"
        for key, value in overrides.items():
            config_lib.override(config, key.replace("__", "."), str(value))
        config_lib.check(config)
        return workdir.prepare_workdir(config, tmp_path / "run")

    start()
    (tmp_path / "run" / "checkpoints" / "3").mkdir(parents=True)
    start.workdir = tmp_path / "run"
    return start


@pytest.mark.parametrize(
    "key, value, text",
    [
        ("optim.lr", 1.0, "optim.lr: 2e-05 there, 1.0 now"),
        ("train.batch_size", 8, "train.batch_size: 32 there, 8 now"),
        ("data.train", "x.jsonl", "data.train: '' there, 'x.jsonl' now"),
        ("data.packing", "none", "data.packing: 'bfd' there, 'none' now"),
        (
            "train.duration",
            "9 steps",
            "train.duration: '10 steps' there, '9 steps' now (it may grow, not shrink)",
        ),
    ],
)
def test_a_key_that_changes_what_is_learned_is_named(begun, key, value, text):
    with pytest.raises(ConfigError) as e:
        begun(**{key.replace(".", "__"): value, "seed": 7})
    message = str(e.value)
    assert f"\n  {text}\n" in message
    assert "seed: 0 there, 7 now" in message and "Use another workdir, or the same" in message
    begun()  # and what was there is not changed


@pytest.mark.parametrize("key, value", [("train.keep", 5), ("train.checkpoint_every", "5"), ("train.log_every", "1")])
def test_a_key_that_changes_nothing_is_free(begun, caplog, key, value):
    begun(**{key.replace(".", "__"): value})
    assert not caplog.text


@pytest.mark.parametrize(
    "key, value",
    [
        ("eval.every", "2 steps"),
        ("eval.batch_size", 4),
        ("eval.patience", 2),
        ("data.validation", "v.jsonl"),
        ("data.test", "t.jsonl"),
        ("generate.max_new_tokens", 3),
    ],
)
def test_evaluation_may_differ_and_it_is_said(begun, caplog, key, value):
    begun(**{key.replace(".", "__"): value})
    assert "evaluation differs from now on" in caplog.text and f"{key}: " in caplog.text
    caplog.clear()
    begun(**{key.replace(".", "__"): value})
    assert not caplog.text


def test_the_duration_may_grow_and_schedules_that_depend_on_it_are_said(begun, caplog):
    begun(train__duration="11 steps")
    assert "the duration is another from now on: train.duration: '10 steps' there, '11 steps' now" in caplog.text
    assert "by optim.schedule=cosine and optim.warmup=3%" in caplog.text
    caplog.clear()
    begun(train__duration="2 epochs")  # in another unit: compared when the steps are known
    assert "the duration is another" in caplog.text


def test_of_a_schedule_that_does_not_depend_nothing_is_said(tmp_path, caplog):
    config = config_lib.get_default()
    config.optim.schedule, config.optim.warmup = "constant", "5 steps"
    config.train.duration = "10 steps"
    workdir.prepare_workdir(config, tmp_path)
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    config.train.duration = "12 steps"
    workdir.prepare_workdir(config, tmp_path)
    assert "the duration is another" in caplog.text and "learning rate" not in caplog.text
    config.data.phases, config.train.duration = (dict(until="30%"), {}), "13 steps"
    file = tmp_path / "config.json"
    old = json.loads(file.read_text()) | {"data": config_lib.to_dict(config)["data"]}
    file.write_text(json.dumps(old))
    with pytest.raises(ConfigError, match="data.phases end at shares of it"):
        workdir.prepare_workdir(config, tmp_path)


TORN = [b"", b"{", b'{"seed": 0, "mod', b"\xff\xfe\x00", b"[]", b"5", b"null", b"[" * 100_000]


@pytest.mark.parametrize("content", TORN, ids=lambda x: repr(x[:20]))
def test_a_torn_config_is_an_error_with_a_fix(begun, content):
    file = begun.workdir / "config.json"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"config.json .*Put back an intact copy.*delete the file"):
        begun()
    file.unlink()
    begun()


def test_a_config_of_other_types_is_compared(begun):
    file = begun.workdir / "config.json"
    file.write_text('{"seed": [1], "data": 3, "train": {"duration": null}}')
    with pytest.raises(
        ConfigError,
        match=r"belongs to a run with another config:\n  data: 3 there, None now\n  seed: \[1\] there, 0 now",
    ):
        begun()


@pytest.mark.parametrize("content", TORN, ids=lambda x: repr(x[:20]))
def test_a_torn_environment_is_set_aside(begun, caplog, content):
    file = begun.workdir / "env.json"
    file.write_bytes(content)
    begun()
    assert "env.json is damaged; it is set aside as env.json.damaged" in caplog.text
    assert (begun.workdir / "env.json.damaged").read_bytes() == content
    assert "resumed" not in json.loads(file.read_text())


def test_the_environment_keeps_the_first_start_and_says_other_versions(begun, caplog):
    file = begun.workdir / "env.json"
    first = json.loads(file.read_text())
    first["packages"]["jax"], first["python"], first["command"] = "0.1", "3.0", ["first"]
    file.write_text(json.dumps(first))
    begun()
    assert "other versions" in caplog.text
    assert "jax 0.1 there, " in caplog.text and "python 3.0 there, " in caplog.text
    assert "numpy" not in caplog.text
    caplog.clear()
    begun()
    assert not caplog.text  # of the last start's, not of the first's
    found = json.loads(file.read_text())
    assert {k: v for k, v in found.items() if k != "resumed"} == first
    assert [x["packages"]["jax"] != "0.1" for x in found["resumed"]] == [True, True]


def facts(sha):
    return {"rows": 2, "files": [dict(name="v", rows=2, bytes=1, sha256=sha)], "store": ""}


def test_numbers_of_sets_that_are_others_now_are_not_compared():
    feed = types.SimpleNamespace(questions=[1, 2])
    before = {
        "losses": {"v/loss": 1.0, "v/accuracy": 0.5, "w/loss": 2.0},
        "tables": {"v/confusion": [[1]], "w/confusion": [[2]], "answers/confusion": [[3]]},
        "n": {"v": 2, "w": 3, "answers": 2},
        "errors": {"v/loss": 0.1, "w/loss": 0.2, "answers/exact_match": 0.3},
        "baselines": {"w": {"always a": {"accuracy": 0.5}}},
        "exact_match": 0.5,
        "answers": ["a", "b"],
    }
    was = {
        "evaluation": {"v": facts("1"), "w": facts("1"), "answers": facts("1")},
        "best": "v/loss",
    }
    extra = {"before": before, "early_stop": {"best": 1.0, "bad": 2}, "manifest": was}
    assert resume.comparable(extra, was, feed) == extra
    now = was | {"evaluation": {"v": facts("2"), "w": facts("1"), "answers": facts("2")}}
    found = resume.comparable(extra, now, feed)
    assert found["early_stop"] is None
    assert found["before"] == {
        "losses": {"w/loss": 2.0},
        "tables": {"w/confusion": [[2]]},
        "n": {"w": 3},
        "errors": {"w/loss": 0.2},
        "baselines": {"w": {"always a": {"accuracy": 0.5}}},
        "answers": ["(the test set was another)"] * 2,
    }
    assert resume.comparable(extra, was | {"best": "w/loss"}, feed)["early_stop"] is None
    by_answers = was | {"best": "answers/exact_match"}
    extra["manifest"] = by_answers
    assert resume.comparable(extra, by_answers, feed)["early_stop"]
    now = by_answers | {"evaluation": was["evaluation"] | {"answers": facts("2")}}
    assert resume.comparable(extra, now, feed)["early_stop"] is None
    older = extra | {"manifest": {}}
    assert resume.comparable(older, now, feed) == older


def test_a_package_that_is_there_no_more_is_said(tmp_path, caplog):
    file = tmp_path / "env.json"
    file.write_text(json.dumps({"packages": {"gone": "1.2"}, "python": "3.11.1"}))
    resume.joined(file, {"packages": {"gone": None}, "python": "3.11.1"}, trained=True)
    assert "gone 1.2 there, None now" in caplog.text
