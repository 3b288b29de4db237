"""The split by hash: lasting, group-aware, stratified."""

import random
from collections import Counter, defaultdict

import numpy as np
import pytest

from sftjax.clean.split import Subset, fraction, normalise, prompt_key, split
from sftjax.data import DataError


class Records(list):
    def where(self, i):
        return f"r:{i + 1}"

    def fingerprint(self):
        return str(list(self))


def rows(n, seed=0, labels=("a", "b", "c"), weights=(80, 15, 5), groups=0):
    rng = random.Random(seed)
    return [
        {
            "prompt": f"question {rng.random()}",
            "completion": "x",
            "label": rng.choices(labels, weights)[0],
            "group": rng.randrange(groups or 1),
        }
        for _ in range(n)
    ]


def held_out(records, share=0.1, **by):
    train, validation = split(Records(records), share, **by)
    assert sorted([*train.rows, *validation.rows]) == list(range(len(records)))
    return {validation[i]["prompt"] for i in range(len(validation))}


def test_a_hash_is_for_ever():
    """These numbers (of b2sum -l 64) may never change: validation rows would be trained on."""
    assert fraction("what is two?") == pytest.approx(0.07287683392748323, abs=1e-15)
    assert fraction("zwei ✓") == pytest.approx(0.4996905010165761, abs=1e-15)
    record = {"prompt": "  What IS\n\ttwo？ ", "completion": "2"}
    assert prompt_key(record) == "what is two?"
    chat = {"messages": [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is TWO?"},
        {"role": "assistant", "content": "2"}, {"role": "user", "content": "And three?"},
        {"role": "assistant", "content": "3"},
    ]}  # fmt: skip
    assert prompt_key(chat) == "what is two?"  # so threads that begin alike stay together
    assert prompt_key({"text": "Plain  text"}) == "plain text"
    assert normalise("ﬁne ＡＢＣ\u00a0x") == "fine abc x"


def test_the_share_and_the_sampling_error():
    records = rows(20_000)
    chosen = held_out(records)
    assert abs(len(chosen) - 2000) < 4 * np.sqrt(20_000 * 0.1 * 0.9)
    uniform = np.sort([fraction(r["prompt"]) for r in records])
    assert np.abs(uniform - np.arange(20_000) / 20_000).max() < 0.015  # Kolmogorov-Smirnov


def test_no_row_moves_whatever_else_is_added_removed_or_shuffled():
    records, more = rows(2000), rows(500, seed=1)
    before = held_out(records)
    mixed = records[::2] + more
    random.Random(2).shuffle(mixed)
    known = {r["prompt"] for r in records[::2]}
    assert held_out(mixed) & known == before & known


def test_equal_prompts_stay_together():
    records = rows(500)
    again = [r | {"prompt": r["prompt"].upper() + " ", "label": "z"} for r in records]
    for by in ({}, {"stratify_by": "label"}):
        chosen = held_out(records + again, **by)
        assert {p for p in chosen if p == p.lower()} == {p.lower().strip() for p in chosen if p != p.lower()}


def label_shares(records, **by):
    chosen, counts, held = held_out(records, **by), Counter(), Counter()
    for r in records:
        counts[r["label"]] += 1
        held[r["label"]] += r["prompt"] in chosen
    return {label: (held[label] / n, n) for label, n in counts.items()}


def test_stratified_within_one_percent():
    """20,000 rows: every label within 1%. The hash alone misses it for the rare ones."""
    labels, weights = [*"abcdef"], [60, 20, 12, 5, 2, 1]
    records = rows(20_000, labels=labels, weights=weights)
    for share, n in label_shares(records, stratify_by="label").values():
        assert abs(share - 0.1) <= max(0.005, 1 / n) + 1e-9
    alone = label_shares(records)
    assert all(abs(s - 0.1) < 4 * np.sqrt(0.09 / n) for s, n in alone.values())
    assert max(abs(s - 0.1) for s, _ in alone.values()) > 0.01


def test_stratified_small_labels_get_their_row():
    records = rows(300, weights=(85, 10, 5))
    for share, n in label_shares(records, share=0.2, stratify_by="label").values():
        assert abs(share * n - 0.2 * n) <= max(1, 0.005 * n) + 1e-9


def test_stratified_appended_rows_move_none():
    records = rows(3000)
    before = held_out(records, stratify_by="label")
    after = held_out(records + rows(1000, seed=3), stratify_by="label")
    assert after & {r["prompt"] for r in records} == before and len(after) > len(before)


def test_no_group_crosses():
    records = rows(4000, groups=200)
    for by in ({"group_by": "group"}, {"group_by": "group", "stratify_by": "label"}):
        chosen = held_out(records, **by)
        sides = defaultdict(set)
        for r in records:
            sides[r["group"]].add(r["prompt"] in chosen)
        assert all(len(s) == 1 for s in sides.values()) and len(sides) == 200
        assert 0.05 < len(chosen) / 4000 < 0.15


def test_fields_are_found_by_the_users_names():
    records = [{"q": f"number {i}", "a": "x"} for i in range(100)]
    form = dict(fields=dict(prompt="q", completion="a"))
    train, validation = split(Records(records), 0.2, form=form)
    expected = [i for i in range(100) if fraction(f"number {i}") < 0.2]
    assert validation.rows.tolist() == expected and len(train) == 100 - len(expected)


def test_errors():
    records = Records(rows(20))
    for share in (-0.1, 1.0, 2):
        with pytest.raises(DataError, match="data.split.share=.*: expected a share between 0"):
            split(records, share)
    with pytest.raises(DataError, match=r"r:1: field 'author' is missing; .*'prompt', 'comple.* set data.split.gr"):
        split(records, 0.1, group_by="author")
    with pytest.raises(DataError, match="of 20 rows with 1 different groups (all|none) fall to"):
        split(records, 0.5, group_by="group")
    with pytest.raises(DataError, match="r:2: .*no known form"):
        split(Records([{"prompt": "a", "completion": "b"}, {"x": 1}]), 0.5)


def test_a_subset_is_a_source():
    records = Records(rows(10))
    subset = Subset(Subset(records, [2, 4, 6, 8]), [3, 0])
    assert len(subset) == 2 and subset[0] is records[8] and subset.where(1) == "r:3"
    assert list(subset) == [records[8], records[2]]
    prints = {Subset(records, i).fingerprint() for i in ([2, 4], [4, 2], [2], [2, 4])}
    assert len(prints) == 3
    with pytest.raises(IndexError):
        subset[2]
