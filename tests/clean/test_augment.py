"""Variants of rows: reproducible, and of prompts only."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
from test_chat import TOKENIZER

from sftjax.data import encode, open_source
from sftjax.data.masking.conversation import canonical, to_conversation
from sftjax.files import load_python

SCRIPT = Path(__file__).resolve().parents[2] / "experiments" / "augment" / "augment.py"
augment = load_python(str(SCRIPT), "the script")
AUGMENTATIONS, TEMPLATES = augment.AUGMENTATIONS, augment.TEMPLATES

LONG = "tell me one two three four five six seven eight nine ten eleven twelve words about the sea"
CHAT = [
    {"role": "system", "content": "Be brief and kind to all of those who ask."},
    {"role": "user", "content": LONG},
    {"role": "assistant", "content": "one two three four five six seven eight nine ten"},
    {"role": "user", "content": LONG + " again"},
    {"role": "assistant", "content": "two three four five six seven eight nine ten eleven"},
]
RECORDS = [
    {"prompt": LONG, "completion": "one two three four five six seven eight"},
    {"messages": CHAT, "tools": [{"type": "function", "function": {"name": "f"}}]},
    {"instruction": LONG, "input": "and more of it", "output": "fine"},
    {"text": "one two three four five six seven eight nine ten eleven twelve"},
    {"segments": [{"text": LONG, "train": False}, {"text": "one two", "weight": 0.5}]},
]
FORMS = ["pair", "chat", "instruction", "text", "segments"]


def source(tmp_path, records=RECORDS):
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return open_source(str(path))


def answers(record):
    messages = to_conversation(record)["messages"]
    return [m for m in messages if m["role"] != "user"]


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("record", RECORDS, ids=FORMS)
def test_answers_stay_and_nothing_is_changed_in_place(name, record):
    record = canonical(record)
    before, changed = copy.deepcopy(record), 0
    for seed in range(20):
        new = AUGMENTATIONS[name](record, np.random.default_rng(seed))
        assert record == before and answers(new) == answers(record)
        assert new == AUGMENTATIONS[name](record, np.random.default_rng(seed))
        changed += new != record
    assert changed == 0 if {"text", "segments"} & set(record) else changed >= 10


def test_token_dropout_drops_a_tenth_and_never_all():
    text = "word " * 2000
    out = AUGMENTATIONS["token_dropout"]({"prompt": text, "completion": "x"}, np.random.default_rng(0))
    assert 0.08 < 1 - len(out["prompt"].split()) / 2000 < 0.12
    for seed in range(50):
        record = {"prompt": "one", "completion": "x"}
        assert AUGMENTATIONS["token_dropout"](record, np.random.default_rng(seed)) == record


def test_paraphrase_template_wraps_the_last_prompt():
    for seed in range(10):
        new = AUGMENTATIONS["paraphrase_template"]({"messages": CHAT}, np.random.default_rng(seed))
        assert new["messages"][1] == CHAT[1]
        assert new["messages"][3]["content"] in [t.format(LONG + " again") for t in TEMPLATES]


@pytest.mark.parametrize("record", RECORDS, ids=FORMS)
def test_the_canonical_form_encodes_alike(record):
    a, b = encode(record, TOKENIZER), encode(canonical(record), TOKENIZER)
    np.testing.assert_array_equal(a.tokens, b.tokens)
    np.testing.assert_array_equal(a.weights, b.weights)


def test_the_canonical_form_has_the_fields_and_the_system_message():
    record = {"q": "a", "a": "b", "prompt": "another"}
    form = dict(fields=dict(prompt="q", completion="a"), system="S", template_kwargs={"x": 1})
    new = canonical(record, "", form)
    options = {"chat_template_kwargs": {"x": 1}}
    assert new == {"prompt": "a", "completion": "b", "system": "S"} | options
    read, given = to_conversation(new), to_conversation(record, **form)
    assert all(read[key] == given[key] for key in ("messages", "tools", "options", "kind"))


def test_variants_are_a_function_of_seed_copy_and_row(tmp_path):
    data, names = source(tmp_path), ["token_dropout"]
    three = list(augment.variants(data, names, 3, 5))
    assert len(three) == 15 and three == list(augment.variants(data, names, 3, 5))
    assert list(augment.variants(data, names, 1, 5)) == three[:5]  # more copies change no first
    other = list(augment.variants(data, names, 3, 6))
    assert len({json.dumps(s[i]) for s in (three, other) for i in (0, 5, 10)}) == 6


def test_names_are_applied_in_order(tmp_path):
    both = list(augment.variants(source(tmp_path), ["token_dropout", "paraphrase_template"], 50, 0))
    begins = {t[: t.index("{")] for t in TEMPLATES if t != "{}"}
    prompts = [both[i]["prompt"] for i in range(0, len(both), 5)]
    assert all(any(p.startswith(b) for p in prompts) for b in begins)  # no word of these dropped


def test_a_file_of_variants_trains_the_same_answers(tmp_path):
    path = source(tmp_path, RECORDS[:2]).readers[0].path
    augment.main(str(path), str(tmp_path / "out.jsonl"), "token_dropout,paraphrase_template", "4")
    rows = open_source(str(tmp_path / "out.jsonl"))
    assert len(rows) == 8
    for i in range(8):
        a, b = encode(RECORDS[i % 2], TOKENIZER), encode(rows[i], TOKENIZER)
        np.testing.assert_array_equal(a.tokens[a.weights > 0], b.tokens[b.weights > 0])
    with pytest.raises(FileExistsError):
        augment.main(str(path), str(tmp_path / "out.jsonl"), "token_dropout")
    with pytest.raises(ValueError, match="'flip' is unknown; known: token_dropout, para"):
        list(augment.variants(rows, ["flip"], 1, 0))
