import json
import logging
import os

import numpy as np
import pytest
from test_chat import TOKENIZER, assistant, make_tokenizer, user

from sftjax.data import DataError, Rows, TokenStore, build_store, loader, make_batch, open_source
from sftjax.data import token_store as pipeline_lib
from sftjax.data.packing.truncate import fit
from sftjax.tasks.causal_lm import CausalLM, mark_spans

POLICY = dict(train_on="assistant", stop_token="turn", template=None, fields={}, system="")


def write(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def pairs(n):
    return [{"prompt": f"what is {i}?", "completion": "the cat " * (i % 7 + 1)} for i in range(n)]


def build(tmp_path, records, tokenizer=TOKENIZER, max_length=64, overlong="truncate_end", **policy):
    source = open_source(write(tmp_path / "d.jsonl", records))
    return build_store(source, CausalLM(tokenizer, POLICY | policy), max_length, overlong, tmp_path / "cache")


class Documents:
    """A store in memory."""

    def __init__(self, lengths, seed=0):
        rng = np.random.default_rng(seed)
        self.lengths = np.asarray(lengths, np.int32)
        self.docs = [(rng.integers(3, 999, n), np.ones(n, np.float32)) for n in lengths]

    def __getitem__(self, i):
        return self.docs[i]


def random_documents(n=200, longest=40):
    return Documents(np.random.default_rng(1).integers(1, longest, n))


# --- the store ---


def test_store_holds_every_document(tmp_path):
    records = pairs(2500)  # more than two chunks
    store = build(tmp_path, records)
    assert len(store) == 2500 and store.lengths.dtype == np.int32
    assert (store.tokens.dtype, store.weights.dtype) == (np.int32, np.float32)
    assert store.offsets[-1] == len(store.tokens) == store.lengths.sum()
    for i in (0, 999, 1000, 2499):
        tokens, weights = store[i]
        assert TOKENIZER.decode(tokens[weights > 0]) == records[i]["completion"] + "<|im_end|>"
    report = store.report
    assert report["examples"] == report["documents"] == 2500
    assert (report["truncated"], report["dropped"], report["longest"]) == (
        0,
        {},
        store.lengths.max(),
    )
    assert report["trained_tokens"] == int((store.weights > 0).sum())
    assert report["stop_token"] == "<|im_end|>" and report["stop_token_trained"]
    assert 0.2 < report["trained_fraction"] < 0.8


def test_a_second_start_does_not_tokenise(tmp_path, monkeypatch):
    first = build(tmp_path, pairs(20))

    def refuse(*args, **kwargs):
        raise AssertionError("tokenised again")

    monkeypatch.setattr(CausalLM, "examples", refuse)
    second = build(tmp_path, pairs(20))
    np.testing.assert_array_equal(first.tokens, second.tokens)
    assert second.report == first.report
    assert [f.name[0] for f in (tmp_path / "cache").iterdir()] != ["."]  # nothing half-written


def test_the_key_follows_everything_that_changes_the_tokens(tmp_path):  # I8
    source = open_source(write(tmp_path / "d.jsonl", pairs(5)))
    base = [source, TOKENIZER, POLICY, 64, "drop"]

    def key(**changed):
        places = dict(source=0, tokenizer=1, policy=2, max_length=3, overlong=4)
        arguments = list(base)
        for name, value in changed.items():
            arguments[places[name]] = value
        source, tokenizer, policy, *rest = arguments
        return pipeline_lib.store_key(source, CausalLM(tokenizer, policy), *rest)

    more_tokens = make_tokenizer()
    more_tokens.add_tokens(["<new>"])
    other = write(tmp_path / "e.jsonl", pairs(6))
    (tmp_path / "t.jinja").write_text("{{ 1 }}")
    template = str(tmp_path / "t.jinja")
    keys = [
        key(),
        key(source=open_source(other)),
        key(source=open_source(other, limit=5)),
        key(tokenizer=more_tokens),
        key(tokenizer=make_tokenizer("{{ messages }}")),
        key(max_length=32),
        key(overlong="split"),
        key(policy=POLICY | dict(train_on="last")),
        key(policy=POLICY | dict(fields=dict(prompt="completion"))),
        key(policy=POLICY | dict(template=template)),
    ]
    (tmp_path / "t.jinja").write_text("{{ 2 }}")
    keys.append(key(policy=POLICY | dict(template=template)))
    assert len(set(keys)) == len(keys)
    assert key() == keys[0]


def test_a_failed_build_leaves_nothing(tmp_path):
    with pytest.raises(DataError, match=r"d.jsonl:2: empty response"):
        build(tmp_path, [*pairs(1), {"prompt": "x", "completion": ""}])
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cache_that_can_not_be_written(tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match="data.cache_dir=.*cache: can't be written"):
        build(tmp_path, pairs(1))


def test_overlong_policies():  # L1, L8
    tokens, weights = np.arange(1, 8), np.array([0, 0, 0, 1, 1, 0, 1.0])

    def pieces(overlong, limit=3):
        return [piece[0].tolist() for piece in fit(tokens, weights, limit, overlong)]

    assert pieces("truncate_end") == [] and pieces("drop") == []
    assert pieces("truncate_end", 4) == [[1, 2, 3, 4]]
    assert pieces("split") == [[4, 5, 6]]  # the others' trained tokens are first, or absent
    assert pieces("split", 5) == [[1, 2, 3, 4, 5], [6, 7]]
    assert pieces("drop", 7) == pieces("error", 0) == [tokens.tolist()]


def test_rows_left_without_a_trained_token_go():  # L1
    docs = [(np.arange(1, 6), np.array([0, 0, 0, 1, 1])), (np.arange(6, 9), np.ones(3))]
    left = [piece for doc in docs for piece in fit(*doc, 3, "truncate_end")]
    assert [tokens.tolist() for tokens, _ in left] == [[6, 7, 8]]


def test_overlong_rows_are_counted(tmp_path):
    long = {"prompt": "what " * 80, "completion": "four"}
    half = {"prompt": "what", "completion": "four " * 60}
    records = [*pairs(3), long, half]
    cut = build(tmp_path, records).report
    assert cut["dropped"] == {"no_trained_token_left": 1} and cut["truncated"] == 1
    assert cut["documents"] == 4 and cut["longest"] == 64
    dropped = build(tmp_path, records, overlong="drop").report
    assert dropped["dropped"] == {"too_long": 2} and dropped["truncated"] == 0
    split = build(tmp_path, records, overlong="split")
    assert split.report["documents"] > 5 and split.report["dropped"] == {}
    assert split.lengths.max() <= 64
    with pytest.raises(DataError, match=r"d.jsonl:4: \d+ tokens, more than data.max_length=64; ra"):
        build(tmp_path, records, overlong="error")
    with pytest.raises(DataError, match="data.overlong='cut': expected truncate_end | drop"):
        build(tmp_path, records, overlong="cut")


def test_nothing_trained_shows_the_first_row(tmp_path):
    with pytest.raises(DataError) as error:
        build(tmp_path, pairs(3), max_length=8)
    message = str(error.value)
    assert "nothing is trained in any of 3 rows (3 no_trained_token_left)" in message
    assert "data.train_on='assistant' and data.max_length=8" in message
    assert "d.jsonl:1, " in message and "assistant\n⟦the cat <|im_end|>⟧" in message
    with pytest.raises(DataError, match="3 no_trained_token"):
        build(tmp_path, pairs(3), train_on="tool")


def test_mark_spans():
    assert mark_spans("abcdef", [(1, 2), (4, 6)]) == "a⟦b⟧cd⟦ef⟧"


def test_suspicious_masks_are_said(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        build(tmp_path, [{"prompt": "what " * 900, "completion": "a"}], max_length=0)
        assert "% of the tokens are trained" in caplog.text
        build(tmp_path, pairs(2), stop_token="none")
        assert "no stop token is trained" in caplog.text
        caplog.clear()
        plain = "{% for m in messages %}{{ m.content }}{% endfor %}"
        build(tmp_path, pairs(2), tokenizer=make_tokenizer(plain), train_on="all")
        assert "every token of the chats is trained" in caplog.text
        caplog.clear()
        build(tmp_path, [{"text": "the cat sat"}])
        assert not caplog.text  # of text, all is meant to be trained


# --- rows ---


def tokens_of(rows, indices):
    return [rows[r]["tokens"][rows[r]["segments"] > 0].tolist() for r in indices]


@pytest.mark.parametrize("packing", ["bfd", "bfd_split", "wrapped", "none"])
def test_every_epoch_has_every_token_in_an_order_of_its_own(packing):
    docs = random_documents()
    rows = Rows(docs, 64, packing, seed=3, epochs=3)
    n = rows.per_epoch
    assert rows.total == len(rows) == 3 * n
    epochs = [tokens_of(rows, range(e * n, (e + 1) * n)) for e in range(3)]
    everything = sorted(t for tokens, _ in docs.docs for t in tokens.tolist())
    for epoch in epochs:
        assert sorted(t for row in epoch for t in row) == everything
    assert epochs[0] != epochs[1] != epochs[2]
    assert {tuple(row) for row in epochs[0]} != {tuple(row) for row in epochs[1]} or packing == "none"
    again = Rows(docs, 64, packing, seed=3, epochs=3)
    assert tokens_of(again, range(2 * n, 3 * n)) == epochs[2]  # any epoch first
    assert tokens_of(Rows(docs, 64, packing, seed=4), range(n)) != epochs[0]


def test_rows_are_batches_of_their_documents():
    docs = random_documents(30)
    rows = Rows(docs, 64, "bfd")
    for r in range(rows.per_epoch):
        row = rows[r]
        at = 0
        for segment in range(1, row["segments"].max() + 1):
            cells = row["segments"] == segment
            start = int(np.flatnonzero(cells)[0])
            doc = next(d for d, _ in docs.docs if d[0] == row["tokens"][start] and
                       len(d) == cells.sum() and (d == row["tokens"][cells]).all())  # fmt: skip
            expected = make_batch([(doc, np.ones(len(doc)))], len(doc))
            for key in ("targets", "weights", "positions"):
                np.testing.assert_array_equal(row[key][cells], expected[key][0])
            assert start == at
            at += len(doc)


def test_totals_and_blank_rows():
    docs = Documents([5, 5, 5])
    rows = Rows(docs, 5, "none", epochs=1.5)
    assert (rows.per_epoch, rows.total) == (3, 5)
    assert Rows(docs, 5).total == 3
    blank = rows[5]
    assert not blank["segments"].any() and not blank["weights"].any()
    assert blank["tokens"].tolist() == [0] * 5
    assert rows[4]["segments"].all()
    with pytest.raises(IndexError):
        rows[-1]
    with pytest.raises(DataError, match="a document of 5 tokens is longer than a row of 4; build"):
        Rows(docs, 4)
    assert Rows(docs, 4, "bfd_split").per_epoch == 4


def test_efficiency_and_order_without_shuffle():
    rows = Rows(Documents([4, 2, 3]), 6, "bfd", shuffle=False)
    assert rows.efficiency == 9 / 12
    assert [r["segments"].max() for r in (rows[0], rows[1])] == [2, 1]
    assert (rows[0]["tokens"][:4] == Documents([4, 2, 3])[0][0]).all()


def test_only_two_plans_are_kept_and_rows_can_be_pickled(tmp_path):
    import pickle

    store = build(tmp_path, pairs(20))
    rows = Rows(store, 64, epochs=9)
    for epoch in range(9):
        rows[epoch * rows.per_epoch]
    assert list(rows._plans) == [7, 8]
    data = pickle.dumps(rows)
    assert len(data) < 2000  # no array in it
    copy = pickle.loads(data)
    assert isinstance(copy.store, TokenStore)
    np.testing.assert_array_equal(copy[3]["tokens"], rows[3]["tokens"])


# --- the loader ---


def all_tokens(batches):
    return [batch["tokens"].tolist() for batch in batches]


def test_steps_hold_their_rows_and_the_last_is_filled():
    rows = Rows(random_documents(50), 64, "bfd", epochs=1)
    batches = list(loader(rows, 3))
    assert len(batches) == -(-rows.total // 3)
    for b, batch in enumerate(batches):
        assert {k: v.shape for k, v in batch.items()} == dict.fromkeys(batch, (3, 64))
        for i in range(3):
            np.testing.assert_array_equal(batch["tokens"][i], rows[b * 3 + i]["tokens"])
    filled = sum(int(batch["segments"].any(axis=1).sum()) for batch in batches)
    assert filled == rows.total and rows.total % 3  # none dropped, the rest blank


def test_two_hosts_read_what_one_would():
    rows = Rows(random_documents(), 64, "bfd", epochs=2)
    one = list(loader(rows, 6))
    parts = [list(loader(rows, 6, local=local)) for local in (range(2), range(2, 6))]
    for whole, left, right in zip(one, *parts, strict=True):
        for key in whole:
            np.testing.assert_array_equal(whole[key], np.concatenate([left[key], right[key]]))
    with pytest.raises(ValueError, match="are not within a batch of 6"):
        loader(rows, 6, local=range(4, 8))


def test_resuming_is_the_same_stream():
    rows = Rows(random_documents(), 64, "bfd", epochs=3)
    straight = all_tokens(loader(rows, 4))
    for k in (1, len(straight) // 2, len(straight) - 1, len(straight)):
        assert all_tokens(loader(rows, 4, start_step=k)) == straight[k:]
    assert all_tokens(loader(rows, 4, start_step=2, stop_step=5)) == straight[2:5]
    iterator = loader(rows, 4)
    next(iterator), next(iterator)
    state = iterator.get_state()
    fresh = loader(rows, 4)
    fresh.set_state(state)
    assert all_tokens(fresh) == straight[2:]


def test_a_far_start_reads_nothing_before_it():
    class Counting(Documents):
        read = 0

        def __getitem__(self, i):
            self.read += 1
            return self.docs[i]

    docs = Counting([8] * 1000)
    rows = Rows(docs, 8, "none", epochs=1000)
    next(loader(rows, 4, start_step=200_000))
    assert docs.read <= 4 * 8


def test_worker_processes_read_the_same(tmp_path):
    rows = Rows(build(tmp_path, pairs(40)), 64, "bfd", seed=1, epochs=2)
    assert all_tokens(loader(rows, 4, workers=1)) == all_tokens(loader(rows, 4))


# --- real data ---


def test_gsm8k_packs_tightly(fixtures, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(fixtures / "tokenizer-qwen")
    policy = POLICY | dict(fields=dict(prompt="question", completion="answer"))
    source = open_source(fixtures / "gsm8k" / "train.jsonl")
    store = build_store(source, CausalLM(tokenizer, policy), 1024, "error", tmp_path)
    assert store.report["documents"] == 6473 and store.report["stop_token"] == "<|im_end|>"
    assert 0.6 < store.report["trained_fraction"] < 0.65
    assert Rows(store, 1024).efficiency >= 0.98
    assert Rows(store, 2048).efficiency >= 0.99
    record = source[17]
    tokens, weights = store[17]
    assert tokenizer.decode(tokens[weights > 0]) == record["answer"] + "<|im_end|>"


def test_conversations_are_stored_like_pairs(tmp_path):
    chats = [{"messages": [user(r["prompt"]), assistant(r["completion"])]} for r in pairs(3)]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one, two = build(tmp_path / "a", chats), build(tmp_path / "b", pairs(3))
    np.testing.assert_array_equal(one.tokens, two.tokens)
    np.testing.assert_array_equal(one.weights, two.weights)


# --- what a killed run leaves ---


def test_a_store_left_half_built_is_cleaned_up_but_not_one_being_built(tmp_path):
    cache = tmp_path / "cache"
    for name in ("killed", "empty", "live", "new"):
        (cache / f".building-{name}").mkdir(parents=True)
    for name in ("killed", "live"):
        (cache / f".building-{name}" / "tokens.i32").touch()
    for old in ("killed/tokens.i32", "killed", "empty", "live"):
        os.utime(cache / f".building-{old}", (0, 0))
    build(tmp_path, pairs(3))
    assert {p.name for p in cache.glob(".building-*")} == {".building-live", ".building-new"}
    build(tmp_path, pairs(4))
    stores = [p for p in cache.iterdir() if not p.name.startswith(".")]
    assert len(stores) == 2


def test_a_store_has_a_hash_of_each_row(tmp_path):
    first = np.load(build(tmp_path, pairs(5)).folder / "rows.npy")
    second = np.load(build(tmp_path, pairs(4) + pairs(1)).folder / "rows.npy")
    assert first.dtype == np.uint32 and len(set(first)) == 5
    assert list(second) == [*first[:4], first[0]]
