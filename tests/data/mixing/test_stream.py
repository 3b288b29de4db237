"""Streams: shards read as they come, the same masks, exact resumption, parts for processes."""

import gzip
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_chat import TOKENIZER
from test_mix import make_feed
from test_multiprocess import run_all
from test_pipeline import POLICY, pairs
from test_train import files, losses, make  # noqa: F401 (files is a fixture)

from sftjax import config as config_lib
from sftjax import train as train_lib
from sftjax.config import ConfigError
from sftjax.data import DataError, Rows, build_store, make_batch, open_source
from sftjax.data.mixing import stream
from sftjax.tasks.causal_lm import CausalLM

KINDS = ("jsonl", "jsonl.gz", "jsonl.zst", "parquet")


def write(path, records):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path, row_group_size=7)
        return str(path)
    text = "".join(json.dumps(r) + "\n" for r in records).encode()
    half = len(text) // 2  # compressed in two members, as tools that append do
    if path.suffix == ".gz":
        text = gzip.compress(text[:half]) + gzip.compress(text[half:])
    if path.suffix == ".zst":
        text = b"".join(pa.compress(t, "zstd", asbytes=True) for t in (text[:half], text[half:]))
    path.write_bytes(text)
    return str(path)


@pytest.fixture(scope="module", autouse=True)
def few_bins():
    """Small numbers, so that a short test passes many borders of chunks and of bins."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "BINS", 8)
        patch.setattr(stream, "CHUNK", 30)
        yield


@pytest.fixture
def shards(tmp_path):
    """200 rows in four shards, one of each kind."""
    records = pairs(200)
    return [write(tmp_path / f"s{i}.{k}", records[i::4]) for i, k in enumerate(KINDS)]


def spec(paths, name="a", **more):
    return stream.Spec(name, ",".join(paths), CausalLM(TOKENIZER, POLICY), **more)


class Stream:
    """Closes the iterators it makes, and their threads."""

    def __init__(self, *specs, **options):
        defaults = dict(length=48, rows=4, window=40, seed=1)
        self.specs, self.options, self.open = list(specs), defaults | options, []

    def __call__(self, state=None):
        self.open.append(stream.batches(self.specs, **self.options))
        if state is not None:
            self.open[-1].set_state(state)
        return self.open[-1]

    def take(self, n, state=None):
        iterator = self(state)
        batches = [next(iterator) for _ in range(n)]
        iterator.close()
        return batches


def documents(batches):
    """Each document of some batches: (tokens, targets, weights), as lists."""
    found = []
    for batch in batches:
        for row in range(len(batch["tokens"])):
            for segment in range(1, batch["segments"][row].max() + 1):
                cells = batch["segments"][row] == segment
                columns = (batch[k][row, cells].tolist() for k in ("tokens", "targets", "weights"))
                assert batch["positions"][row, cells].tolist() == list(range(cells.sum()))
                found.append(tuple(map(tuple, columns)))
    return found


def stored(tmp_path, path, length=48, overlong="truncate_end"):
    """The documents as the index has them."""
    store = build_store(open_source(path), CausalLM(TOKENIZER, POLICY), length, overlong, tmp_path / "cache")
    return documents([make_batch([store[i]]) for i in range(len(store))])


# --- what is read ---


@pytest.mark.parametrize("kind", KINDS)
def test_a_shard_is_read_from_any_row(tmp_path, kind):
    records = pairs(20)
    path = tmp_path / f"x.{kind}"
    write(path, records)
    for start in (0, 1, 6, 7, 13, 19, 20):
        found = list(stream.READERS[f".{kind}"].stream(path, start))
        values = [json.loads(x) if isinstance(x, bytes) else x for _, x in found]
        assert [row for row, _ in found] == list(range(start, 20)) and values == records[start:]


def test_compressed_files_are_sources_too(tmp_path):
    records = pairs(20)
    for kind in KINDS:
        path = write(tmp_path / f"x.{kind}", records)
        source = open_source(path)
        assert [source[i] for i in range(len(source))] == records
        assert source.where(7) == f"{path}:8"
    (tmp_path / "x.jsonl").unlink()
    (tmp_path / "x.parquet").unlink()
    assert len(open_source(tmp_path)) == 40  # of a folder, by their two suffixes


@pytest.mark.parametrize("kind, name", [("gz", "gzip"), ("zst", "zstd")])
def test_a_damaged_file_is_named(tmp_path, kind, name):
    whole = tmp_path / f"x.jsonl.{kind}"
    write(whole, pairs(500))
    whole.write_bytes(whole.read_bytes()[:-100])
    with pytest.raises(DataError, match=f"x.jsonl.{kind}: not a readable {name} file"):
        open_source(whole)
    with pytest.raises(DataError, match=f"x.jsonl.{kind}: not a readable {name} file"):
        Stream(spec([str(whole)])).take(200)


@pytest.mark.parametrize("window", [1, 40])
def test_every_pass_has_the_documents_of_the_index(shards, tmp_path, window):
    """Once each, with the very same targets and weights, in an order of its own."""
    expected = sorted(stored(tmp_path, ",".join(shards)))
    one_a_row = Stream(spec(shards), window=window, packing="none", rows=200)
    passes = [documents([batch]) for batch in one_a_row.take(3)]
    for got in passes:
        assert sorted(got) == expected
    assert passes[0] != passes[1] != passes[2] != passes[0]
    assert set(documents(Stream(spec(shards), window=window).take(60))) == set(expected)


def test_rows_of_a_stream_are_those_of_the_index(tmp_path):  # P8, of rows like P1's
    texts = ["ABC", "DEFGH", "IJ"]
    path = write(tmp_path / "x.jsonl", [{"segments": [dict(text=t, train=True)]} for t in texts])
    store = build_store(open_source(path), CausalLM(TOKENIZER, POLICY), 5, "truncate_end", tmp_path / "cache")
    assert store.lengths.tolist() == [3, 5, 2]
    rows = Rows(store, 5)
    expected = {documents_of_row(rows[r]) for r in range(rows.per_epoch)}
    streamed = Stream(spec([path]), length=5, window=1, rows=2).take(20)
    assert {documents_of_row({k: v[i] for k, v in b.items()}) for b in streamed for i in (0, 1)} == (expected)


def documents_of_row(row):
    return tuple(sorted(documents([{key: values[None] for key, values in row.items()}])))


def test_overlong_documents_are_cut_as_in_the_index(tmp_path):
    path = write(tmp_path / "x.jsonl", pairs(60))
    for overlong in ("truncate_end", "split", "drop"):
        got = documents(Stream(spec([path], overlong=overlong), length=28).take(30))
        assert set(got) == set(stored(tmp_path, path, 28, overlong))
    with pytest.raises(DataError, match=r"x.jsonl:\d+: \d+ tokens, more than data.max_length=28"):
        Stream(spec([path], overlong="error"), length=28).take(1)
    with pytest.raises(DataError, match="x.jsonl: nothing is trained in 3000 rows one after the"):
        Stream(spec([path]), length=8).take(1)


def test_bad_rows_are_raised_or_skipped(tmp_path):
    records = pairs(100)
    records[17] = {"prompt": "what", "completion": ""}
    path = write(tmp_path / "x.jsonl", records)
    with pytest.raises(DataError, match="x.jsonl:18: empty response"):
        Stream(spec([path])).take(100)
    skipping = Stream(spec([path], on_error="skip", max_skipped=0.1), rejects=tmp_path / "rejects")
    assert len(documents(skipping.take(50))) > 200
    reject = json.loads((tmp_path / "rejects").read_text().splitlines()[0])
    assert reject["file"] == f"{path}:18" and "empty response" in reject["reason"]
    text = (tmp_path / "x.jsonl").read_text().replace('{"prompt": "what is 30?"', '3 {"what')
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(DataError, match="x.jsonl:31: malformed JSON at column 3"):
        Stream(spec([path], on_error="raise")).take(100)
    assert len(documents(skipping.take(50))) > 200


# --- resumption, parts, mixtures ---


def test_what_is_not_read_is_said_when_it_first_comes(tmp_path, caplog):
    path = write(tmp_path / "a.jsonl", [r | {"url": "x", "seen": 1} for r in pairs(60)])
    made = Stream(spec([path], known=["field 'seen' is not read"]))
    made.take(20)  # several passes
    [said] = [m for m in caplog.messages if "not read" in m]
    assert said.startswith("a: field 'url' is not read: in 30 rows, first in ")


@pytest.mark.parametrize("packing", ["bfd", "none"])
def test_resuming_is_bit_equal_at_every_step(shards, packing):
    several = Stream(spec(shards[:2], weight=3.0), spec(shards[2:], "b", weight=1.0), packing=packing)
    iterator, straight, states = several(), [], []
    for _ in range(60):
        states.append(json.loads(json.dumps(iterator.get_state())))  # as a checkpoint keeps it
        straight.append(next(iterator))
    iterator.close()
    for k in (*range(12), 25, 40, 52):
        for a, b in zip(several.take(8, states[k]), straight[k:], strict=False):
            for key in b:
                np.testing.assert_array_equal(a[key], b[key], err_msg=f"{key} after step {k}")
    assert len(json.dumps(states[-1])) < 1000


def test_parts_share_the_data(shards, tmp_path):
    def seen(paths, part, parts):
        return set(documents(Stream(spec(paths), part=part, parts=parts).take(60)))

    for part in range(2):  # whole shards
        assert seen(shards, part, 2) == set(stored(tmp_path, ",".join(shards[part::2])))
    thirds = [seen(shards[:2], part, 3) for part in range(3)]  # rows, as there are but two shards
    everything = stored(tmp_path, ",".join(shards[:2]))
    assert set.union(*thirds) == set(everything)
    assert sum(map(len, thirds)) == len(set(everything))


def test_a_part_without_a_row_is_an_error(tmp_path):
    path = write(tmp_path / "x.jsonl", pairs(2))
    with pytest.raises(DataError, match=r"x.jsonl: no row for part 3 of 3"):
        Stream(spec([path]), part=2, parts=3).take(1)


def test_weights_are_shares_of_tokens(shards):
    batches = Stream(spec(shards[:2], weight=7.0), spec(shards[2:], "b", weight=3.0)).take(150)
    inside = [b["sources"][b["segments"] > 0] for b in batches]
    assert abs(np.concatenate(inside).mean() - 0.3) < 0.01


def test_a_sample_is_of_all_shards(shards):
    source = stream.sample(",".join(shards), 20)
    assert len(source) == 20 and source[0] == pairs(1)[0]
    assert {source.where(i).rpartition(":")[0] for i in range(20)} == set(shards)
    assert len(stream.sample(shards[0], 1000)) == 50


def test_files_that_cannot_be_streamed(tmp_path):
    path = write(tmp_path / "x.json", pairs(2))
    with pytest.raises(DataError, match=r"x.json: '.json' can't be streamed; known: .jsonl, .ndjs"):
        stream.shards(path)
    (tmp_path / "blank.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="blank.jsonl: the shards hold no row"):
        stream.sample(str(tmp_path / "blank.jsonl"))


# --- a run ---


def streaming(files, *shards, **overrides):  # noqa: F811
    c = make(files, data__streaming=True, data__shuffle_window=30, data__test="", **overrides)
    if shards:
        c.data.train, c.data.sources = "", tuple(dict(path=p, weight=w) for p, w in shards)
    return c


@pytest.fixture(scope="module")
def straight(files, tmp_path_factory):  # noqa: F811
    workdir = tmp_path_factory.mktemp("stream") / "run"
    config = streaming(files)
    train_lib.train(config, workdir)
    return workdir, config


def test_a_run_trains_on_a_stream_and_resumes(straight, files, tmp_path, capsys):  # noqa: F811
    workdir, config = straight
    assert list(losses(workdir)) == list(range(1, 13))
    shutil.copytree(workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "12")
    train_lib.train(config, tmp_path / "run")  # from step 9
    said = capsys.readouterr().out
    assert "resumed" in said and "a sample: 200 examples" in said and "\n          rows of 96 tokens" in said
    assert losses(tmp_path / "run") == losses(workdir)


@pytest.mark.multiprocess
def test_two_processes_read_a_part_each(files, tmp_path, monkeypatch):  # noqa: F811
    """And resume exactly; with another number of them it is refused."""
    overrides = ("data.streaming=True", "data.shuffle_window=30", "data.test=", "data.validation=")
    run_all(files, tmp_path / "two", *overrides)
    assert list(losses(tmp_path / "two")) == list(range(1, 13))
    shutil.copytree(tmp_path / "two", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "12")
    run_all(files, tmp_path / "again", *overrides)
    assert losses(tmp_path / "again") == losses(tmp_path / "two")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "12")
    monkeypatch.setattr(stream, "BINS", 256)  # as in the processes
    monkeypatch.setattr(stream, "CHUNK", 1000)
    with pytest.raises(ConfigError, match="the stream was read in 2 parts, and this mesh reads it"):
        train_lib.train(streaming(files, data__validation=""), tmp_path / "again")


@pytest.mark.parametrize(
    "overrides, message",
    [
        (
            dict(train__duration="1 epoch"),
            "train.duration='1 epoch': a stream has no end, so max_s",
        ),
        (dict(train__duration="200 examples"), "so max_steps is required: write '1000 steps'"),
        (dict(data__limit=5), "data.limit can't be had with data.streaming"),
        (dict(data__workers=1), "data.workers can't be had with data.streaming"),
        (dict(data__packing="wrapped"), "data.packing can't be had with data.streaming"),
        (dict(data__split__share=0.1, data__validation=""), "data.split.share can't be had with"),
        (dict(data__clean__rules="('all',)"), "data.clean.rules can't be had with"),
    ],
)
def test_what_a_stream_cannot_do(files, tmp_path, overrides, message):  # noqa: F811
    config = streaming(files)
    for key, value in overrides.items():
        config_lib.override(config, key.replace("__", "."), str(value))
    with pytest.raises(ConfigError, match=message):
        make_feed(config, tmp_path)


def test_sources_of_a_stream_need_weights(files, tmp_path, shards):  # noqa: F811
    config = streaming(files, (shards[0], 3), (shards[1], None))
    with pytest.raises(ConfigError, match="the size of 's1' is not known; give it a weight"):
        make_feed(config, tmp_path)
    feed = make_feed(streaming(files, (shards[0], 3), (shards[1], 1)), tmp_path)
    batches = feed.batches(0)
    sources = [b["sources"][b["segments"] > 0] for b in (next(batches) for _ in range(10))]
    assert abs(np.concatenate(sources).mean() - 0.25) < 0.02
    state = json.loads(json.dumps(feed.state(10)))
    expected = [np.asarray(next(batches)["tokens"]) for _ in range(2)]
    again = feed.batches(10, state)
    for tokens in expected:
        np.testing.assert_array_equal(np.asarray(next(again)["tokens"]), tokens)


def test_tokens_are_a_duration_of_a_stream(files, tmp_path):  # noqa: F811
    feed = make_feed(streaming(files, train__duration="20_000 tokens"), tmp_path)
    tokens = sum(int((b["segments"] > 0).sum()) for b in feed.batches(0))
    assert abs(tokens / 20_000 - 1) < 0.1


@pytest.mark.fixtures
def test_gsm8k_streams_tightly(fixtures, monkeypatch):
    from transformers import AutoTokenizer

    monkeypatch.setattr(stream, "BINS", 256)
    policy = POLICY | dict(fields=dict(prompt="question", completion="answer"))
    tokenizer = AutoTokenizer.from_pretrained(fixtures / "tokenizer-qwen")
    task = CausalLM(tokenizer, policy)
    gsm8k = stream.Spec("gsm8k", str(fixtures / "gsm8k" / "train.jsonl"), task)
    iterator = stream.batches([gsm8k], length=1024, rows=32)
    batches = [next(iterator) for _ in range(16)]
    iterator.close()
    assert np.mean([batch["segments"] > 0 for batch in batches]) > 0.96
    trained = np.concatenate([b["weights"][b["segments"] > 0] for b in batches])
    assert 0.6 < trained.mean() < 0.65
