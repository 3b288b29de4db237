"""Cleaning with a model's losses, by its command and in a run."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
from inspecting import inspect
from test_chat import make_tokenizer
from test_clean import Records, good, places, planted

from sftjax import config as config_lib
from sftjax import losses, parallel, tasks
from sftjax.clean import command
from sftjax.clean.rules import find
from sftjax.config import ConfigError, get_default
from sftjax.data import DataError, make_batch, open_source
from sftjax.evaluation.likelihood import weighted
from sftjax.hf.tokenizer import load_tokenizer
from sftjax.training.data import Feed

REPO = Path(__file__).resolve().parents[2]

# --- trust in labels ---


def test_losses_of_documents_are_those_of_the_loss_function():
    model = tiny.model()
    params = tiny.params(model)
    rng = np.random.default_rng(0)
    docs = []
    for n in rng.integers(2, 100, 21):
        weights = (rng.random(n) < 0.3).astype(np.float32)
        docs.append((rng.integers(1, 64, n).astype(np.int32), weights))
    sums, _ = weighted(model, params, docs, batch_size=16)
    loss_fn = jax.jit(losses.causal_lm(model))
    for i in (0, 7, 20):
        one = loss_fn(params, make_batch([docs[i]], 128), None)
        np.testing.assert_allclose(-sums[i], one.sum, rtol=1e-4)
        assert one.weight == docs[i][1][1:].sum()


def test_normalised_margin():
    loss = -np.log([[0.8, 0.2], [0.3, 0.7], [0.6, 0.4], [0.1, 0.9]])
    # The labels' own means: 0.7 where 0 is given, 0.65 where 1 is.
    trust = command.normalised_margin(loss, [0, 1, 0, 1])
    means = np.array([(0.8 + 0.6) / 2, (0.7 + 0.9) / 2])
    p = np.exp(-loss) - means
    margins = [p[0, 0] - p[0, 1], p[1, 1] - p[1, 0], p[2, 0] - p[2, 1], p[3, 1] - p[3, 0]]
    np.testing.assert_allclose(trust, (np.array(margins) + 2) / 4)
    shifted = command.normalised_margin(loss + 5, [0, 1, 0, 1])  # a loss all labels share
    np.testing.assert_allclose(trust, shifted)


@pytest.mark.parametrize("bias", [0.0, 3.0])
def test_flipped_labels_are_ranked_first(bias):
    """10% of the labels flipped, a model that is right nine times in ten and may favour a label."""
    rng = np.random.default_rng(0)
    n = 1000
    true, flipped = rng.integers(0, 2, n), np.arange(n) < 100
    scores = np.where(true[:, None] == np.arange(2), 2.5, 0) + rng.normal(0, 1.0, (n, 2))
    scores[:, 1] += bias
    given = np.where(flipped, 1 - true, true)
    ranked = np.argsort(command.normalised_margin(-scores, given))
    assert flipped[ranked[:50]].mean() >= 0.7
    find_them = find(
        Records(good(n)), ("label_suspects",), suspects=0.05,
        trust=lambda rows: command.normalised_margin(-scores, given)[rows],
    )  # fmt: skip
    assert places(find_them, "label_suspects") == ranked[:50].tolist()
    assert find_them.removed == {} and len(find_them.kept) == n


# --- the command, and a run ---


@pytest.fixture
def config(tmp_path):
    """A config whose model is a tiny random one, with planted rows to clean."""
    quickstart = REPO / "experiments" / "quickstart" / "base_model"
    model = tmp_path / "model"
    model.mkdir()
    shape = json.loads((quickstart / "config.json").read_text())
    shape |= dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, head_dim=8)
    tokenizer = make_tokenizer()
    (model / "config.json").write_text(json.dumps(shape | dict(vocab_size=len(tokenizer))))
    tokenizer.save_pretrained(model)
    path, test, _ = planted(tmp_path, n=60)
    c = get_default()
    c.model.path, c.model.init, c.model.dtype = str(model), "random", "float32"
    c.data.train, c.data.test = str(path), str(test)
    c.data.max_length = 4096
    c.data.cache_dir = str(tmp_path / "cache")
    return c


def make_feed(config, workdir):
    workdir.mkdir(exist_ok=True)
    mesh = parallel.make_mesh({a: config.mesh[a] for a in parallel.AXES})
    return Feed(config, tasks.make(config, load_tokenizer(config)), workdir, mesh)


def test_command(config, tmp_path, capsys):
    file = tmp_path / "c.py"
    file.write_text(
        "from sftjax.config import get_default\n"
        "def get_config(arg=''):\n"
        "    c = get_default()\n"
        f"    c.data.train, c.data.test = {config.data.train!r}, {config.data.test!r}\n"
        f"    c.data.tokenizer = {config.model.path!r}\n"
        "    c.data.max_length = 4096\n"
        "    return c\n"
    )
    out, report = tmp_path / "clean.parquet", tmp_path / "report.html"
    command.main([f"--config={file}", f"--out={out}", f"--report={report}"])
    said = capsys.readouterr().out
    assert re.search(r"cleaned +\d+ of 132 rows removed \(17 missing, 10 empty, ", said)
    assert re.search(r"not asked +label_suspects\n", said)
    rejects = (tmp_path / "clean.rejects.jsonl").read_text().splitlines()
    assert pq.read_table(out).num_rows + len(rejects) == 132 and len(rejects) == 67
    assert report.read_text().count("<h2>") == 6
    with pytest.raises(ConfigError, match="d.jsonl is read: write what is cleaned to another"):
        command.main([f"--config={file}", f"--out={config.data.train}"])
    with pytest.raises(ConfigError, match="test.jsonl is read"):
        command.main([f"--config={file}", f"--out={out}", f"--report={config.data.test}"])


def test_command_with_suspects(config, tmp_path, capsys):
    """A random model's trust means nothing; that it is asked, and heard, is shown."""
    from sftjax import hf

    model = hf.load_model(config.model.path)
    tokenizer = load_tokenizer(config)
    params = tiny.params_lib.init(model.abstract, jax.random.key(0))
    hf.save_pretrained(tmp_path / "base", model, params, tokenizer)
    labels = [{"prompt": f"is {i} so?", "completion": ("good", "bad")[i % 2]} for i in range(40)]
    path = tmp_path / "labels.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in labels))
    config.data.train, config.data.test = str(path), ""
    config.model.path = str(tmp_path / "base")
    config.data.clean.rules, config.data.clean.suspects = ("label_suspects",), 0.1
    findings = command.clean(config, tmp_path / "out.jsonl")
    assert re.search(r"listed +4 label_suspects", capsys.readouterr().out)
    assert len(findings.kept) == 40 and len(findings.found) == 4
    config.data.clean.remove_suspects = True
    findings = command.clean(config, tmp_path / "out.jsonl")
    assert len(findings.kept) == 36 and len(open_source(str(tmp_path / "out.jsonl"))) == 36
    config.data.add_tokens = ("<new>",)
    with pytest.raises(ConfigError, match="the tokenizer has more tokens than the model's"):
        command.clean(config, tmp_path / "out.jsonl")
    config.data.add_tokens = ()
    config.model.path, config.data.tokenizer = "", config.model.path
    with pytest.raises(ConfigError, match="label_suspects needs a model: set model.path"):
        command.clean(config, tmp_path / "out.jsonl")


def test_a_run_trains_on_the_clean_rows(config, tmp_path, monkeypatch):
    config.data.clean.rules = ("all",)
    feed = make_feed(config, tmp_path / "run")
    assert feed.store.report["examples"] == 65  # of 132
    assert feed.summary().startswith("67 of 132 rows removed (17 missing, 10 empty")
    assert f"see {tmp_path / 'run' / 'rejects.jsonl'} and clean_report.html" in feed.summary()
    rejects = (tmp_path / "run" / "rejects.jsonl").read_text().splitlines()
    assert len(rejects) == 67 and (tmp_path / "run" / "clean_report.html").exists()
    again = make_feed(config, tmp_path / "again")
    assert again.store.folder == feed.store.folder
    config.data.clean.rules = ("missing", "empty")
    other = make_feed(config, tmp_path / "run")
    assert other.store.folder != feed.store.folder and other.store.report["examples"] == 105
    config.data.clean.rules = ("label_suspects",)
    with pytest.raises(DataError, match="label_suspects needs the model: run the command"):
        make_feed(config, tmp_path / "run")


def test_a_run_on_what_training_would_refuse(config, tmp_path):
    with pytest.raises(DataError, match="d.jsonl:"):
        make_feed(config, tmp_path / "run")
    page = tmp_path / "run" / "rejects.jsonl"
    assert not page.exists()


def test_a_run_with_a_split(config, tmp_path):
    config.data.clean.rules = ("missing", "empty")
    config.data.split.share = 0.2
    plain = make_feed(config, tmp_path / "run")
    held = len(plain.sets["validation"])
    assert list(plain.sets) == ["validation"] and 0 < held < 40
    assert len(plain.store) + held == 105
    assert f"{held} of 105 rows held out" in plain.summary()
    config.data.augment = ("flip",)
    with pytest.raises(ConfigError, match=r"data\.augment=.*: variants are of images"):
        make_feed(config, tmp_path / "run")
    config.data.augment = ()
    config.data.validation = config.data.test
    with pytest.raises(ConfigError, match="data.split.share takes validation rows from"):
        make_feed(config, tmp_path / "run")


def test_inspect_shows_the_rows_that_train(config):
    config.data.clean.rules = ("missing", "empty")
    config.data.split.share = 0.2
    train = json.loads(inspect(config, 200, "json"))
    held = json.loads(inspect(config, 200, "json", set="validation"))
    assert train["totals"]["examples"] == 105 - held["totals"]["examples"]
    places = [{e["where"] for e in part["examples"]} for part in (train, held)]
    assert not places[0] & places[1]


def test_every_key_is_read():
    code = "\n".join(p.read_text() for p in (REPO / "sftjax").rglob("*.py") if p.name != "config.py")
    for group in ("clean", "split"):
        for key in config_lib.get_default().data[group]:
            assert re.search(rf"\b[cd](\.split)?\.(clean\.)?{key}\b", code), f"{group}.{key}"
