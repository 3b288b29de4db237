"""All that a record holds is in the rendering, or it is said; and calls are trained whole."""

import json

import pytest
from test_chat import CHATML, PLAIN, TOKENIZER, assistant, fails, make_tokenizer, system, user
from transformers.utils.chat_template_utils import render_jinja_template

from sftjax.data import encode, prompt_and_answer, stop_ids

TOOL = {
    "type": "function",
    "function": {
        "name": "depth",
        "description": "The depth of a lake.",
        "parameters": {"type": "object", "properties": {"lake": {"type": "string"}}},
    },
}


def call(name="depth", **arguments):
    return {
        "id": "a1b2c3d4e",
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def calling(*calls):
    return assistant("", tool_calls=list(calls or [call(lake="Orel")]))


def chat(*messages, **more):
    return {"messages": list(messages), **more}


def left_out(record, tokenizer=TOKENIZER, **policy):
    return list(encode(record, tokenizer, **policy).left_out)


def spans(record, tokenizer, **policy):
    e = encode(record, tokenizer, **policy)
    return [e.text[a:b] for a, b in e.spans]


# --- the beginning of a call (case 01) ---

NINE = "{% if c.id is not defined or c.id | length != 9 %}{{ raise_exception('nine') }}{% endif %}"
GIVEN = "{% if not tools %}{{ raise_exception('a call of no tool') }}{% endif %}"


def no_header(checks="", lead='[CALLS] [{"name": "'):
    """A template without a generation prompt; what an assistant writes is tagged."""
    return (
        "{% for m in messages %}{% if m.role == 'user' %}<s>[ASK] {{ m.content }}[/ASK]"
        "{% elif m.role == 'tool' %}[RESULT] {{ m.content }}[/RESULT]"
        "{% elif m.tool_calls %}{% generation %}" + f"{{{{ '{lead.partition('{')[0]}' }}}}"
        "{% for c in m.tool_calls %}" + checks + '{{ \'{"name": "\' + c.function.name + \'",'
        " \"arguments\": ' + c.function.arguments | tojson + '}' }}"
        "{{ ']</s>' if loop.last else ', ' }}{% endfor %}{% endgeneration %}"
        "{% elif m.role == 'assistant' %}{% generation %}{{ m.content + '</s>' }}"
        "{% endgeneration %}{% endif %}{% endfor %}"
    )


def without_tags(template):
    return template.replace("{% generation %}", "").replace("{% endgeneration %}", "")


@pytest.mark.parametrize("checks", ["", NINE, GIVEN, NINE + GIVEN])
@pytest.mark.parametrize("tagged", [True, False])
def test_a_call_is_trained_from_its_first_character(checks, tagged):
    template = no_header(checks)
    record = chat(
        user("Orel and Vask?"),
        calling(call(lake="Orel"), call(lake="Vask")),
        {"role": "tool", "content": "41", "tool_call_id": "a1b2c3d4e"},
        assistant("41 metres"),
        tools=[TOOL],
    )
    texts, blocks = render_jinja_template(
        [record["messages"]],
        tools=[TOOL],
        chat_template=template,
        return_assistant_tokens_mask=True,
    )
    expected = [texts[0][a:b] for a, b in blocks[0]]
    assert expected[0].startswith('[CALLS] [{"name": "depth"')
    tokenizer = make_tokenizer(template if tagged else without_tags(template))
    assert spans(record, tokenizer) == expected


def test_a_start_that_can_not_be_learnt_is_checked_against_the_generation_prompt():
    # No probe is written, as none has this argument.
    only = "{% if not c.function.arguments.lake %}{{ raise_exception('no lake') }}{% endif %}"
    record = chat(user("how deep?"), calling())
    template = without_tags(no_header(only))
    whole = ['[CALLS] [{"name": "depth", "arguments": {"lake": "Orel"}}]</s>']
    assert spans(record, make_tokenizer(template)) == whole
    # Here no rendering of what is before the call begins the text: the row is refused.
    late = "{% if messages | length < 2 %}{{ raise_exception('short') }}{% endif %}" + template
    assert "or where the model begins can't be told" in fails(record, make_tokenizer(late))
    tagged = late.replace(template, no_header(only))
    assert spans(record, make_tokenizer(tagged)) == whole


# --- roles, contents and tools that a template does not write (cases 03, 04) ---

NO_DEVELOPER = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'developer' %}")
REFUSES = "{% for m in messages if m.role == 'developer' %}{{ raise_exception('role') }}{% endfor %}"


@pytest.mark.parametrize("template", [NO_DEVELOPER, REFUSES + CHATML])
def test_a_developer_is_written_as_the_system(template):
    tokenizer = make_tokenizer(template)
    record = chat({"role": "developer", "content": "In Latvian."}, user("Thanks"), assistant("ok"))
    example = encode(record, tokenizer)
    assert example.text.startswith("<|im_start|>system\nIn Latvian.<|im_end|>")
    assert not example.left_out
    tokens, _ = prompt_and_answer(record, tokenizer)
    assert example.tokens[: len(tokens)].tolist() == tokens.tolist()


def test_a_developer_that_the_template_knows_stays_one():
    record = chat({"role": "developer", "content": "In Latvian."}, user("Thanks"), assistant("ok"))
    assert encode(record, TOKENIZER).text.startswith("<|im_start|>developer\nIn Latvian.")


def test_contents_that_the_template_leaves_out():
    some = CHATML.replace("messages %}", "messages if m.role in ('user', 'assistant') %}", 1)
    tokenizer = make_tokenizer(some)
    record = chat(
        {"role": "developer", "content": "In Latvian."},
        user("how deep?"),
        assistant("I look."),
        {"role": "tool", "content": "41"},
        assistant("41"),
    )
    assert left_out(record, tokenizer) == [
        "the content of role 'developer' is left out by the chat template",
        "the content of role 'tool' is left out by the chat template",
    ]
    assert left_out(chat(system("s"), user("u"), assistant("a")), tokenizer) == [
        "the content of role 'system' is left out by the chat template"
    ]
    assert left_out(chat(system("s"), user("u"), assistant("a"))) == []


def test_reasoning_of_earlier_turns_and_calls_that_are_not_trained():
    thought = assistant("a1", reasoning_content="because")
    record = chat(user("u1"), thought, user("u2"), assistant("a2"))
    words = "the reasoning of role 'assistant' is left out by the chat template"
    assert left_out(record) == [words]
    assert left_out(record, reasoning=dict(history="drop")) == []  # as the user wants it
    record = chat(user("u"), calling(), {"role": "tool", "content": "41"}, assistant("a"))
    record["messages"][1]["train"] = False
    assert left_out(record) == [
        "an argument of a tool call of role 'assistant' is left out by the chat template",
        "a tool call of role 'assistant' is left out by the chat template",
    ]


def test_fields_of_messages_that_the_template_does_not_write():
    record = chat(user("u") | {"name": "Ann", "id": 7}, assistant("a", weight=1.0))
    assert left_out(record) == [
        "field 'name' of role 'user' is left out by the chat template",
        "field 'id' of role 'user' is left out by the chat template",
    ]
    named = CHATML.replace("{{ m.content }}", "{{ m.name }}: {{ m.content }}")
    assert left_out(record, make_tokenizer(named)) == ["field 'id' of role 'user' is left out by the chat template"]


def test_fields_of_calls_and_parts_that_have_no_place():
    made = call(lake="Orel") | {"index": 0, "note": "n"}
    made["function"]["strict"] = True
    record = chat(user([{"type": "text", "text": "u", "lang": "en"}]), calling(made))
    assert left_out(record, make_tokenizer(CALLS)) == [
        "field 'content.lang' of role 'user' is left out by the chat template",
        "field 'tool_calls.note' of role 'assistant' is left out by the chat template",
        "field 'tool_calls.strict' of role 'assistant' is left out by the chat template",
    ]


def test_tools_that_the_template_leaves_out():
    record = chat(user("what of the depth of it?"), assistant("depth"), tools=[TOOL])
    words = "the definition of a tool is left out by the chat template"
    assert left_out(record) == [words]
    names = "{% for t in tools or [] %}{{ t.function.name }} {% endfor %}" + CHATML
    assert left_out(record, make_tokenizer(names)) == [
        "the description of a tool is left out by the chat template",
        "a parameter of a tool is left out by the chat template",
    ]
    assert left_out(record, make_tokenizer("{{ tools | tojson }}" + CHATML)) == []
    pair = {"prompt": "a", "completion": "b", "tools": [TOOL], "chat_template_kwargs": {"x": 1}}
    assert left_out(pair, PLAIN) == [
        "the definitions of tools are left out: there is no template",
        "chat_template_kwargs are left out: there is no template",
    ]
    assert "option 'x' is not read by the chat template" in left_out(pair)


def test_a_question_is_cut_from_what_training_shows():
    # The generation prompt of this template opens a block that training text does not have.
    opens = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    tokenizer, record = make_tokenizer(opens), chat(system("s"), user("u"), assistant("a"))
    tokens, answer = prompt_and_answer(record, tokenizer)
    example = encode(record, tokenizer)
    assert example.tokens[: len(tokens)].tolist() == tokens.tolist() and answer == "a"
    assert len(tokens) == (example.weights > 0).argmax()


# --- named templates (case 04) ---

TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML.replace(
    "{{ m.content }}", "{{ m.content }}{% for c in m.tool_calls %}{{ c | tojson }}{% endfor %}"
)


def named(**templates):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = templates
    return tokenizer


def test_rows_with_tools_take_the_template_for_tools():
    tokenizer = named(default=CHATML, tool_use=TOOLS, rag="{{ documents }}")
    plain, tools = chat(user("u"), assistant("a")), chat(user("u"), assistant("a"), tools=[TOOL])
    for record in (plain, tools, chat(user("u"), calling(), tools=[TOOL])):
        expected = tokenizer.apply_chat_template(record["messages"], tools=record.get("tools"), tokenize=False)
        assert encode(record, tokenizer).text == expected
    assert left_out(tools, tokenizer) == []
    tokens, _ = prompt_and_answer(tools, tokenizer)
    assert encode(tools, tokenizer).tokens[: len(tokens)].tolist() == tokens.tolist()
    assert tokenizer.convert_ids_to_tokens(stop_ids(tokenizer)) == ["</s>", "<|im_end|>"]


def test_a_template_may_be_chosen_by_name():
    tokenizer = named(default=CHATML, short="{% for m in messages %}{{ m.content }}</s>{% endfor %}")
    assert encode(chat(user("u"), assistant("a")), tokenizer, template="short").text == "u</s>a</s>"


def test_a_refused_call_names_the_other_templates():
    tokenizer = named(default=CHATML, tool_use=TOOLS)
    message = fails(chat(user("u"), calling()), tokenizer)  # no tools: transformers takes default
    assert "leaves out the tool call of message 2" in message
    assert "keeps the text (the tokenizer has others, by name: tool_use), or put" in message


def test_names_without_a_default():
    tokenizer = named(tool_use=TOOLS, rag=CHATML)
    assert encode(chat(user("u"), assistant("a"), tools=[TOOL]), tokenizer).text.startswith("[{")
    message = fails(chat(user("u"), assistant("a")), tokenizer)
    assert "templates are called rag, tool_use, and none is the 'default'" in message
    assert "set data.template to one of these names" in message
    assert encode({"text": "plain"}, tokenizer).text == "plain</s>"


# --- sibling fields of known forms (cases 05, 17) ---


ASKED = {"instruction": "When?", "output": "In 1931."}
FORMS = [
    ({"context": "It began in 1931."}, "When?\n\nIt began in 1931.", []),
    ({"context": "", "input": ""}, "When?", []),
    ({"context": "a", "input": "b"}, "When?\n\na\n\nb", []),
    ({"context": None, "category": "qa"}, "When?", ["field 'category' is not read"]),
    ({"instruction": "", "input": "Is it?"}, "Is it?", []),
    ({"instruction": " \n", "context": "Is it?"}, "Is it?", []),
    ({"response": "x"}, "When?", ["field 'response' is not read"]),
    ({"id": 0, "tags": []}, "When?", ["field 'id' is not read"]),
]


@pytest.mark.parametrize("more, asked, unread", FORMS)
def test_fields_beside_an_instruction(more, asked, unread):
    record = ASKED | more
    example = encode(record, TOKENIZER)
    assert f"<|im_start|>user\n{asked}<|im_end|>" in example.text
    assert list(example.left_out) == unread


def test_other_names_of_system_tools_and_answer():
    record = {"instruction": "When?", "answer": "Now.", "system_prompt": "Be brief."}
    assert "<|im_start|>system\nBe brief.<|im_end|>" in encode(record, TOKENIZER).text
    record = chat(user("u"), assistant("a"), functions=json.dumps([TOOL["function"]]))
    assert json.dumps(TOOL) in encode(record, make_tokenizer("{{ tools[0] | tojson }}" + CHATML)).text
    record = chat(system("Mine."), user("u"), assistant("a"), system="Yours.", source="web")
    assert left_out(record) == [
        "field 'system' is not read: the messages have a system message",
        "field 'source' is not read",
    ]


def test_texts_have_no_place_for_other_fields():
    record = {"text": "a b", "tools": [TOOL], "meta": {"url": "x"}}
    words = ["the definitions of tools are left out: there is no template"]
    assert left_out(record) == ["field 'meta' is not read", *words]


@pytest.mark.parametrize(
    "name, record, text",
    [
        ("{context}\n\n{question}", {"context": "", "question": "q"}, "q"),
        ("{context}\n\n{question}", {"context": "c", "question": "q"}, "c\n\nq"),
        ("{a}\n\n{b}\n\n{c}", {"a": "1", "b": " ", "c": "3"}, "1\n\n3"),
        ("{a}\n\n{b}", {"a": "1", "b": ""}, "1"),
        ("{a}\n\n{b}\n\n{c}", {"a": "", "b": "", "c": "3"}, "3"),
        ("Of {a}: {b}", {"a": "", "b": "2"}, "Of : 2"),
    ],
)
def test_an_empty_part_leaves_no_separator(name, record, text):
    pair = dict(prompt=name, completion="answer")
    found = encode(record | {"answer": "x"}, TOKENIZER, fields=pair).text
    assert f"user\n{text}<|im_end|>" in found


# --- what messages say of themselves (case 08) ---


@pytest.mark.parametrize(
    "flag, weights",
    [
        ({"loss": False}, [0, 1]),
        ({"loss": None}, [1, 1]),
        ({"loss": True}, [1, 1]),
        ({"loss": 0}, [0, 1]),
        ({"loss": 0.5}, [0.5, 1]),
        ({"trainable": False}, [0, 1]),
        ({"training": False}, [0, 1]),
        ({"loss_weight": 0.25}, [0.25, 1]),
        ({"loss_scale": 0.0}, [0, 1]),
        ({"train": False, "loss": False}, [0, 1]),
    ],
)
def test_flags_of_messages(flag, weights):
    turns = [{"from": "human", "value": "a", "loss": None}, {"from": "gpt", "value": "b"} | flag]
    turns += [{"from": "human", "value": "c"}, {"from": "gpt", "value": "d", "loss": True}]
    example = encode({"conversations": turns}, TOKENIZER)
    expected = dict.fromkeys(w for w in weights if w)
    assert dict.fromkeys(example.weights[example.weights > 0].tolist()) == expected
    assert len(example.spans) == sum(map(bool, weights)) and not example.left_out


@pytest.mark.parametrize(
    "flag, message",
    [
        ({"loss": "false"}, "message 2: loss='false', expected true, false or a number"),
        ({"loss": -1}, "message 2: loss=-1, expected true, false or a number"),
        ({"loss_weight": True}, "message 2: loss_weight=True, expected a number"),
        ({"loss": False, "train": True}, "message 2: loss=False, but another key says train=True"),
    ],
)
def test_flags_that_say_nothing(flag, message):
    assert message in fails(chat(user("a"), assistant("b") | flag))


def test_flags_of_prompts_and_segments():
    before = [user("a"), assistant("b", train=None), user("c")]
    assert spans({"prompt": before, "completion": "d"}, TOKENIZER) == ["d<|im_end|>"]
    before[1]["loss"] = True
    assert len(spans({"prompt": before, "completion": "d"}, TOKENIZER)) == 2
    segments = [{"text": "a", "loss": False}, {"text": "b", "loss": True, "train": None}]
    assert spans({"segments": segments}, TOKENIZER) == ["b"]


# --- roles of calls, and tools as text (cases 20, 21) ---

CALLS = TOOLS.replace("{{ c | tojson }}", "{{ c.function | tojson }}")
TEXT = '{"name": "depth", "arguments": {"lake": "%s"}}'
ROLES = [("tool_call", "tool_response"), ("function_call", "observation")]
ROLES += [("tool_calls", "tool_result"), ("function_call", "function_response")]


@pytest.mark.parametrize("calls, results", ROLES)
def test_roles_of_calls_and_results(calls, results):
    tokenizer = make_tokenizer(CALLS)

    def role(name, content):
        return {"role": name, "content": content}

    turns = [user("how deep?"), role(calls, TEXT % "Orel"), role(results, "41"), assistant("41 m")]
    made = [user("how deep?"), calling(), role("tool", "41"), assistant("41 m")]
    assert encode(chat(*turns), tokenizer).text == encode(chat(*made), tokenizer).text
    # The mapping that was advised before does not make plain text of a call.
    policy = dict(roles={calls: "assistant", results: "tool"})
    assert encode(chat(*turns), tokenizer, **policy).text == encode(chat(*made), tokenizer).text
    turns[1]["role"] = "mine"
    policy = dict(roles={"mine": calls})
    assert encode(chat(*turns), tokenizer, **policy).text == encode(chat(*made), tokenizer).text


def test_calls_one_after_the_other_are_one_turn():
    tokenizer = make_tokenizer(CALLS)
    turns = [user("both?"), assistant("I look."), {"role": "tool_call", "content": TEXT % "Orel"}]
    turns += [{"role": "tool_call", "content": TEXT % "Vask"}]
    both = assistant("I look.", tool_calls=[call(lake="Orel"), call(lake="Vask")])
    made = encode(chat(user("both?"), both), tokenizer)
    assert encode(chat(*turns), tokenizer).text == made.text
    turns[-1]["loss"] = False  # not trained as the others are: no turn of one kind
    assert "roles out of order" in fails(chat(*turns), tokenizer)


def test_arguments_under_another_name():
    flat = {"name": "depth", "parameters": {"lake": "Orel"}}
    record = chat(user("u"), assistant("", tool_calls=[flat]))
    assert TEXT % "Orel" in encode(record, make_tokenizer(CALLS)).text


@pytest.mark.parametrize("tools", ["null", "{}", "[]", "[{}]", " ", {}, [], [{}], "[null]", None])
def test_tools_that_are_none(tools):
    tokenizer = make_tokenizer("{% if tools is not none %}TOOLS{% endif %}" + CHATML)
    record = chat(user("u"), assistant("a"), tools=tools)
    assert encode(record, tokenizer).text.startswith("<|im_start|>user")


@pytest.mark.parametrize("calls", ["null", "[]", "{}", "", None, []])
def test_calls_that_are_none(calls):
    record = chat(user("u"), assistant("a", tool_calls=calls))
    assert encode(record, TOKENIZER).text == encode(chat(user("u"), assistant("a")), TOKENIZER).text
