"""Augmentation: reproducible, of prompts only, never in evaluation."""

import copy
import json

import numpy as np
import pytest
from test_chat import TOKENIZER

from sftjax.clean import augment as augment_lib
from sftjax.clean.augment import AUGMENTATIONS, TEMPLATES, Augmented, canonical
from sftjax.data import DataError, build_store, encode, open_source
from sftjax.data.masking.conversation import to_conversation
from sftjax.tasks.causal_lm import CausalLM

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
    out = AUGMENTATIONS["token_dropout"](
        {"prompt": text, "completion": "x"}, np.random.default_rng(0)
    )
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
    assert to_conversation(new) == to_conversation(record, **form)


def test_variants_are_a_function_of_seed_copy_and_row(tmp_path):
    data = source(tmp_path)
    three = Augmented(data, ("token_dropout",), copies=3, seed=5)
    assert len(three) == 15 and three.where(6) == data.where(1)
    again = Augmented(data, ("token_dropout",), copies=3, seed=5)
    assert [again[i] for i in reversed(range(15))] == list(three)[::-1]
    one = Augmented(data, ("token_dropout",), copies=1, seed=5)
    assert list(one) == list(three)[:5]  # more copies change none of the first
    other = Augmented(data, ("token_dropout",), copies=3, seed=6)
    assert len({json.dumps(s[i]) for s in (three, other) for i in (0, 5, 10)}) == 6
    with pytest.raises(IndexError):
        three[15]


def test_names_are_applied_in_order(tmp_path):
    both = Augmented(source(tmp_path), ("token_dropout", "paraphrase_template"), copies=50)
    begins = {t[: t.index("{")] for t in TEMPLATES if t != "{}"}
    prompts = [both[i]["prompt"] for i in range(0, len(both), 5)]
    assert all(any(p.startswith(b) for p in prompts) for b in begins)  # no word of these dropped


def test_the_token_cache_knows_of_it(tmp_path, monkeypatch):
    data = source(tmp_path)

    def key(names=("token_dropout",), copies=1, seed=0, form=None):
        return Augmented(data, names, copies, seed, form).fingerprint()

    def noise(record, rng):
        return record

    monkeypatch.setitem(AUGMENTATIONS, "noise", noise)
    keys = [key(), key(copies=2), key(seed=1), key(("noise",)), key(("token_dropout", "noise"))]
    keys.append(key(form=dict(system="S")))

    def noise(record, rng):
        return dict(record)

    monkeypatch.setitem(AUGMENTATIONS, "noise", noise)
    keys.append(key(("noise",)))  # other code, though of the same name
    monkeypatch.setattr(augment_lib, "DROPPED", 0.2)
    keys.append(key())
    assert len({*keys, data.fingerprint()}) == len(keys) + 1
    assert key() == keys[-1]


def test_the_answers_are_trained_as_they_stand(tmp_path):
    data = source(tmp_path, RECORDS[:2])
    policy = dict(train_on="assistant", stop_token="turn", fields={}, system="")
    stores = [
        build_store(s, CausalLM(TOKENIZER, policy), 0, "drop", tmp_path / "cache")
        for s in (data, Augmented(data, ("token_dropout", "paraphrase_template"), copies=4))
    ]
    assert len(stores[1]) == 8 and stores[0].folder != stores[1].folder
    for i in range(8):
        (a, v), (b, w) = stores[0][i % 2], stores[1][i]
        np.testing.assert_array_equal(a[v > 0], b[w > 0])
    assert len({tuple(stores[1][i][0]) for i in range(0, 8, 2)}) > 1


def test_errors(tmp_path):
    data = source(tmp_path)
    with pytest.raises(DataError, match="unknown augmentation 'flip'; known: token_dropout, para"):
        Augmented(data, ("token_dropout", "flip"))
    with pytest.raises(DataError, match="augment_copies=0: expected 1 or more"):
        Augmented(data, ("token_dropout",), copies=0)


def test_what_a_row_holds_beside_its_variants_is_counted_once(tmp_path):
    rows = [r | {"topic": "cats"} for r in RECORDS[:2]]
    data = Augmented(source(tmp_path, rows), ("token_dropout",), copies=3)
    store = build_store(data, CausalLM(TOKENIZER), 0, "drop", tmp_path / "cache")
    n, where = store.report["left_out"]["field 'topic' is not read"]
    assert n == 2 and where.endswith(":1")
