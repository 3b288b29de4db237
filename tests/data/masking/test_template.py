"""Reasoning, tool calls and a template's own ways: what is rendered, and what of it is trained."""

import pytest
from test_chat import END, TOKENIZER, M, assistant, fails, make_tokenizer, system, trained, user

from sftjax.data import DataError, encode, prompt_and_answer, stop_ids
from sftjax.data.masking.template import load_template

CALL = dict(type="function", function=dict(name="f", arguments={"x": 'a "é"\n', "n": 1}))
HEAD = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
PROMPT = "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
THINKING = make_tokenizer(
    HEAD + "{% if m.role == 'assistant' %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n"
    "{% endif %}{{ m.content }}<|im_end|>\n" + PROMPT
)


def calling(written):
    """A tokenizer whose template writes `written` for each tool call c."""
    loop = "{% for c in m.tool_calls or [] %}" + written + "{% endfor %}"
    return make_tokenizer(HEAD + "{{ m.content }}" + loop + "<|im_end|>\n" + PROMPT)


# --- segments ---


def test_segments_are_trained_exactly_as_they_say():
    segments = [
        dict(text="<s>the cat ", train=False),
        dict(text="sat", train=True),
        dict(text=" on", weight=0.5),
        dict(text="", train=True),
        dict(content=" the mat", label=False),
        dict(text=" four.</s>", label=True),
    ]
    e = encode({"segments": segments}, TOKENIZER)
    assert e.text == "<s>the cat sat on the mat four.</s>" and e.kind == "segments"
    assert TOKENIZER.decode(e.tokens) == e.text  # nothing is added, no template is used
    assert [e.text[a:b] for a, b in e.spans] == ["sat", " on", " four.</s>"]
    assert sorted(set(e.weights.tolist())) == [0, 0.5, 1]
    again = encode({"segments": segments}, TOKENIZER, train_on="all", stop_token="all")
    assert again.weights.tolist() == e.weights.tolist()
    with pytest.raises(DataError, match="plain text has no prompt"):
        prompt_and_answer({"segments": segments}, TOKENIZER)


# --- reasoning ---

THOUGHT = [
    user("q"), assistant("a1", reasoning_content="r1"),
    user("p"), assistant("", reasoning_content="r2", tool_calls=[]), dict(role="tool", content="t"),
    assistant("a3", reasoning_content="r3"),
]  # fmt: skip
EMPTY = "<think>\n\n</think>\n\n"


def block(text):
    return f"<think>\n{text}\n</think>\n\n"


@pytest.mark.parametrize(
    "policy, expected",
    [
        ({}, [block("r1") + "a1", block("r2"), block("r3") + "a3"]),
        (dict(history="keep"), ["a1", block("r2"), block("r3") + "a3"]),
        (dict(history="drop"), ["a1", block("r2"), block("r3") + "a3"]),
        (dict(last="keep"), [block("r1") + "a1", "", "a3"]),
        (dict(history="drop", empty="train"), [EMPTY + "a1", block("r2"), block("r3") + "a3"]),
    ],
)
def test_reasoning_of_history_and_of_the_last_turn(policy, expected):
    """The last turn is all that comes after the last user's message."""
    assert trained({M: THOUGHT}, THINKING, reasoning=policy) == [text + END for text in expected]
    text = encode({M: THOUGHT}, THINKING, reasoning=policy).text
    assert ("r1" in text) == (policy.get("history") != "drop")


BEFORE_B = [dict(reasoning_content="why"), "<think>why</think>b", "why</think>b"]


@pytest.mark.parametrize("given", BEFORE_B)
def test_reasoning_is_taken_out_wherever_it_stands(given):
    answer = assistant(given) if isinstance(given, str) else assistant("b", **given)
    e = encode({M: [user("q"), answer]}, TOKENIZER, reasoning=dict(last="drop"))
    assert e.text.endswith("<|im_start|>assistant\nb<|im_end|>\n")


def test_think_tags_that_are_no_reasoning_are_kept():
    content = "use <think> and </think> here"
    for policy in ("drop", "keep", "train"):
        answer = {M: [user("q"), assistant(content)]}
        assert trained(answer, reasoning=dict(last=policy)) == [content + END]


def test_an_empty_think_block_is_trained_only_if_asked():
    record = {M: [user("q"), assistant("a")]}
    assert trained(record, THINKING) == ["a" + END]
    assert trained(record, THINKING, reasoning=dict(last="keep")) == ["a" + END]
    assert trained(record, THINKING, reasoning=dict(empty="train")) == [EMPTY + "a" + END]
    written = {M: [user("q"), assistant(EMPTY + "a")]}
    assert trained(written) == ["a" + END]
    tokens, answer = prompt_and_answer(record, THINKING)
    assert THINKING.decode(tokens).endswith("assistant\n" + EMPTY) and answer == "a"


def test_reasoning_that_the_template_leaves_out_is_not_lost_silently():
    record = {M: [user("q"), assistant("a", reasoning_content="why")]}
    message = "it leaves out the reasoning of message 2, as data.reasoning.last=drop would; set da"
    assert message in fails(record)
    assert trained(record, reasoning=dict(last="drop")) == ["a" + END]
    assert trained(record, reasoning=dict(last="keep")) == ["a" + END]


# --- tool calls ---


def test_arguments_are_encoded_once_whatever_the_template_wants():
    """One template quotes an object, one joins texts, one writes each argument in its own way."""
    once = '{"x": "a \\"é\\"\\n", "n": 1}'
    record = {M: [user("q"), assistant("", tool_calls=[CALL])]}
    for arguments in ("c.function.arguments | tojson", "'' + c.function.arguments"):
        tokenizer = calling("[{{ c.function.name }}{{ " + arguments + " }}]")
        assert trained(record, tokenizer) == [f"[f{once}]" + END]
    own = "{% for k, v in c.function.arguments.items() %}({{ k }}={{ v | upper }}){% endfor %}"
    assert trained(record, calling("{{ c.function.name }}" + own)) == ['f(x=A "É"\n)(n=1)' + END]
    # What it writes can't be found in the text, so a stop token in it could be taken for the end.
    arguments = dict(x=f"a{END}b")
    call = dict(type="function", function=dict(name="f", arguments=arguments))
    record = {M: [user("q"), assistant("", tool_calls=[call])]}
    assert "can't be found" in fails(record, calling("{{ c.function.name }}" + own))
    tokenizer = calling("{{ c.function.name }}{{ c.function.arguments | tojson }}")
    assert trained(record, tokenizer) == [f'f{{"x": "a{END}b"}}{END}']


def test_tool_calls_end_with_the_turn_and_not_before():
    """With no text in the arguments, and with a name that comes again in the tool's result."""
    tokenizer = calling("<s>{{ c.function.name }}</s>{{ c.function.arguments | tojson }}")
    call = dict(type="function", function=dict(name="get", arguments={"x": 1}))
    result = dict(role="tool", name="get", content="get 7")
    record = {M: [user("get"), assistant("see", tool_calls=[call, call]), result, assistant("7")]}
    one = '<s>get</s>{"x": 1}'
    assert trained(record, tokenizer) == [f"see{one}{one}" + END, "7" + END]
    assert trained(record, tokenizer, stop_token="none") == [f"see{one}{one}", "7"]


def test_a_tool_call_that_the_template_leaves_out_is_refused():
    only_first = "{% if loop.first %}{{ c.function.name }}{% endif %}"
    record = {M: [user("q"), assistant("", tool_calls=[CALL])]}
    assert trained(record, calling(only_first)) == ["f" + END]
    other = dict(type="function", function=dict(name="other", arguments={}))
    record = {M: [user("q"), assistant("", tool_calls=[CALL, other])]}
    assert "it leaves out the tool call of message 2" in fails(record, calling(only_first))
    assert "it leaves out the tool call of message 2" in fails(record)


def test_a_prompt_for_a_tool_call():
    tokenizer = calling("{{ c.function.name }}{{ c.function.arguments | tojson }}")
    call = dict(type="function", function=dict(name="f", arguments={"x": 1}))
    record = {M: [user("q"), assistant("", tool_calls=[call])]}
    tokens, answer = prompt_and_answer(record, tokenizer)
    assert tokenizer.decode(tokens).endswith("assistant\n") and answer == 'f{"x": 1}'


# --- a template's own ways ---


def test_contents_as_parts_where_the_template_reads_them_so():
    part = "{% for p in m.content %}{{ p.text }}{% endfor %}"
    tokenizer = make_tokenizer(HEAD + part + "<|im_end|>\n" + PROMPT)
    record = {M: [system("s"), user("q"), assistant("a")]}
    assert load_template(tokenizer).dialect.parts
    assert trained(record, tokenizer) == ["a" + END]


def test_what_the_model_writes_before_and_after_its_words_is_trained():
    """As in templates with channels: the generation prompt ends before them."""
    channel = "{% if m.role == 'assistant' %}<s>final:{% endif %}{{ m.content }}"
    tokenizer = make_tokenizer(HEAD + channel + "</s><|im_end|>\n" + PROMPT)
    record = {M: [user("q"), assistant("a"), user("r"), assistant("b")]}
    assert trained(record, tokenizer) == ["<s>final:a</s>" + END, "<s>final:b</s>" + END]
    assert stop_ids(tokenizer) == tokenizer.convert_tokens_to_ids(["</s>", END])


def test_a_stop_token_that_differs_at_the_end_of_the_text():
    end = "{% if loop.last %}</s>{% else %}<|im_end|>{% endif %}\n"
    tokenizer = make_tokenizer(HEAD + "{{ m.content }}" + end + PROMPT)
    record = {M: [user("q"), assistant("a"), user("r"), assistant("b")]}
    assert trained(record, tokenizer) == ["a" + END, "b</s>"]
    assert stop_ids(tokenizer) == [tokenizer.eos_token_id]  # where a whole answer ends


def test_options_of_the_set_and_of_a_row_reach_the_template():
    tokenizer = make_tokenizer("{% if loud %}LOUD\n{% endif %}" + TOKENIZER.chat_template)
    record = {M: [user("q"), assistant("a")]}
    assert encode(record, tokenizer).text[:5] != "LOUD\n"
    assert encode(record, tokenizer, template_kwargs=dict(loud=True)).text[:5] == "LOUD\n"
    quiet = record | {"chat_template_kwargs": {"loud": False}}
    assert encode(quiet, tokenizer, template_kwargs=dict(loud=True)).text[:5] != "LOUD\n"
    assert trained(record, tokenizer, template_kwargs=dict(loud=True)) == ["a" + END]
    tokens, _ = prompt_and_answer(record, tokenizer, template_kwargs=dict(loud=True))
    assert tokenizer.decode(tokens)[:5] == "LOUD\n"


def test_an_empty_message_of_a_trained_role_is_passed_over():
    record = {M: [user(""), assistant("a"), user("q"), assistant("b")]}
    assert trained(record, train_on="all") == ["a" + END, "q" + END, "b" + END]
    assert trained(record, train_on=["user"]) == ["q" + END]
