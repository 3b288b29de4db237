"""Any record under any template: a right example, or one error that names the row."""

import json

from hypothesis import given, settings
from hypothesis import strategies as st
from test_chat import TOKENIZER

from sftjax.data import DataError, build_store, encode, open_source
from sftjax.data.masking.encode import REASONING, STOP_TOKEN
from sftjax.tasks.causal_lm import CausalLM

FUZZ = settings(derandomize=True, max_examples=120, deadline=None, database=None)
WHERE = "d.jsonl:7"

# --- records: mostly well formed, with texts that are hard to tell from the template's own ---

texts = st.one_of(
    st.text(max_size=8),  # with half surrogate pairs, marks, line ends
    st.lists(
        st.sampled_from(
            [
                *("four", " ", "\n", "<s>", "</s>", "<|im_end|>", "<|im_start|>", "<think>"),
                *("</think>", "assistant", "user", "{{ x }}", "é", "🙂", "\u0301", "sftjax0z"),
                *("a", "\x00", '"'),
            ]
        ),
        min_size=1,
        max_size=6,
    ).map("".join),
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
calls = st.lists(
    st.fixed_dictionaries({"name": texts, "arguments": st.dictionaries(texts, values, max_size=2)}),
    max_size=2,
)
users = st.fixed_dictionaries({"role": st.just("user"), "content": texts})
answers = st.fixed_dictionaries(
    {"role": st.sampled_from(["assistant", "gpt"]), "content": texts},
    optional={
        "reasoning_content": texts,
        "tool_calls": calls,
        "train": st.booleans(),
        "weight": st.sampled_from([0, 0.5, 1]),
    },
)
turns = st.tuples(users, answers).map(list)
messages = st.builds(
    lambda system, turns: system + [m for turn in turns for m in turn],
    st.lists(texts.map(lambda text: {"role": "system", "content": text}), max_size=1),
    st.lists(turns, min_size=1, max_size=3),
)
segments = st.lists(st.fixed_dictionaries({"text": texts, "train": st.booleans()}), min_size=1)
chats = st.fixed_dictionaries({"messages": messages})
pairs = st.fixed_dictionaries({"prompt": texts, "completion": texts})
good = st.one_of(
    chats,
    pairs,
    st.fixed_dictionaries({"messages": messages, "tools": values}),
    st.fixed_dictionaries({"instruction": texts, "output": texts}, optional={"input": texts}),
    st.fixed_dictionaries({"text": texts}),
    st.fixed_dictionaries({"segments": segments}),
)
names = st.sampled_from(["messages", "prompt", "completion", "text", "tools", "system", "output"])
broken = st.builds(lambda record, more: record | more, good, st.dictionaries(names, values))
any_record = st.one_of(chats, pairs, good, broken)

# --- templates ---

CONTENTS = ["m.content", "m.content | trim", "m.content | upper", "m['content']", "m.nothing"]
CONTENTS += ["m.content.split('</think>')[-1]", "m.tool_calls or m.content", "m | tojson"]
templates = st.builds(
    lambda first, header, content, end, last: (
        f"{first}{{% for m in messages %}}{header}{{{{ {content} }}}}{end}{{% endfor %}}{last}"
    ),
    st.sampled_from(["", "<s>", "{{ bos_token }}", "<s><s>", "{{ messages[0].content }}"]),
    st.sampled_from(["<|im_start|>{{ m.role }}\n", "\n{{ m.role }}: ", "", "<|im_start|>"]),
    st.sampled_from(CONTENTS),
    st.sampled_from(["<|im_end|>\n", "</s>", "\n", "", "{% if loop.last %}</s>{% endif %}"]),
    st.sampled_from(["", "{{ raise_exception('no') }}", "</s>", "{% if add_generation_prompt %}x"])
    | st.just("{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"),
)
policies = st.fixed_dictionaries(
    {},
    optional={
        "train_on": st.sampled_from(["assistant", "last", "all", "user"]),
        "stop_token": st.sampled_from(STOP_TOKEN),
        "system": texts,
        "reasoning": st.fixed_dictionaries({}, optional={k: st.sampled_from(["train", "keep"]) for k in REASONING}),
    },
)


def check(example):
    """What holds for every example."""
    tokens, weights, text, spans = example[:4]
    assert len(tokens) == len(weights) and (weights >= 0).all()
    assert TOKENIZER.decode(tokens) == text
    assert tokens[:2].tolist() != [TOKENIZER.bos_token_id] * 2
    assert all(start < stop for start, stop in spans) and spans == sorted(spans)
    inside = [i for start, stop in spans for i in range(start, stop)]
    assert len(set(inside)) == len(inside) and set(inside) <= set(range(len(text)))
    again = TOKENIZER(text, add_special_tokens=False, return_offsets_mapping=True)
    assert again["input_ids"] == tokens.tolist()
    trained = set(inside)
    for (start, stop), weight in zip(again["offset_mapping"], weights, strict=True):
        assert (weight > 0) == bool(trained & set(range(start, stop)))


@FUZZ
@given(any_record, templates, policies)
def test_any_record_under_any_template(record, template, policy):
    try:
        example = encode(record, TOKENIZER, where=WHERE, template=template, **policy)
    except DataError as error:
        assert str(error).startswith(f"{WHERE}: ")
        assert len(str(error)) > len(WHERE) + 20
    else:
        check(example)


@FUZZ
@given(st.lists(any_record, min_size=1, max_size=4), st.data())
def test_any_bytes_in_a_file(tmp_path_factory, records, data):
    folder = tmp_path_factory.mktemp("fuzz")
    lines = [json.dumps(record).encode() for record in records]
    n = data.draw(st.integers(0, len(lines) - 1))
    at = data.draw(st.integers(0, len(lines[n])))
    cut = data.draw(st.integers(0, 3))
    lines[n] = lines[n][:at] + data.draw(st.binary(max_size=3)) + lines[n][at + cut :]
    path = folder / "d.jsonl"
    path.write_bytes(b"\n".join(lines))
    try:
        source = open_source(path)
        store = build_store(source, CausalLM(TOKENIZER), 16, "split", folder / "c", "skip", 1.0)
    except DataError as error:  # of the file, or of all its rows
        known = (f"{path}: the file ", "nothing is trained in any of ")
        assert str(error).startswith(known)
        return
    report = store.report
    assert len(source) == report["examples"] + sum(report["skipped"].values())
    assert len(store) >= report["examples"] - sum(report["dropped"].values()) > 0
    for tokens, weights in store:
        assert 0 < len(tokens) <= 16 and weights[1:].any()
