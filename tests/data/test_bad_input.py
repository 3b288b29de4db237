"""Malformed files and rows, and the message for each: what is wrong, where, and what to do."""

import io
import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_chat import PLAIN, TOKENIZER, make_tokenizer

from sftjax.clean.split import split
from sftjax.data import DataError, build_store, open_source
from sftjax.tasks.causal_lm import CausalLM

GOOD = {"prompt": "what is two plus two?", "completion": "four"}
USER = {"role": "user", "content": "what is two?"}
ANSWER = {"role": "assistant", "content": "four"}
NO_FORM = "no known form in the fields"
TEXT = "expected text (or a list of text parts)"
HIGH = "\ud800"  # half of a surrogate pair


def chat(*messages, **more):
    return {"messages": list(messages), **more}


def answer(**more):
    return chat(USER, ANSWER | more)


def calls(tool_calls):
    return chat(USER, {"role": "assistant", "content": "", "tool_calls": tool_calls})


def parquet(rows):
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


# The bytes of a line, or a record -> what the message says after file and line.
ROWS = [
    # --- lines that hold no record ---
    (b'{"prompt": "a"', "malformed JSON at column 15: Expecting ',' delimiter, near"),
    (b'{"prompt": "a",}', "malformed JSON at column 1"),  # 15 or 16, by the version of Python
    (b"{'prompt': 'a'}", "malformed JSON at column 2: Expecting property name enclosed in double"),
    (b'{"prompt": "a\x00"}', "malformed JSON at column 14: Invalid control character"),
    (b'{"prompt": "a\\q"}', "malformed JSON at column 14: Invalid \\escape"),
    (b'{"prompt": True}', "malformed JSON at column 12: Expecting value"),
    (b'{"a": 1} {"b": 2}', "malformed JSON at column 10: Extra data"),
    (b"what is two?", "malformed JSON at column 1: Expecting value, near 'what is two?'"),
    (b'{"prompt": "\xff"}', "not UTF-8 at byte 12; save the file as UTF-8"),
    ("{}".encode("utf-16"), "not UTF-8 at byte 0; save the file as UTF-8"),
    (b"[" * 100_000, "JSON that can't be read: maximum recursion depth exceeded"),
    (b'{"n": ' + b"1" * 5000 + b"}", "JSON that can't be read: Exceeds the limit (4300 digits)"),
    (b"[1, 2]", "the row is '[1, 2]' (list), expected an object such as {"),
    (b'"what"', "the row is 'what' (str), expected an object such as {"),
    (b"3", "the row is '3' (int), expected an object such as {"),
    (b"null", "the row is 'null' (NoneType), expected an object such as {"),
    # --- no known form ---
    ({}, f"{NO_FORM} (none); expected messages (or conversations) | prompt + completion"),
    ({"question": "a", "answer": "b"}, f"{NO_FORM} 'question', 'answer'; expected messages"),
    ({"Prompt": "a", "Completion": "b"}, "; say which are which: data.fields.prompt=NAME"),
    ({"text": None}, f"{NO_FORM} 'text'; expected"),
    # --- prompt and completion ---
    ({"prompt": "a"}, "field 'completion' is missing; the row has 'prompt'; set data.fields.*"),
    ({"completion": "a"}, "field 'prompt' is missing; the row has 'completion'"),
    ({"prompt": "a", "completion": None}, "field 'completion' is null; the row has"),
    ({"prompt": "a", "completion": ""}, "empty response: 'completion' is ''; fill it or drop"),
    ({"prompt": "a", "completion": " \n"}, r"empty response: 'completion' is ' \n'; fill it"),
    ({"prompt": "a", "completion": 3}, "'completion' is 3 (int), expected text or a list of"),
    ({"prompt": 3, "completion": "a"}, "'prompt' is 3 (int), expected text or a list of mess"),
    ({"prompt": "a", "completion": {"b": 1}}, "'completion' is {'b': 1} (dict), expected text"),
    ({"prompt": [3], "completion": "a"}, "message 1: 'the message' is 3 (int), expected an obj"),
    ({"prompt": [], "completion": "a"}, "roles out of order: message 1 is 'assistant' first"),
    ({"prompt": [USER], "completion": []}, "roles out of order: the last message is 'user'"),
    ({"prompt": "a", "completion": HIGH}, r"half of a surrogate pair, '\ud800', is no character"),
    # --- messages ---
    (chat(), "'messages' is [] (list), expected a list of messages, not empty"),
    ({"messages": 3}, "'messages' is 3 (int), expected a list of messages"),
    ({"messages": {"role": "user"}}, "'messages' is {'role': 'user'} (dict), expected a list of"),
    ({"messages": "hello"}, "'messages' is not valid JSON: Expecting value"),
    ({"messages": "[" * 100_000}, "'messages' is not valid JSON: maximum recursion depth"),
    (chat("hello"), "message 1: 'the message' is 'hello' (str), expected an object"),
    (chat(None), "message 1: 'the message' is None (NoneType), expected an object"),
    (chat({"content": "a"}), "message 1: unknown role None; known roles: system"),
    (chat({"role": "alien", "content": "a"}), "unknown role 'alien'; known roles: system, dev"),
    (chat({"role": "alien", "content": "a"}), "map yours with data.roles=NAME=user"),
    (chat({"role": 3, "content": "a"}), "message 1: unknown role 3"),
    (chat({"role": ["user"], "content": "a"}), "message 1: unknown role ['user']"),
    (chat({"role": "user"}, ANSWER), f"message 1: 'content' is None (NoneType), {TEXT}"),
    (chat({"role": "user", "content": 3}, ANSWER), f"'content' is 3 (int), {TEXT}"),
    (chat({"role": "user", "content": {"a": 1}}, ANSWER), "'content' is {'a': 1} (dict), expected"),
    (chat({"role": "user", "content": [["a"]]}, ANSWER), f"'content' is [['a']] (list), {TEXT}"),
    (chat({"role": "user", "content": [{"type": "image"}]}, ANSWER), "'content' is [{'type': 'im"),
    (chat(USER, {"role": "assistant"}), f"message 2: 'content' is None (NoneType), {TEXT}"),
    (chat(USER, {"role": "assistant", "content": ""}), "message 2: empty response: content is ''"),
    (chat(USER, {"role": "assistant", "content": "\t"}), "message 2: empty response: content is"),
    (chat(USER), "roles out of order: the last message is 'user', expected 'assistant'"),
    (chat(USER, ANSWER, USER), "there is no answer to train on; drop the last message or the row"),
    (chat(USER, USER, ANSWER), "message 2 is 'user' after 'user', where assistant is expected"),
    (chat(USER, ANSWER, ANSWER), "message 3 is 'assistant' after 'assistant', where user or tool"),
    (chat(ANSWER), "roles out of order: message 1 is 'assistant' first, where system or developer"),
    (chat(USER, {"role": "system", "content": "s"}, ANSWER), "message 2 is 'system' after 'user'"),
    (chat({"role": "tool", "content": "s"}, ANSWER), "message 1 is 'tool' first"),
    ({"conversations": [{"from": "human", "value": "a"}]}, "the last message is 'user'"),
    ({"conversations": [{"from": "robot", "value": "a"}]}, "message 1: unknown role 'robot'"),
    ({"conversations": [USER, {"from": "gpt"}]}, "message 2: 'content' is None (NoneType), "),
    ({"messages": USER | {"replies": [3]}}, "roles out of order: the last message is 'user'"),
    ({"messages": {"replies": []}}, "message 1: unknown role None"),
    ({"messages": {"role": ["a"], "replies": [{"role": ["a"]}]}}, "message 1: unknown role ['a']"),
    # --- what is trained, tools, options ---
    (answer(train="yes"), "message 2: train='yes', expected a bool"),
    (answer(weight=-1), "message 2: weight=-1, expected a number"),
    (answer(weight="1"), "message 2: weight='1', expected a number"),
    (answer(weight=math.nan), "message 2: weight=nan, expected a number"),
    (answer(weight=math.inf), "message 2: weight=inf, expected a number"),
    (calls(3), "message 2: 'tool_calls' is 3 (int), expected a list, or JSON text of one"),
    (calls([3]), "message 2: 'tool call' is 3 (int), expected an object {\"name\": ..., \"arg"),
    (calls([{"arguments": {}}]), "message 2: 'tool call' is {'arguments': {}} (dict), expected an"),
    (calls("[{"), "message 2: 'tool_calls' is not valid JSON: Expecting property name"),
    (calls([{"name": "f", "arguments": "{"}]), "message 2: f: 'arguments' is not valid JSON"),
    (calls([{"name": "f", "arguments": [1]}]), "'arguments' is [1] (list), expected an object or"),
    (calls([{"name": "f", "arguments": {}}]), "the trained turns can't be found in what the chat "
        "template made of them: it leaves out the tool call of message 2"),
    (answer(reasoning_content="so"), "it leaves out the reasoning of message 2"),
    (chat(USER, ANSWER, tools="[{"), "'tools' is not valid JSON: Expecting property name"),
    (chat(USER, ANSWER, tools=3), "'tools' is 3 (int), expected a list, or JSON text of one"),
    (chat(USER, ANSWER, tools=[3]), "'tools' is 3 (int), expected an object that describes a func"),
    (chat(USER, ANSWER, chat_template_kwargs="{"), "'chat_template_kwargs' is not valid JSON"),
    (chat(USER, ANSWER, chat_template_kwargs=[1]), "'chat_template_kwargs' is [1] (list), expec"),
    (chat(USER, ANSWER, chat_template_kwargs={"messages": 1}), "the chat template failed: TypeErr"),
    (chat(USER, ANSWER, system=3), "'system' is 3 (int), expected text"),
    # --- instruction, segments, text ---
    ({"instruction": "a"}, "field 'output' is missing; the row has 'instruction'"),
    ({"instruction": 3, "output": "b"}, "'instruction' is 3 (int), expected text"),
    ({"instruction": "a", "output": ""}, "empty response: 'output' is ''"),
    ({"instruction": "a", "output": ["b"]}, "'output' is ['b'] (list), expected text"),
    ({"instruction": "a", "output": "b", "input": 3}, "'input' is 3 (int), expected text"),
    ({"instruction": "a", "output": "b", "history": 3}, "'history' is 3 (int), expected pairs"),
    ({"instruction": "a", "output": "b", "history": [["c"]]}, "'history' is ['c'] (list), expect"),
    ({"segments": []}, "'segments' is [] (list), expected a list, not empty"),
    ({"segments": [3]}, "segment 1: 'the segment' is 3 (int), expected an object"),
    ({"segments": [{"text": "a"}]}, 'segment 1: it says neither "train" (true, false) nor "weig'),
    ({"segments": [{"train": True}]}, "segment 1: 'text' is None (NoneType), expected text"),
    ({"text": ""}, "empty text: 'text' is ''; fill it or drop the row"),
    ({"text": 3}, "'text' is 3 (int), expected text"),
    ({"text": ["a"]}, "'text' is ['a'] (list), expected text"),
]  # fmt: skip

# Name and bytes of a file -> what the message says after the path.
FILES = [
    ("d.jsonl", b"", ": the file is empty"),
    ("d.jsonl", b"\n \n\t\n", ": the file holds no row"),
    ("d.jsonl", b'{"prompt": "a"}\r{"prompt": "b"}', ":1: malformed JSON at column 17: Extra data"),
    ("d.jsonl", b"\x1f\x8b\x08\x00\n", ":1: not UTF-8 at byte 1; save the file as UTF-8"),
    ("d.txt", b"a", ": unknown kind of file '.txt'; known: .jsonl, .ndjson, .json, .parquet"),
    ("d", b"a", ": unknown kind of file ''; known: .jsonl"),
    ("d.json", b"[]", ": the file holds no row"),
    ("d.json", b"3", ": expected a list of objects, or an object with one list such as"),
    ("d.json", b'{"a": [], "b": []}', ": expected a list of objects, or an object with one list"),
    ("d.json", b'[{"a": 1}', ":1: malformed JSON at column 10: Expecting ',' delimiter"),
    ("d.json", b'[{"a": 1},]', ":1: malformed JSON at column 1"),
    ("d.json", b'[{"a": 1},\n}', ":2: malformed JSON at column 1: Expecting value"),
    ("d.json", b"[1]", ":1: the row is '1' (int), expected an object such as"),
    ("d.json", b"\xff", ": not UTF-8 at byte 0; save the file as UTF-8"),
    ("d.json", b"[" * 100_000, ": JSON that can't be read: maximum recursion depth exceeded"),
    ("d.json", b'{"a": 1}\n{"b": ', ":2: malformed JSON at column 7: Expecting value"),
    ("d.parquet", b"PAR1", ": not a readable Parquet file: "),
    ("d.parquet", parquet([GOOD])[:-9], ": not a readable Parquet file: "),
    ("d.parquet", parquet([GOOD])[:40] + bytes(60) + parquet([GOOD])[100:], ": not a readable Par"),
    ("d.parquet", parquet([{"prompt": b"a", "completion": "b"}]), ":1: 'prompt' is b'a' (bytes), "),
    ("d.parquet", parquet([{"prompt": "a", "completion": None}]), ":1: field 'completion' is null"),
    ("d.csv", b"prompt,completion\n", ": the file holds no row"),
    ("d.csv", b"prompt,completion\na\n", ":2: 1 fields, but the header has 2 (prompt, completion)"),
    ("d.csv", b"prompt,completion\na,b\nc,d,e\n", ":3: 3 fields, but the header has 2"),
    ("d.csv", b'prompt,completion\n"a,b\n', ":2: malformed: unexpected end of data"),
    ("d.csv", b'prompt,completion\na,"b"c\n', ":2: malformed: ',' expected after '\"'"),
    ("d.csv", b"prompt,completion\n\xff,b\n", ": not UTF-8 at byte 18"),
    ("d.csv", b"prompt,prompt\na,b\n", ":1: the header names a column twice: ['prompt', 'prompt']"),
    ("d.csv", b"prompt,completion\na,\n", ":2: empty response: 'completion' is ''"),
    ("d.csv", b"prompt;completion\na;b\n", ":2: no known form in the fields 'prompt;completion'"),
    ("d.tsv", b"prompt\tcompletion\na\n", ":2: 1 fields, but the header has 2"),
]  # fmt: skip

# Record, tokenizer, policy -> the message. A setting that is wrong is the fault of no row.
SETTINGS = [
    (GOOD, TOKENIZER, dict(stop_token="eos"), "data.stop_token='eos': expected turn | all | last"),
    (GOOD, TOKENIZER, dict(train_on="robot"), "data.train_on='robot': unknown role 'robot'"),
    (GOOD, TOKENIZER, dict(fields={"question": "q"}), "data.fields has no 'question'; it has"),
    (GOOD, TOKENIZER, dict(template="no.jinja"), "data.template='no.jinja': no such file"),
    (GOOD, TOKENIZER, dict(fields={"prompt": "q"}), "{at}field 'q' is missing; the row has"),
    (chat(USER, ANSWER), PLAIN, {}, "{at}a chat, but the tokenizer has no chat template"),
    (GOOD, PLAIN, dict(system="s"), "{at}a system message needs a chat template"),
    ({"text": "a"}, TOKENIZER, dict(system="s"), "{at}a system message is set, but plain text is"),
    (GOOD, make_tokenizer("{{ x.y }}"), {}, "{at}the chat template failed: UndefinedError"),
    (GOOD, make_tokenizer("{{ raise_exception('no') }}"), {}, "{at}the chat template failed: Tem"),
    (GOOD, make_tokenizer("{% for"), {}, "{at}the chat template failed: TemplateSyntaxError"),
    (GOOD, make_tokenizer("hello"), {}, "{at}the trained turns can't be found in what the chat te"),
    (GOOD, make_tokenizer("<s><s>{{ messages[1].content }}"), {}, "{at}the text begins with '<s>"),
]  # fmt: skip


def line(row):
    return row if isinstance(row, bytes) else json.dumps(row).encode()


def build(path, tokenizer=TOKENIZER, policy=None, **settings):
    cache = path.parent / "cache"
    return build_store(
        open_source(path), CausalLM(tokenizer, policy), 64, "drop", cache, **settings
    )  # fmt: skip


def refused(path, *args, **settings):
    with pytest.raises(DataError) as error:
        build(path, *args, **settings)
    cache = path.parent / "cache"
    assert not cache.exists() or not list(cache.iterdir())  # nothing is left behind
    return str(error.value)


@pytest.mark.parametrize("row, message", ROWS, ids=lambda x: str(x)[:40])
def test_a_bad_row(tmp_path, row, message):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"\n".join([line(GOOD), line(row), line(GOOD)]))
    found = refused(path)
    assert found.startswith(f"{path}:2: ") and message in found
    assert len(found) < 1000


@pytest.mark.parametrize("name, data, message", FILES, ids=lambda x: str(x)[:40])
def test_a_bad_file(tmp_path, name, data, message):
    path = tmp_path / name
    path.write_bytes(data)
    assert refused(path).startswith(f"{path}{message}")


@pytest.mark.parametrize("record, tokenizer, policy, message", SETTINGS, ids=lambda x: str(x)[:40])
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_bad_setting(tmp_path, record, tokenizer, policy, message, on_error):
    path = tmp_path / "d.jsonl"
    path.write_bytes(line(record))
    if on_error == "skip" and message.startswith("{at}"):
        message = "1 of 1 rows can't be used, more than data.max_skipped=0.5 allows (1 "
        with pytest.raises(DataError, match="^" + message.replace("(", r"\(")):
            build(path, tokenizer, policy, on_error="skip", max_skipped=0.5)
    else:
        found = refused(path, tokenizer, policy, on_error=on_error)
        assert found.startswith(message.replace("{at}", f"{path}:1: "))


def test_paths(tmp_path):
    for spec in (tmp_path / "no.jsonl", tmp_path / "*.jsonl"):
        with pytest.raises(DataError, match="no such file; check data.train and data.validation"):
            open_source(spec)
    with pytest.raises(DataError, match="no data file in this folder"):
        open_source(tmp_path)
    with pytest.raises(DataError, match="no data file is named; set data.train=FILE"):
        open_source(" , ")


# --- on_error="skip" ---


def test_bad_rows_are_skipped_and_listed(tmp_path):
    path, good = tmp_path / "d.jsonl", tmp_path / "good.jsonl"
    good.write_bytes(b"\n".join([line(GOOD)] * (len(ROWS) + 1)))
    path.write_bytes(b"\n".join([line(GOOD), *(line(r) + b"\n" + line(GOOD) for r, _ in ROWS)]))
    store = build(path, on_error="skip", max_skipped=0.5)
    np.testing.assert_array_equal(store.tokens, build(good).tokens)
    rejects = [json.loads(text) for text in (store.folder / "rejects.jsonl").open()]
    assert len(rejects) == len(ROWS) == sum(store.report["skipped"].values())
    for n, (reject, (row, message)) in enumerate(zip(rejects, ROWS, strict=True)):
        assert (reject["row"], reject["file"]) == (2 * n + 2, f"{path}:{2 * n + 2}")
        assert message in reject["reason"]
        if isinstance(row, dict) and HIGH not in str(row):
            assert json.dumps(reject["record"]) == json.dumps(row)
    assert store.report["examples"] == len(ROWS) + 1
    skipped = store.report["skipped"]
    assert skipped["empty response"] == 5 and len(skipped) < len(ROWS) / 2


def test_too_many_bad_rows_end_the_run(tmp_path):
    path = tmp_path / "d.jsonl"
    rows = [GOOD] * 97 + [{"prompt": "a"}, {"prompt": "b", "completion": ""}] + [{"prompt": "c"}]
    path.write_bytes(b"\n".join(map(line, rows)))
    with pytest.raises(DataError) as error:
        build(path, on_error="skip", max_skipped=0.02)
    assert str(error.value).startswith(
        "3 of 100 rows can't be used, more than data.max_skipped=0.02 allows (2 missing field: "
        f"'completion', 1 empty response); the last one was {path}:100: field 'completion' is missing"
    )
    [file] = (tmp_path / "cache").iterdir()
    assert str(file) in str(error.value)
    assert [json.loads(text)["row"] for text in file.open()] == [98, 99, 100]
    store = build(path, on_error="skip", max_skipped=0.03)
    assert len(store) == 97 and store.report["skipped"]["empty response"] == 1
    build(path, on_error="skip", max_skipped=0.05)  # another limit is another store
    assert len([f for f in (tmp_path / "cache").iterdir() if f.is_dir()]) == 2


def test_all_rows_skipped(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(line({}))
    message = "nothing is trained in any of 1 rows (1 no form)"
    assert refused(path, on_error="skip", max_skipped=1.0).startswith(message)


def test_bad_rows_are_on_the_training_side_of_a_split(tmp_path):
    path = tmp_path / "d.jsonl"
    rows = [{"prompt": f"{i}", "completion": "four"} for i in range(40)]
    path.write_bytes(b"\n".join([*map(line, rows), b"{", line({"prompt": "a"})]))
    source = open_source(path)
    with pytest.raises(DataError, match="d.jsonl:41: malformed JSON"):
        split(source, 0.2)
    train, validation = split(source, 0.2, skip=True)
    assert {40, 41} <= set(train.rows) and len(train) + len(validation) == 42
    store = build_store(train, CausalLM(TOKENIZER), 64, "drop", tmp_path / "c", "skip", 0.5)
    assert len(store) == len(train) - 2 == store.report["examples"]
    with pytest.raises(DataError, match="d.jsonl:41: malformed JSON"):  # of no group
        split(source, 0.2, group_by="prompt", skip=True)


def test_settings_are_checked(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(line(GOOD))
    assert "data.on_error='ignore': expected raise | skip" in refused(path, on_error="ignore")
    assert "data.max_skipped=2: expected a share" in refused(path, max_skipped=2)


def test_good_rows_are_still_encoded_together(tmp_path, monkeypatch):
    path = tmp_path / "d.jsonl"
    rows = [GOOD] * 300 + [{"prompt": "a"}] + [GOOD] * 211
    path.write_bytes(b"\n".join(map(line, rows)))
    sizes, examples = [], CausalLM.examples

    def counted(self, *args):
        encoded = examples(self, *args)
        sizes.append(len(encoded))
        return encoded

    monkeypatch.setattr(CausalLM, "examples", counted)
    assert len(build(path, on_error="skip")) == sum(sizes) == 511
    assert len(sizes) == 9  # halves: 2 ** 9 rows, one of them bad
