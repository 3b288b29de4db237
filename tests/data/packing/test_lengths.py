"""What becomes of documents longer than a row, and what is reported of lengths."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_chat import make_tokenizer
from test_pipeline import Documents
from test_train import files, lines, make  # noqa: F401

from sftjax import train as train_lib
from sftjax.config import ConfigError
from sftjax.data import Buckets, DataError, build_store, loader, open_source
from sftjax.data.packing import truncate as lengths_lib
from sftjax.data.packing.truncate import OVERLONG, describe, fit
from sftjax.tasks.causal_lm import CausalLM

BOS = 1
BOS_CHATML = "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def pieces(trained, overlong, limit, bos=None):
    """`trained` is a string, "." for a token that is not trained; tokens count from 1."""
    weights = np.array([c != "." for c in trained], np.float32)
    tokens = np.arange(1, len(trained) + 1)
    found = fit(tokens, weights, limit, overlong, bos)
    for piece, w in found:
        np.testing.assert_array_equal(w, weights[piece - 1])  # the weights follow their tokens
    return [piece.tolist() for piece, _ in found]


def test_truncate_prompt_keeps_the_trained_end():
    assert pieces(".....xx", "truncate_prompt", 4) == [[4, 5, 6, 7]]
    assert pieces(".....xx", "truncate_prompt", 4, BOS) == [[1, 5, 6, 7]]
    assert pieces(".....xx", "truncate_prompt", 7) == [[1, 2, 3, 4, 5, 6, 7]]
    # Only the first prompt is cut: the middle of a conversation stays whole.
    assert pieces("....x..x", "truncate_prompt", 6) == [[3, 4, 5, 6, 7, 8]]


def test_truncate_prompt_cuts_the_end_of_what_is_trained_last():
    assert pieces("...xxxxx", "truncate_prompt", 4) == [[3, 4, 5, 6]]  # one token predicts the 4th
    assert pieces("...xxxxx", "truncate_prompt", 4, BOS) == [[1, 4, 5, 6]]
    assert pieces("xxxxxx", "truncate_prompt", 4) == [[1, 2, 3, 4]]
    assert pieces("x....xx", "truncate_prompt", 4) == [[4, 5, 6, 7]]  # the first is never a target
    assert pieces("...xx...", "truncate_prompt", 5) == [[1, 2, 3, 4, 5]]  # nothing follows 5
    assert pieces("....xx..", "truncate_prompt", 5) == [[2, 3, 4, 5, 6]]
    assert pieces("......", "truncate_prompt", 4) == [] == pieces("x.....", "truncate_prompt", 4)


@settings(derandomize=True, max_examples=150, deadline=None, database=None)
@given(
    st.text(".x", min_size=1, max_size=30),
    st.integers(2, 12),
    st.sampled_from(OVERLONG),
    st.sampled_from([None, BOS]),
)
def test_no_piece_is_long_or_untrained(trained, limit, overlong, bos):
    found = pieces(trained, overlong, limit, bos)
    for piece in found:
        assert len(piece) <= limit and piece == sorted(piece)
        assert any(trained[i - 1] == "x" for i in piece[1:])
    if len(trained) <= limit or overlong == "truncate_prompt":
        assert bool(found) == ("x" in trained[1:])  # what can be trained is never lost
    if overlong == "truncate_prompt" and found and len(trained) > limit:
        assert len(found[0]) == limit and (bos is None or found[0][0] == BOS)


def build(tmp_path, records, **settings):
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    source = open_source(tmp_path / "d.jsonl")
    settings = dict(max_length=32, overlong="truncate_prompt") | settings
    tokenizer = make_tokenizer(BOS_CHATML)
    return build_store(source, CausalLM(tokenizer), cache_dir=tmp_path / "c", **settings), tokenizer


def test_an_answer_survives_a_prompt_that_is_too_long(tmp_path):
    records = [
        {"prompt": "mat " * 100, "completion": "four"},
        {"prompt": "cat", "completion": "four " * 100},
    ]
    store, tokenizer = build(tmp_path, records)
    assert store.lengths.tolist() == [32, 32]
    texts = [tokenizer.decode(tokens) for tokens, _ in store]
    answer = "mat <|im_end|>\n<|im_start|>assistant\nfour<|im_end|>"
    assert texts[0].startswith("<s>") and texts[0].endswith(answer)
    trained = [tokenizer.decode(tokens[weights > 0]) for tokens, weights in store]
    assert trained[0] == "four<|im_end|>" and trained[1].startswith("four four")
    assert texts[1].startswith("<s>four four")  # nothing but the answer fits
    assert store.report["truncated"] == 2 and store.report["dropped"] == {}


def test_describe():
    found = describe([1, 2, 3, 4, 5, 1000])
    assert found["percentiles"] == dict(p5=2, p25=3, p50=4, p75=5, p95=1000, p99=1000, max=1000)
    histogram = found["histogram"]
    assert histogram[:4] == [[1, 1], [2, 1], [4, 2], [8, 1]] and histogram[-1] == [1024, 1]
    assert sum(n for _, n in histogram) == 6
    assert describe([7])["histogram"] == [[8, 1]]


def test_the_report_says_what_was_lost(tmp_path):
    short = [{"prompt": "cat", "completion": "four"}] * 6
    long = [{"prompt": "mat " * 50, "completion": "four"}] * 3
    bad = [{"prompt": "cat", "completion": ""}, {"prompt": "cat"}]
    more = dict(on_error="skip", max_skipped=0.5)
    store, _ = build(tmp_path, short + long + bad, **more)
    n = int(store.lengths[0])
    assert store.report["lengths"]["percentiles"]["p50"] == n < 32
    assert store.report["lengths"]["percentiles"]["max"] == n + 50  # before anything is cut
    text = lengths_lib.lines(store.report)
    assert text[0] == f"tokens each: p5 {n}  p25 {n}  p50 {n}  p75 {n + 50}  " + "  ".join(
        f"{p} {n + 50}" for p in ("p95", "p99", "max")
    )
    assert text[1].startswith("≤32 █ 67%  ≤64 · 0%") and text[1].endswith("▄ 33%")
    assert text[2] == "3 truncated; 1 skipped: empty response; 1 skipped: missing field: 'completion'"
    for overlong, line in {
        "truncate_end": "3 dropped: no_trained_token_left",
        "drop": "3 dropped: too_long",
        "split": "3 split; 3 pieces dropped: no_trained_token",
    }.items():
        store, _ = build(tmp_path, short + long, overlong=overlong)
        assert lengths_lib.lines(store.report)[2] == line
    store, _ = build(tmp_path, short)
    assert len(lengths_lib.lines(store.report)) == 2  # nothing is lost
    with pytest.raises(DataError, match=r"d.jsonl:7: 6\d tokens, more than data.max_length=32"):
        build(tmp_path, short + long, overlong="error")


# --- rows of one document each, in batches as wide as needed ---


WIDTHS = [8, 16, 32]


def buckets(n=203, **options):
    documents = Documents(np.random.default_rng(0).integers(2, 33, n))
    options = dict(widths=WIDTHS[:-1], batch_size=4, seed=1, epochs=3) | options
    return documents, Buckets(documents, WIDTHS[-1], **options)


def test_a_batch_is_as_wide_as_its_longest_document_needs():
    documents, rows = buckets()
    batches = list(loader(rows, 4))
    assert len(batches) == -(-3 * 203 // 4)
    for batch in batches:
        longest = (batch["segments"] > 0).sum(axis=1).max()
        assert {v.shape for v in batch.values()} == {(4, min(w for w in WIDTHS if w >= longest))}
    assert len([row for batch in batches for row in batch["segments"] if row.any()]) == 3 * 203
    used = sum(int((batch["segments"] > 0).sum()) for batch in batches)
    assert used == 3 * int(documents.lengths.sum())
    cells = sum(batch["segments"].size for batch in batches)
    assert rows.efficiency == pytest.approx(used / cells, rel=0.02)
    assert rows.efficiency > 1.2 * Buckets(documents, 32, widths=[], batch_size=4).efficiency


def test_every_epoch_has_every_document_in_batches_of_a_new_order():
    documents, rows = buckets()
    n = rows.per_epoch
    epochs = [[rows.pieces(r)[0][0] for r in range(e * n, (e + 1) * n)] for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(203))
    assert epochs[0] != epochs[1] != epochs[2]
    wide = [[b["tokens"].shape[1] for b in loader(rows, 4, start_step=s, stop_step=s + 50)]
            for s in (0, 51, 102)]  # fmt: skip
    assert all(len(set(w)) == 3 and w != sorted(w) for w in wide) and wide[0] != wide[1]
    order = [p for r in range(n) for p in buckets(shuffle=False)[1].pieces(r)]
    assert [documents.lengths[d] > 8 for d, *_ in order] == sorted(documents.lengths > 8)


def test_hosts_and_resumption_give_the_same_batches():
    _, rows = buckets()
    whole = [b["tokens"] for b in loader(rows, 4)]
    parts = [loader(rows, 4, local=local, start_step=70) for local in (range(1), range(1, 4))]
    for tokens, *split in zip(whole[70:], *parts, strict=True):
        np.testing.assert_array_equal(tokens, np.concatenate([b["tokens"] for b in split]))


@pytest.mark.parametrize("widths", [[0, 8], [16, 8], [8, 8], [32]])
def test_wrong_widths(widths):
    with pytest.raises(DataError, match=r"data.buckets=\(.*\): expected ascending lengths below 32"):
        buckets(widths=widths)


@pytest.mark.slow
def test_a_run_compiles_each_width_once(files, tmp_path, capsys):  # noqa: F811
    config = make(files, data__packing="none", data__eval_packing="none", data__test="")
    config.data.buckets = (48, 64)
    config.train.export, config.train.duration = False, "8 steps"
    train_lib.train(config, tmp_path / "run")
    steps = [line for line in lines(tmp_path / "run") if "loss" in line]
    cells = {round(line["cells_per_s"] * line["step_time"]) for line in steps}
    assert len(steps) == 8 and cells <= {8 * 48, 8 * 64, 8 * 96} and len(cells) > 1
    said = capsys.readouterr().out
    assert "tokens each: p5 " in said and "packing none" in said


def test_buckets_need_rows_without_packing(files, tmp_path):  # noqa: F811
    config = make(files)
    config.data.buckets = (48,)
    with pytest.raises(ConfigError, match="data.buckets needs data.packing or data.eval_packing"):
        train_lib.train(config, tmp_path / "run")
