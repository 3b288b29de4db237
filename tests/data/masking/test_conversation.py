"""Records of every form to one canonical conversation, and what is said of those that are not."""

import json

import pytest
from test_chat import TOKENIZER, assistant, fails, system, user

from sftjax import config as config_lib
from sftjax.data import DataError, encode
from sftjax.data.masking.conversation import to_conversation
from sftjax.tasks.causal_lm import policy as policy_of

# --- record forms ---


def roles_and_texts(record, **more):
    chat = to_conversation(record, **more)
    return chat["kind"], [(m["role"], m["content"]) for m in chat["messages"]]


PAIR = [("user", "q"), ("assistant", "a")]
FORMS = [
    ({"messages": [user("q"), assistant("a")]}, "chat", PAIR),
    ({"messages": '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]'},
     "chat", PAIR),
    ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
     "chat", PAIR),
    ({"messages": [user([{"type": "text", "text": "q"}]), assistant("a")]}, "chat", PAIR),
    ({"prompt": "q", "completion": "a"}, "pair", PAIR),
    ({"prompt": [user("q")], "completion": [assistant("a")]}, "chat", PAIR),
    ({"prompt": [user("q")], "completion": "a"}, "chat", PAIR),
    ({"instruction": "q", "input": "", "output": "a"}, "chat", PAIR),
    ({"instruction": "q", "input": "i", "output": "a"}, "chat",
     [("user", "q\n\ni"), ("assistant", "a")]),
    ({"instruction": "q", "response": "a"}, "chat", PAIR),
    ({"instruction": "q", "output": "a", "history": [["p", "o"]]}, "chat",
     [("user", "p"), ("assistant", "o"), *PAIR]),
    ({"text": "t"}, "text", [("text", "t")]),
    ({"segments": [{"text": "q", "train": False}, {"content": "a", "weight": 0.5}]}, "segments",
     [("text", "q"), ("text", "a")]),
    ({"messages": None, "prompt": "q", "completion": "a"}, "pair", PAIR),
    ({"prompt": "q", "completion": "a", "system": "s"}, "pair", [("system", "s"), *PAIR]),
]  # fmt: skip


@pytest.mark.parametrize("record, kind, expected", FORMS)
def test_forms(record, kind, expected):
    assert roles_and_texts(record) == (kind, expected)


def test_field_map():
    record = {"question": "q", "answer": "a", "sys": "s", "runs": [{"output": "o"}], "prompt": "x"}
    fields = dict(prompt="question", completion="answer", text="", messages="", system="")
    assert roles_and_texts(record, fields=fields) == ("pair", PAIR)
    _, messages = roles_and_texts(record, fields=fields | {"system": "sys"}, system="default")
    assert messages == [("system", "s"), *PAIR]
    nested = dict(prompt="question", completion="runs.0.output")
    assert roles_and_texts(record, fields=nested)[1][1] == ("assistant", "o")
    assert roles_and_texts({"body": "t"}, fields=dict(text="body")) == ("text", [("text", "t")])
    talk = {"talk": [user("q"), assistant("a")]}
    assert roles_and_texts(talk, fields=dict(messages="talk")) == ("chat", PAIR)


def test_system_default_only_where_there_is_none():
    assert roles_and_texts(FORMS[0][0], system="d")[1] == [("system", "d"), *PAIR]
    own = {"messages": [system("s"), user("q"), assistant("a")]}
    assert roles_and_texts(own, system="d")[1] == [("system", "s"), *PAIR]


M = "messages"
BAD_RECORDS = [
    ({"q": "x"}, "no known form in the fields 'q'; expected messages (or conversations)"),
    ({"question": "x", "answer": "y"}, "data.fields.prompt=NAME data.fields.completion=NAME"),
    ({"prompt": "x"}, "field 'completion' is missing; the row has 'prompt'; set data.fields"),
    ({"prompt": "x", "completion": None}, "field 'completion' is null"),
    ({"completion": "x"}, "field 'prompt' is missing"),
    ({"instruction": "x"}, "field 'output' is missing"),
    ({"prompt": "x", "completion": 3}, "'completion' is 3 (int), expected text or a list"),
    ({"prompt": 3, "completion": "x"}, "'prompt' is 3 (int), expected text or a list"),
    ({"text": ["x"]}, "'text' is ['x'] (list), expected text"),
    ({"text": "x", "system": "s"}, None),
    ({"prompt": "x", "completion": " \n"}, r"empty response: 'completion' is ' \n'"),
    ({"text": " "}, "empty text: 'text' is ' '"),
    ({M: [user("x"), assistant("")]}, "message 2: empty response: content is ''"),
    ({M: []}, "'messages' is [] (list), expected a list of messages, not empty"),
    ({M: "[{"}, "'messages' is not valid JSON"),
    ({M: ["x"]}, "message 1: 'the message' is 'x' (str), expected an object"),
    ({M: [user(3)]}, "message 1: 'content' is 3 (int), expected text"),
    ({M: [user([{"type": "image"}])]}, "message 1: 'content' is [{'type': 'image'}] (list)"),
    ({M: [{"role": "alien", "content": "x"}]}, "message 1: unknown role 'alien'; known roles: sys"),
    ({M: [{"content": "x"}]}, "message 1: unknown role None"),
    ({M: [{"role": ["x"], "content": "x"}]}, "message 1: unknown role ['x']"),
    (
        {M: [user("x"), user("y")]},
        "out of order: message 2 is 'user' after 'user', where assistant",
    ),
    ({M: [assistant("x")]}, "message 1 is 'assistant' first, where system or developer or user"),
    ({M: [user("x"), system("y")]}, "message 2 is 'system' after 'user'"),
    ({M: [user("x")]}, "the last message is 'user', expected 'assistant': there is no answer"),
    ({M: [user("x"), assistant("y", train="no")]}, "message 2: train='no', expected a bool"),
    ({M: [user("x"), assistant("y", weight=-1)]}, "message 2: weight=-1, expected a number"),
    ({M: [user("x"), assistant("y", weight=float("nan"))]}, "message 2: weight=nan"),
    ({"segments": []}, "'segments' is [] (list), expected a list, not empty"),
    ({"segments": ["x"]}, "segment 1: 'the segment' is 'x' (str), expected an object"),
    ({"segments": [{"text": 3, "train": True}]}, "segment 1: 'text' is 3 (int), expected text"),
    ({"segments": [{"text": "x"}]}, 'segment 1: it says neither "train" (true, false) nor "we'),
    ({"instruction": "x", "output": "y", "history": ["a"]}, "'history' is 'a' (str), expected pa"),
    ({"prompt": "x", "completion": "y", "chat_template_kwargs": [1]}, "'chat_template_kwargs' is"),
    ({"prompt": "x", "completion": "y", "tools": "{"}, "'tools' is not valid JSON"),
    ({"prompt": "x", "completion": "y", "tools": [3]}, "'tools' is 3 (int), expected an object"),
]


@pytest.mark.parametrize("record, message", BAD_RECORDS)
def test_bad_record(record, message):
    if message is None:
        encode(record, TOKENIZER)
    else:
        assert message in fails(record)


def test_bad_policy():
    record = {"prompt": "x", "completion": "y"}
    with pytest.raises(DataError, match="data.train_on='robot': unknown role 'robot'; expected as"):
        encode(record, TOKENIZER, train_on="robot")
    with pytest.raises(DataError, match="data.stop_token='yes': expected turn | all | last | none"):
        encode(record, TOKENIZER, stop_token="yes")
    with pytest.raises(DataError, match="data.template='none.jinja': no such file"):
        encode(record, TOKENIZER, template="none.jinja")
    assert "field 'q' is missing" in fails(record, fields=dict(prompt="q"))
    assert "field 'q.0.z' is missing" in fails({"q": [{}]}, fields=dict(prompt="q.0.z"))
    assert "plain text is no conversation" in fails({"text": "x"}, system="s")
    with pytest.raises(DataError, match=r"data.reasoning.last='no': expected history, last: train"):
        encode(record, TOKENIZER, reasoning=dict(last="no"))
    for wrong in (dict(empty="drop"), dict(first="keep")):
        with pytest.raises(DataError, match="expected history, last: train | keep | drop; empty:"):
            encode(record, TOKENIZER, reasoning=wrong)
    with pytest.raises(DataError, match="data.roles: USER='human being', expected one of assist"):
        encode(record, TOKENIZER, roles={"USER": "human being"})
    with pytest.raises(DataError, match="data.fields has no 'question'; it has prompt, complet"):
        encode(record, TOKENIZER, fields=dict(question="q"))


def test_fields_that_are_filled_in_and_that_join_lines():
    record = {
        "context": "C {x}",
        "turns": [{"say": "a"}, {"say": "b"}],
        "qas": [{"q": "Q"}],
        "n": 1,
    }
    fields = dict(prompt="{context}\n{turns.*.say}\n{qas.0.q}", completion="context")
    assert roles_and_texts(record, fields=fields)[1][0] == ("user", "C {x}\na\nb\nQ")
    with pytest.raises(DataError, match=r"field 'turns\.\*\.what' is missing"):
        to_conversation(record, fields=fields | {"prompt": "{turns.*.what}"})
    with pytest.raises(DataError, match="'n' is 1 .int., expected text"):
        to_conversation(record, fields=fields | {"prompt": "{n}"})
    for text, expected in (("more", "Q\n\nmore"), ("", "Q")):
        fields = dict(prompt="qas.0.q", input="extra", completion="context")
        both = roles_and_texts(record | {"extra": text}, fields=fields)[1]
        assert both[0] == ("user", expected)


def test_roles_and_the_keys_of_messages_are_mapped():
    turns = [dict(speaker="USER", utterance="q", frames=[1]), dict(speaker="SYS", utterance="a")]
    fields = dict(messages="turns", role="speaker", content="utterance")
    roles = {"USER": "user", "SYS": "assistant"}
    assert roles_and_texts({"turns": turns}, fields=fields, roles=roles) == ("chat", PAIR)
    with pytest.raises(DataError, match="unknown role 'USER'.*; map yours with data.roles=NAME=us"):
        to_conversation({"turns": turns}, fields=fields)


def test_a_tree_of_replies_is_read_along_the_best_ranked():
    def node(role, text, *replies, rank=None):
        return dict(role=role, text=text, replies=list(replies), rank=rank)

    tree = node(
        "prompter", "q",
        node("assistant", "worse", rank=1),
        node("assistant", "best", node("prompter", "r"), rank=0),
        node("assistant", "unranked"),
    )  # fmt: skip
    fields = dict(messages="prompt", content="text")
    best = [("user", "q"), ("assistant", "best")]
    assert roles_and_texts({"prompt": tree}, fields=fields) == ("chat", best)
    with pytest.raises(DataError, match="there is no answer to train on"):
        to_conversation({"prompt": node("prompter", "q")}, fields=fields)


# --- tools, reasoning ---

CALL = dict(type="function", function=dict(name="f", arguments={"x": [1, "é"]}))
FLAT = dict(name="f", arguments={"x": [1, "é"]})
CALLING = [
    assistant(None, tool_calls=[CALL]),
    assistant("", tool_calls=[FLAT]),
    assistant("", tool_calls=json.dumps([CALL])),
    assistant("", tool_calls=[FLAT | {"arguments": json.dumps(FLAT["arguments"])}]),
    assistant(None, function_call=FLAT),
    assistant([dict(type="tool_call", value=json.dumps(FLAT))]),
    {"from": "function_call", "value": json.dumps(FLAT)},
]


@pytest.mark.parametrize("message", CALLING)
def test_forms_of_tool_calls(message):
    record = {M: [user("q"), message, dict(role="tool", content={"t": 1}), assistant("a")]}
    called, result = to_conversation(record)[M][1:3]
    assert called == dict(role="assistant", content="", tool_calls=[CALL])
    assert result["content"] == '{"t": 1}'


@pytest.mark.parametrize(
    "call, message",
    [
        (FLAT | {"arguments": "not JSON"}, "message 2: f: 'arguments' is not valid JSON"),
        (FLAT | {"arguments": "[1]"}, "message 2: 'arguments' is [1] (list), expected an object"),
        ({"function": "f"}, "message 2: 'tool call' is {'function': 'f'} (dict), expected an obj"),
        (3, "message 2: 'tool call' is 3 (int)"),
    ],
)
def test_bad_tool_calls(call, message):
    assert message in fails({M: [user("q"), assistant("", tool_calls=[call])]})


def test_tools_are_a_list_or_its_json_text():
    function = dict(name="f", parameters={})
    wrapped = [dict(type="function", function=function)]
    record = {M: [user("q"), assistant("a")]}
    for tools in ([function], wrapped, json.dumps(wrapped), [json.dumps(function)]):
        assert to_conversation(record | {"tools": tools})["tools"] == wrapped
    fields = dict(tools="function")
    assert to_conversation(record | {"function": [function]}, fields=fields)["tools"] == wrapped
    assert to_conversation(record | {"tools": "[]"})["tools"] is None


@pytest.mark.parametrize(
    "message",
    [
        assistant("a", reasoning_content="r"),
        assistant("a", reasoning="r"),
        assistant("a", thinking="r", reasoning_content=None),
        assistant([dict(type="reasoning", value="r"), dict(type="text", value="a")]),
        assistant([dict(type="thinking", thinking="r"), dict(type="text", text="a")]),
    ],
)
def test_forms_of_reasoning(message):
    expected = dict(role="assistant", content="a", reasoning_content="r")
    assert to_conversation({M: [user("q"), message]})[M][1] == expected


def test_a_row_s_template_options_count_before_the_set_s():
    record = {M: [user("q"), assistant("a")], "chat_template_kwargs": '{"b": 2}'}
    assert to_conversation(record, template_kwargs=dict(a=1, b=1))["options"] == dict(a=1, b=2)


def test_the_config_s_roles_and_template_options():
    config = config_lib.get_default()
    assert policy_of(config.data)["roles"] == policy_of(config.data)["template_kwargs"] == {}
    config.data.roles, config.data.template_kwargs = "USER=user, BOT = assistant", '{"a": [1]}'
    policy = policy_of(config.data)
    assert policy["roles"] == {"USER": "user", "BOT": "assistant"}
    assert policy["template_kwargs"] == {"a": [1]}
    for key, value in dict(roles="USER", template_kwargs="[1]").items():
        config = config_lib.get_default()
        config.data[key] = value
        with pytest.raises(config_lib.ConfigError, match=f"data.{key}="):
            policy_of(config.data)
