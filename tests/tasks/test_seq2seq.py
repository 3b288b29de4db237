"""Pairs of sources and targets: rows, truncation, questions, what is refused."""

import json

import jax
import numpy as np
import pytest
from families import BART
from test_all_tasks import CASES, model

from sftjax import config as config_lib
from sftjax import losses, parallel, tasks
from sftjax.data import DataError, open_source
from sftjax.data.packing.pack import PairRows, plan
from sftjax.data.token_store import build_store
from sftjax.hf.tokenizer import load_tokenizer
from sftjax.training.build import make_model
from sftjax.training.data import Feed


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    c = config_lib.get_default()
    c.data.max_length = 64
    CASES["seq2seq"][0](c, tmp_path_factory.mktemp("case"))
    return c


@pytest.fixture
def task(config):
    return tasks.make(config, load_tokenizer(config))


def test_a_row_never_overflows_and_holds_every_pair():
    layout, rng = PairRows(48, 20), np.random.default_rng(0)
    sizes = [(rng.integers(1, 49), rng.integers(1, 21)) for _ in range(200)]
    pairs = [layout.example(*(rng.integers(0, 99, n) for n in size)) for size in sizes]
    rows = plan([len(p[0]) for p in pairs], 48)
    found = []
    for r in range(len(rows)):
        batch = {k: np.zeros(f.shape, f.dtype) for k, f in layout.spec(1, 48).items()}
        row = {k: v[0] for k, v in batch.items()}
        layout.fill(row, pairs, rows.row(r))
        for segment, (doc, _, _) in enumerate(rows.row(r), 1):
            for name, side, ids in zip(("tokens", "targets"), ("", "target_"), pairs[doc]):  # noqa: B905
                own = row[f"{side}segments"] == segment
                np.testing.assert_array_equal(row[name][own], ids[ids >= 0])
                np.testing.assert_array_equal(row[f"{side}positions"][own], np.arange(own.sum()))
            found.append(doc)
        assert (row["weights"] == (row["target_segments"] > 0)).all()
    assert sorted(found) == [*range(200)]


def test_the_end_of_a_text_is_kept_when_it_is_cut(task):
    tokenizer = task.tokenizer
    [pair] = task.examples([{"text": "a film " * 60, "target": "of day " * 40}], ["x:1"])
    assert pair.tokens[-1] == tokenizer.eos_token_id and len(pair.arrays[0]) > 64
    for overlong, kept in (("truncate_end", slice(0, 64)), ("truncate_prompt", slice(-64, None))):
        [(source, target)] = task.cut(pair, 64, overlong)
        np.testing.assert_array_equal(source, pair.tokens[pair.weights == 0][kept])
        target = target[target >= 0]
        assert len(target) == 24 and target[-1] == tokenizer.eos_token_id
    assert task.cut(pair, 64, "drop") == []


def test_counts_are_of_tokens_and_not_of_room(config, task, tmp_path):
    store = build_store(open_source(config.data.train), task, 64, "truncate_end", tmp_path)
    sizes = [[(x >= 0).sum() for x in store[i]] for i in range(len(store))]
    assert store.report["tokens"] == np.sum(sizes)
    assert store.report["trained_tokens"] == np.sum(sizes, 0)[1]
    batch = {k: np.zeros(f.shape, f.dtype) for k, f in task.layout.spec(1, 64).items()}
    task.layout.fill({k: v[0] for k, v in batch.items()}, store, [(0, 0, 0)])
    counts = losses.token_counts(batch)
    assert (float(counts["cells"][0]), float(counts["tokens"][0])) == (64 + 24, sum(sizes[0]))


def test_questions_are_the_sources_as_training_cuts_them(task, tmp_path, caplog):
    rows = [{"text": "a film", "target": "good"}, {"text": "day " * 99, "target": "bad"}]
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    short, long = task.questions(open_source(str(path)))
    assert (short.answer, short.asked) == ("good", "a film")
    assert task.tokenizer.decode(short.prompt, skip_special_tokens=True).strip() == "a film"
    assert len(long.prompt) == 64 and "of 2 questions 1 are cut" in caplog.text
    task.overlong = "truncate_prompt"
    rows[1]["text"] = "day " * 99 + "film"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert task.tokenizer.decode(task.questions(open_source(str(path)))[1].prompt).endswith("film")


@pytest.mark.parametrize(
    "record, message",
    [
        ({"text": "a", "target": ""}, "field 'target' is ''"),
        ({"text": "a"}, "no label: none of the fields target"),
        ({"text": 3, "target": "b"}, "field 'text' is 3"),
    ],
)
def test_bad_records(task, record, message):
    with pytest.raises(DataError, match=message):
        task.examples([record], ["x:1"])


def test_settings_of_others_are_refused(config, tmp_path):
    def refused(message, **changes):
        other = config.copy_and_resolve_references()
        with other.unlocked():
            for key, value in changes.items():
                section, _, name = key.rpartition("__")
                other[section][name] = value
        with pytest.raises(config_lib.ConfigError, match=message):
            task = tasks.make(other, load_tokenizer(other))
            task.load_model(other.model)

    refused("task='causal_lm'", eval__shots=2)
    refused("the metric 'choice'", eval__metrics=("choice",))
    refused("loss.dft=True is not of task='seq2seq'", loss__dft=True)
    refused("takes an encoder-decoder", model__path=model(tmp_path / "llama"))
    refused("data.overlong='split'", data__overlong="split")
    causal = config.copy_and_resolve_references()
    causal.task = "causal_lm"
    with pytest.raises(config_lib.ConfigError, match="max_target_length is nothing that"):
        tasks.make(causal, None)


def test_of_several_sources_each_target_knows_its_own(config, tmp_path):
    rows = open_source(config.data.train)
    paths = []
    for name, some in {"long": range(0, 40), "short": range(40, 60)}.items():
        paths.append(tmp_path / f"{name}.jsonl")
        records = [rows[i] | ({"target": "x"} if name == "short" else {}) for i in some]
        paths[-1].write_text("".join(json.dumps(r) + "\n" for r in records))
    c = config.copy_and_resolve_references()
    c.data.train, c.data.max_length = "", 64
    c.data.sources = tuple({"path": str(p), "name": p.stem} for p in paths)
    c.train.batch_size, c.train.duration = 8, "2 steps"
    mesh = parallel.make_mesh({"data": 1}, jax.devices()[:1])
    feed = Feed(c, tasks.make(c, load_tokenizer(c)), tmp_path / "run", mesh)
    batch = jax.device_get(next(iter(feed.batches(0))))
    short = feed.task.tokenizer("x")["input_ids"][0]
    whole = batch["target_positions"] == 0
    first = whole & (batch["target_segments"] > 0)
    assert batch["sources"].shape == batch["weights"].shape
    np.testing.assert_array_equal(batch["sources"][first] == 1, batch["targets"][first] == short)
    assert set(batch["sources"][first]) == {0, 1}


def test_targets_that_positions_do_not_reach_are_refused(config, tmp_path):
    c = config.copy_and_resolve_references()
    hf = BART | {"vocab_size": 512, "max_position_embeddings": 64}
    c.model.path = model(tmp_path / "bart", {"model_type": "bart", **hf})
    c.data.max_target_length = 65
    with pytest.raises(config_lib.ConfigError, match="data.max_target_length=65: the model has 64"):
        make_model(c, tasks.make(c, load_tokenizer(c)))
    c.data.max_target_length = 64
    assert make_model(c, tasks.make(c, load_tokenizer(c)))[0].config.cross
