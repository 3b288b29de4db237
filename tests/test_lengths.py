"""What becomes of documents longer than a row, and what is reported of lengths."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_chat import make_tokenizer

from sftjax.data import DataError, build_store, open_source
from sftjax.data.lengths import OVERLONG, describe, fit, lines

BOS = 1
BOS_CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}"
)


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
    return build_store(source, tokenizer, {}, cache_dir=tmp_path / "c", **settings), tokenizer


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
    text = lines(store.report)
    assert text[0] == f"tokens each: p5 {n}  p25 {n}  p50 {n}  p75 {n + 50}  " + "  ".join(
        f"{p} {n + 50}" for p in ("p95", "p99", "max")
    )
    assert text[1].startswith("≤32 █ 67%  ≤64 · 0%") and text[1].endswith("▄ 33%")
    assert text[2] == "3 truncated; 1 skipped: empty response; 1 skipped: field 'completion' is m" \
        "issing"  # fmt: skip
    for overlong, line in {
        "truncate_end": "3 dropped: no_trained_token_left",
        "drop": "3 dropped: too_long",
        "split": "3 split; 3 pieces dropped: no_trained_token",
    }.items():
        store, _ = build(tmp_path, short + long, overlong=overlong)
        assert lines(store.report)[2] == line
    store, _ = build(tmp_path, short)
    assert len(lines(store.report)) == 2  # nothing is lost
    with pytest.raises(DataError, match=r"d.jsonl:7: 6\d tokens, more than data.max_length=32"):
        build(tmp_path, short + long, overlong="error")
