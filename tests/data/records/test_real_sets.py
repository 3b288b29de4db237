"""Real data sets, each with the lines of config that its user writes.

What is to be trained is worked out anew from the raw files, by each set's own format.
"""

import json
import re

import pytest
from transformers import AutoTokenizer

from sftjax import config as config_lib
from sftjax.data import open_source
from sftjax.data.masking.encode import encode_batch
from sftjax.tasks.causal_lm import policy as policy_of

pytestmark = pytest.mark.fixtures
END = "<|im_end|>"


@pytest.fixture(scope="module")
def tokenizer(fixtures):
    return AutoTokenizer.from_pretrained(fixtures / "tokenizer-qwen")


def trained(tokenizer, spec, rows, *lines):
    """The trained spans of each of the first rows, read with these lines of config."""
    config = config_lib.get_default()
    for line in lines:
        config_lib.override(config, *line.split("=", 1))
    source, policy = open_source(spec, config.data.limit), policy_of(config.data)
    n = min(rows, len(source))
    wheres = [source.where(i) for i in range(n)]
    examples = encode_batch(source[:n], wheres, tokenizer, **policy)
    for e in examples:
        spans = "".join(e.text[a:b] for a, b in e.spans)
        assert tokenizer.decode(e.tokens) == e.text
        assert tokenizer.decode(e.tokens[e.weights > 0]) == spans
    return [[e.text[a:b] for a, b in e.spans] for e in examples]


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def call(name, arguments):
    """As this tokenizer's template writes a tool call."""
    content = json.dumps(dict(name=name, arguments=arguments), ensure_ascii=False)
    return f"<tool_call>\n{content}\n</tool_call>"


def test_glaive_toolcall(fixtures, tokenizer):
    """sharegpt with calls and observations; found by its usual names."""
    path = fixtures / "glaive-toolcall" / "glaive_toolcall_en_demo.json"
    raw = json.loads(path.read_text())[:120]
    found = trained(tokenizer, str(path), 120)
    assert sum(t["from"] == "function_call" for row in raw for t in row["conversations"]) > 50
    for row, spans in zip(raw, found, strict=True):
        expected = []
        for turn in row["conversations"]:
            if turn["from"] == "gpt":
                expected.append(turn["value"].strip() + END)
            elif turn["from"] == "function_call":
                expected.append(call(**json.loads(turn["value"])) + END)
        assert [span.strip() for span in spans] == expected


def test_reason_tool_use(fixtures, tokenizer):
    """Messages of typed parts: reasoning, text, calls; the template drops reasoning of history."""
    path = fixtures / "reason-tool-use" / "reason_tool_use_demo_50.jsonl"
    for row, spans in zip(lines_of(path), trained(tokenizer, str(path), 40), strict=True):
        roles = [m["role"] for m in row["messages"]]
        last_user = max(i for i, role in enumerate(roles) if role == "user")
        expected = []
        for i, message in enumerate(row["messages"]):
            if message["role"] == "assistant":
                parts = {"reasoning": [], "text": [], "tool_call": []}
                for part in message["content"]:
                    parts[part["type"]].append(part["value"])
                calls = [call(**json.loads(value)) for value in parts["tool_call"]]
                thought = f"<think>\n{''.join(parts['reasoning'])}\n</think>\n\n"
                said = "".join(parts["text"]).lstrip("\n") + "\n".join(calls)
                expected.append((thought if i > last_user else "") + said + END)
        assert spans == expected


def test_oasst(fixtures, tokenizer):
    """Trees of replies, of which the best ranked are followed."""
    path = fixtures / "oasst-en-100" / "en_100_tree.jsonl"
    lines = "data.fields.messages=prompt", "data.fields.content=text"
    found = trained(tokenizer, str(path), 80, *lines)
    for tree, spans in zip(lines_of(path), found, strict=True):
        expected, node = [], tree["prompt"]
        while node["replies"]:
            ranked = [r for r in node["replies"] if r.get("rank") is not None]
            node = sorted(ranked, key=lambda r: r["rank"])[0] if ranked else node["replies"][0]
            if node["role"] == "assistant":
                expected.append(node["text"].strip() + END)
        assert [re.sub(rf"\s*{re.escape(END)}$", END, s.strip()) for s in spans] == expected


@pytest.mark.parametrize("name", ["seed_tasks", "user_oriented_instructions"])
def test_self_instruct(fixtures, tokenizer, name):
    """A record for each instance of a task; instruction, input and output are known names."""
    path = fixtures / "self-instruct" / f"{name}.jsonl"
    found = trained(tokenizer, f"{path}#instances", 200)
    raw = [(task, instance) for task in lines_of(path) for instance in task["instances"]]
    assert len(found) == len(raw[:200])
    for (_, instance), spans in zip(raw, found, strict=False):
        assert [span.lstrip("\n") for span in spans] == [instance["output"].lstrip("\n") + END]


def test_self_instruct_prompts(fixtures, tokenizer):
    path = fixtures / "self-instruct" / "seed_tasks.jsonl"
    source = open_source(f"{path}#instances")
    assert source.where(3) == f"{path}:4#instances.0"
    [example] = encode_batch([source[3]], [""], tokenizer)
    task = lines_of(path)[3]
    prompt = f"{task['instruction']}\n\n{task['instances'][0]['input']}"
    assert example.text.startswith(f"<|im_start|>user\n{prompt}{END}\n")


def test_schema_guided_dialogue(fixtures, tokenizer):
    """Its own names for turns, roles and texts."""
    folder = fixtures / "sgd" / "train"
    lines = (
        "data.fields.messages=turns",
        "data.fields.role=speaker",
        "data.fields.content=utterance",
        "data.roles=USER=user,SYSTEM=assistant",
    )
    found = trained(tokenizer, f"{folder}/dialogues_*.json", 150, *lines)
    raw = json.loads((folder / "dialogues_001.json").read_text())
    raw += json.loads((folder / "dialogues_002.json").read_text())
    for dialogue, spans in zip(raw, found, strict=False):
        said = [t["utterance"] for t in dialogue["turns"] if t["speaker"] == "SYSTEM"]
        assert spans == [text + END for text in said]
    assert len(found) == 150


@pytest.mark.parametrize("name", ["simple_python", "multiple", "parallel"])
def test_bfcl(fixtures, tokenizer, tmp_path, name):
    """Questions and answers lie in two files: they are joined first, the rest is a field map."""
    file = f"BFCL_v4_{name}.json"
    answers = {r["id"]: r for r in lines_of(fixtures / "bfcl" / "possible_answer" / file)}
    rows = lines_of(fixtures / "bfcl" / file)[:100]
    for row in rows:
        calls = []
        for function in answers[row["id"]]["ground_truth"]:
            [(called, possible)] = function.items()
            arguments = {k: values[0] for k, values in possible.items() if values[0] != ""}
            calls.append(dict(name=called, arguments=json.dumps(arguments)))
        row["answer"] = [dict(role="assistant", tool_calls=calls)]
    (tmp_path / "joined.jsonl").write_text("\n".join(map(json.dumps, rows)))
    lines = (
        "data.fields.prompt=question.0",
        "data.fields.completion=answer",
        "data.fields.tools=function",
    )
    found = trained(tokenizer, str(tmp_path / "joined.jsonl"), 100, *lines)
    for row, spans in zip(rows, found, strict=True):
        calls = [call(c["name"], json.loads(c["arguments"])) for c in row["answer"][0]["tool_calls"]]
        assert spans == ["\n".join(calls) + END]
    [example] = encode_batch(
        rows[:1], [""], tokenizer, fields=dict(prompt="question.0", completion="answer",
                                               tools="function"),
    )  # fmt: skip
    wrapped = dict(type="function", function=rows[0]["function"][0])
    assert json.dumps(wrapped) in example.text


@pytest.mark.parametrize("queries", ["general_query_list", "specific_query_list"])
def test_qmsum(fixtures, tokenizer, queries):
    """A record for each query, with the whole meeting before it."""
    path = fixtures / "qmsum" / "val.jsonl"
    lines = (
        "data.fields.prompt={meeting_transcripts.*.content}\n\n{query}",
        "data.fields.completion=answer",
        "data.limit=12",
    )
    found = trained(tokenizer, f"{path}#{queries}", 50, *lines)
    raw = [(m, query) for m in lines_of(path) for query in m[queries]][:12]
    assert found == [[query["answer"].strip("\n") + END] for _, query in raw]
    source = open_source(f"{path}#{queries}")
    policy = dict(fields=dict(prompt="{meeting_transcripts.*.content}\n\n{query}",
                              completion="answer"))  # fmt: skip
    [example] = encode_batch([source[0]], [""], tokenizer, **policy)
    meeting = "\n".join(turn["content"] for turn in raw[0][0]["meeting_transcripts"])
    assert f"{meeting}\n\n{raw[0][1]['query']}{END}" in example.text


@pytest.mark.parametrize("language", ["en", "de"])
def test_xquad(fixtures, tokenizer, language):
    """A record for each question, with the article's paragraph that it is about."""
    path = fixtures / "xquad" / f"xquad.{language}.json"
    lines = (
        "data.fields.prompt={context}\n\n{question}",
        "data.fields.completion=answers.0.text",
    )
    spec = f"{path}#paragraphs.qas"
    raw = [
        (paragraph["context"], qa)
        for article in json.loads(path.read_text(encoding="utf-8"))["data"]
        for paragraph in article["paragraphs"]
        for qa in paragraph["qas"]
    ]
    source = open_source(spec)
    assert len(source) == len(raw) > 900
    assert [(r["context"], r["id"]) for r in source] == [(c, qa["id"]) for c, qa in raw]
    found = trained(tokenizer, spec, 100, *lines)
    assert found == [[qa["answers"][0]["text"] + END] for _, qa in raw[:100]]
