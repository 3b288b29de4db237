"""`sftjax evaluate`: any model on any data, without training."""

import json
import math
from pathlib import Path

import jax
import pytest

from sftjax import cli, evaluate, hf
from sftjax.data import encode
from sftjax.errors import ConfigError, DataError, NotFoundError
from sftjax.hf.tokenizer_files import open_tokenizer
from sftjax.training.workdir import read_config

QUICKSTART = Path(__file__).resolve().parents[1] / "experiments" / "quickstart"
MODEL = str(QUICKSTART / "base_model")
NAMES = ("some", "texts")
SHORT = "--config.generate.max_new_tokens=2"


@pytest.fixture
def data(tmp_path):
    lines = (QUICKSTART / "data" / "validation.jsonl").read_text().splitlines()[:7]
    (tmp_path / "some.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "texts.jsonl").write_text('{"text": "one two three"}\n{"text": "four"}\n')
    return tmp_path


def reference_loss(path):
    """The mean negative log-likelihood of the trained tokens, a row at a time."""
    tokenizer = open_tokenizer(Path(MODEL), "--model")
    model, params = hf.load_pretrained(MODEL)
    total = count = 0.0
    for line in path.read_text().splitlines():
        example = encode(json.loads(line), tokenizer)
        logits = model.apply(params, {"tokens": example.tokens[None, :-1]})[0]
        chances = jax.nn.log_softmax(logits.astype("float32"))
        for i, (token, weight) in enumerate(zip(example.tokens[1:], example.weights[1:], strict=True)):
            total, count = total - float(weight * chances[i, token]), count + float(weight)
    return total / count


def test_one_object_and_nothing_else(data, capfd):
    evaluate.main([f"--model={MODEL}", f"--data={data / 'some.jsonl'}", "--json", SHORT])
    out, err = capfd.readouterr()
    found = json.loads(out)
    assert found["n"] == 7 and found["model"] == MODEL and "rows" not in found
    assert found["metrics"]["loss"] == pytest.approx(reference_loss(data / "some.jsonl"), rel=1e-5)
    assert found["metrics"]["perplexity"] == pytest.approx(math.exp(found["metrics"]["loss"]))
    assert {"accuracy", "exact_match"} <= set(found["metrics"]) and "testing 7/7" in err


def test_n_is_of_the_rows_whose_loss_is_measured(data, capfd):
    (data / "some.jsonl").rename(data / "test.jsonl")
    limit = "--config.eval.test_limit=3"
    evaluate.main([f"--model={MODEL}", f"--data={data / 'test.jsonl'}", "--json", SHORT, limit])
    out, err = capfd.readouterr()
    assert json.loads(out)["n"] == 7 and "testing 3/3" in err


def test_a_glob_and_a_home_are_of_the_command_line(data, monkeypatch):
    monkeypatch.chdir(data)
    monkeypatch.setenv("HOME", str(data))
    assert evaluate.typed("some.jsonl") == str(data / "some.jsonl")
    assert evaluate.typed("so*.jsonl#a.b") == f"{data / 'so*.jsonl'}#a.b"
    assert evaluate.typed("~/some.jsonl") == str(data / "some.jsonl")
    assert evaluate.typed("org/name:config") == "org/name:config"


def test_texts_have_a_loss_alone(data, capfd):
    evaluate.main([f"--model={MODEL}", f"--data={data / 'texts.jsonl'}", "--json"])
    out, err = capfd.readouterr()
    assert set(json.loads(out)["metrics"]) == {"loss", "perplexity", "accuracy"}
    assert "these rows ask nothing: only their loss is measured" in err


def test_several_models_and_sets_side_by_side(data, capfd, tmp_path):
    files = [f"--data={data / name}.jsonl" for name in ("some", "texts")]
    argv = [f"--model={MODEL}", f"--model={MODEL}/", *files, SHORT, f"--out={tmp_path / 'o.json'}"]
    evaluate.main(argv)
    head, rows, *_ = capfd.readouterr().out.splitlines()
    names = [f"{model} on {name}.jsonl" for model in (MODEL, f"{MODEL}/") for name in NAMES]
    assert head.split() == " ".join(names).split()  # whole paths, as the last parts are the same
    assert rows.split() == ["rows", "7", "2", "7", "2"]
    results = json.loads((tmp_path / "o.json").read_text())["results"]
    assert [one["n"] for one in results] == [7, 2, 7, 2]
    assert results[0]["rows"]["answers"]["record"] == list(range(7))


def test_several_numbers_of_examples_in_one_table(data, capfd, tmp_path):
    argv = [f"--model={MODEL}", f"--data={data / 'some.jsonl'}", "--shots=0,1", SHORT]
    argv += [f"--config.data.train={data / 'some.jsonl'}", f"--out={tmp_path / 'o.json'}"]
    evaluate.main(argv)
    head, *_ = capfd.readouterr().out.splitlines()
    assert "base_model on some.jsonl, 0 shots  base_model on some.jsonl, 1 shots" in head
    results = json.loads((tmp_path / "o.json").read_text())["results"]
    assert [one["shots"] for one in results] == [0, 1]
    assert results[0]["metrics"]["loss"] == results[1]["metrics"]["loss"]


def test_a_choice_needs_no_generation(data, capfd, tmp_path, caplog):
    rows = [json.loads(x) for x in (data / "some.jsonl").read_text().splitlines()]
    for row in rows:
        row["options"] = [row["completion"], "zq" * 2 * len(row["completion"])]
    (tmp_path / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = ["--config.eval.metrics=choice", "--config.eval.choices=options"]
    evaluate.main([f"--model={MODEL}", f"--data={tmp_path / 'choices.jsonl'}", "--json", *own])
    found = json.loads(capfd.readouterr().out)
    assert found["metrics"]["choice"] == 1.0 and "exact_match" not in found["metrics"]
    assert "'kind' is not read" in caplog.text and "'options' is not" not in caplog.text


def test_what_is_wrong_is_said(data, tmp_path):
    some = f"--data={data / 'some.jsonl'}"
    (tmp_path / "mixed.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"text": "only a text"}\n')
    for argv, error, message in [
        ([f"--model={MODEL}", f"{some},{some}"], ConfigError, "name one data set each time"),
        ([f"--model={MODEL}", some, "--step=best"], ConfigError, "--step=best is of a workdir's"),
        ([f"--model={MODEL}", f"--data={tmp_path / 'mixed.jsonl'}"], DataError, "mixed.jsonl:2"),
        ([f"--model={data}", some], NotFoundError, "has no config.json; give a Hugging Face"),
        ([f"--model={MODEL}"], ConfigError, "--data is missing, and the config has no"),
        ([f"--model={MODEL}", some, "--steps=3"], ConfigError, "unknown option --steps=3"),
        ([f"--model={MODEL}", some, "--config.eval.metrics=bleuu"], ConfigError, "no metric of"),
    ]:
        with pytest.raises(error, match=message):
            evaluate.main(argv)


def test_the_config_of_a_workdir_is_read_back(tmp_path):
    from sftjax.config import get_default, to_dict

    config = get_default()
    config.data.labels = {0: "negative", 1: "positive"}
    config.optim.trainable = (("score/.*", True), (".*", False))
    config.data.buckets, config.optim.lr = (32, 64), 3e-4
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    back = read_config(tmp_path)
    assert to_dict(back) == to_dict(config) and back.optim.trainable == config.optim.trainable
    for text, message in [
        ('{"optim": {"lrr": 1}}', "optim.lrr is no key of this version's configs"),
        ('{"optim": {"lr": "x"}}', "config.json"),
        ("{", "config.json"),
    ]:
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_config(tmp_path)


def test_the_command_is_listed():
    assert "  evaluate  " in cli.usage() and "  compare   " in cli.usage()
