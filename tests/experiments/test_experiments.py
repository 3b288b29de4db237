"""The experiments run: custom loops as they are, those on fixtures in a reduced form."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from flax import nnx
from transformers import AutoTokenizer

import sftjax
from experiments.custom_loop import decoder as own_decoder
from experiments.custom_loop import linen as own_linen
from experiments.custom_loop import nnx as own_nnx
from experiments.sst2 import prepare
from experiments.stories import run as stories
from sftjax import config as config_lib
from sftjax import data, tasks
from sftjax import params as params_lib
from sftjax.hf.tokenizer import load_tokenizer
from sftjax.train import train

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
SPECS = ["gsm8k", "sst2", "sst2_bert", "stories:babyllama105-hf"]


def assert_frozen(before, after, prefix):
    """The leaves under prefix are bit-equal, and every other one has moved."""
    before, after = params_lib.flatten(before), params_lib.flatten(after)
    assert before.keys() == after.keys()
    for name in before:
        same = bool((before[name] == after[name]).all())
        assert same == name.startswith(prefix), name


# ---- custom loops --------------------------------------------------------------------------


def test_linen_loop(capsys):
    accuracy, state = own_linen.main(steps=60)
    assert accuracy > 0.8
    start = own_linen.ConvNet().init(jax.random.key(0), np.zeros((1, 12, 12, 1), np.float32))
    assert_frozen(start["params"], state.all_params, "edges/")
    assert "accuracy" in capsys.readouterr().out


def test_nnx_loop(capsys):
    accuracy, state = own_nnx.main(steps=100)
    assert accuracy > 0.95
    _, start = nnx.split(own_nnx.Classifier(nnx.Rngs(0)))
    assert_frozen(start, state.all_params, "features/")
    assert "accuracy" in capsys.readouterr().out


def test_decoder_loop(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(EXPERIMENTS / "quickstart" / "base_model")
    hf = json.loads((EXPERIMENTS / "quickstart" / "base_model" / "config.json").read_text())
    hf |= dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, head_dim=8)
    (tmp_path / "config.json").write_text(json.dumps(hf))
    model = sftjax.hf.load_model(tmp_path)
    base, out = tmp_path / "base", tmp_path / "out"
    sftjax.save_pretrained(base, model, tiny.params(model), tokenizer)
    losses = own_decoder.main(base, str(EXPERIMENTS / "quickstart/data/train.jsonl"), out, steps=8)
    assert losses[-1] < losses[0]
    _, params = sftjax.load_pretrained(out)
    assert params_lib.count(params) == params_lib.count(model.abstract)


@pytest.mark.parametrize("spec", SPECS)
def test_config_is_built(spec):
    name, _, argument = spec.partition(":")
    file = EXPERIMENTS / name / "config.py"
    assert config_lib.load(f"{file}:{argument}" if argument else str(file)).data.train


# ---- on fixtures ---------------------------------------------------------------------------


@pytest.fixture
def in_repository(fixtures, monkeypatch):
    """The working directory and environment of the experiments' commands."""
    monkeypatch.chdir(EXPERIMENTS.parent)
    monkeypatch.setenv("SFTJAX_FIXTURES", str(fixtures))
    for module in (prepare, stories):
        monkeypatch.setattr(module, "FIXTURES", fixtures)
    return fixtures


@pytest.mark.fixtures
@pytest.mark.slow
@pytest.mark.parametrize("name", ["stories260K-hf", pytest.param("babyllama105-hf", marks=pytest.mark.long)])
def test_stories(in_repository, tmp_path, name):
    stories.write_data(tmp_path)
    for file in tmp_path.glob("*.jsonl"):
        file.write_text("".join(file.open().readlines()[:40]))
    config = config_lib.load(str(EXPERIMENTS / f"stories/config.py:{name}"))
    config.data.train, config.data.validation = (str(tmp_path / f"{part}.jsonl") for part in ("train", "validation"))
    config.data.max_length, config.eval.batch_size = 128, 8
    config.train.duration, config.model.attention = "8 steps", "xla"
    rows = dict(stories.check_model(config, tmp_path / name))
    assert rows["exported untouched"].endswith("bit for bit")


@pytest.mark.fixtures
@pytest.mark.slow
def test_sst2(in_repository, tmp_path):
    counts = prepare.main(tmp_path)
    assert counts["train"].total() == 60_000
    assert counts["dev"] == {"positive": 229, "negative": 207}
    config = config_lib.load(f"{EXPERIMENTS}/sst2/config.py:{tmp_path}")
    config.data.limit, config.eval.test_limit, config.train.batch_size = 600, 16, 8
    config.train.duration = "30 steps"
    result = train(config, tmp_path / "run")
    assert result["before"]["exact_match"] == 0
    assert result["after"]["exact_match"] > 0.3  # it has learnt to name a label and to stop
    assert set(result["after"]["answers"]) <= {"positive", "negative"}


@pytest.mark.fixtures
@pytest.mark.slow
@pytest.mark.parametrize("body", ["minilm-l6", "stories260K-hf"])
def test_sst2_bert(in_repository, tmp_path, body):
    """The same config trains a head of classes on an encoder and on a decoder."""
    file = EXPERIMENTS / "sst2_bert" / "config.py"
    assert len(file.read_text().splitlines()) <= 35
    config = config_lib.load(f"{file}:{in_repository / body}")
    config.data.limit, config.train.batch_size = 300, 8  # a row for each of the devices here
    config.train.duration, config.train.log_every = "8 steps", "1 step"
    lines = Path(config.data.validation).read_text().splitlines(keepends=True)
    (tmp_path / "dev.tsv").write_text("".join(lines[:60]))
    config.data.validation = str(tmp_path / "dev.tsv")
    result = train(config, tmp_path / "run")
    assert set(result["after"]["losses"]) >= {"dev/loss", "dev/accuracy", "dev/f1", "dev/auroc"}
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").open() if '"lr"' in line]
    assert len(losses) == 8 and losses[-1] < losses[0]
    exported = json.loads((tmp_path / "run" / "export" / "config.json").read_text())
    assert exported["id2label"] == {"0": "negative", "1": "positive"}


@pytest.mark.fixtures
@pytest.mark.slow
def test_gsm8k(in_repository, tmp_path):
    config = config_lib.load(str(EXPERIMENTS / "gsm8k/config.py"))
    source, tokenizer = data.open_source(config.data.train), load_tokenizer(config)
    task, length = tasks.make(config, tokenizer), config.data.max_length
    store = data.build_store(source, task, length, "error", tmp_path)
    assert data.Rows(store, length).efficiency >= 0.98
    assert store.report["examples"] == 6473 and store.report["stop_token"] == "<|im_end|>"
    assert 0.6 < store.report["trained_fraction"] < 0.65

    config.data.limit, config.data.max_length, config.train.batch_size = 40, 128, 8
    config.train.duration, config.train.log_every = "3 steps", "1 step"
    config.train.export = config.train.tensorboard = False
    train(config, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["cells_per_s"] >= lines[-1]["tokens_per_s"] > lines[-1]["trained_tokens_per_s"]
