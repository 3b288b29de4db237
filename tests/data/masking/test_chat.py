import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sftjax.data import DataError, encode, open_source, prompt_and_answer, shift, stop_ids
from sftjax.data.masking.encode import encode_batch, token_weights

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = ["the cat sat on the mat, and what is two plus two? four. user assistant system"] * 4


def make_tokenizer(template=CHATML, bos=False):
    """A small byte-level BPE with merges, special tokens, and (bos) a post-processor."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    fast.chat_template = template
    return fast


TOKENIZER = make_tokenizer()
PLAIN = make_tokenizer(template=None)


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def system(text):
    return {"role": "system", "content": text}


def trained(record, tokenizer=TOKENIZER, **policy):
    """The trained spans as text, checked against what the trained tokens decode to."""
    e = encode(record, tokenizer, **policy)
    assert tokenizer.decode(e.tokens[e.weights > 0]) == "".join(e.text[a:b] for a, b in e.spans)
    assert tokenizer.decode(e.tokens) == e.text
    return [e.text[a:b] for a, b in e.spans]


def fails(record, tokenizer=TOKENIZER, **policy):
    with pytest.raises(DataError) as error:
        encode(record, tokenizer, where="f.jsonl:7", **policy)
    assert str(error.value).startswith("f.jsonl:7: ")
    return str(error.value)


M = "messages"

# --- masks ---

TWO_TURNS = {M: [system("s"), user("u1"), assistant("a1"), user("u2"), assistant("a2")]}
END = "<|im_end|>"


def test_the_answer_and_its_stop_token_are_trained_after_the_shift():
    e = encode({"prompt": "two plus two?", "completion": "four."}, TOKENIZER)
    assert e.text == ("<|im_start|>user\ntwo plus two?<|im_end|>\n<|im_start|>assistant\nfour.<|im_end|>\n")
    targets, weights = shift(e.tokens, e.weights)
    assert TOKENIZER.decode(targets[weights > 0]) == "four.<|im_end|>"
    assert (e.tokens.dtype, e.weights.dtype) == (np.int32, np.float32)
    first = int(np.flatnonzero(weights)[0])  # predicted from the newline after "assistant"
    assert TOKENIZER.decode(e.tokens[: first + 1]).endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize(
    "policy, expected",
    [
        ({}, ["a1" + END, "a2" + END]),
        ({"train_on": "last"}, ["a2" + END]),
        ({"train_on": "all"}, ["u1" + END, "a1" + END, "u2" + END, "a2" + END]),
        ({"train_on": "system, human"}, ["s" + END, "u1" + END, "u2" + END]),
        ({"stop_token": "none"}, ["a1", "a2"]),
        ({"stop_token": "last"}, ["a1", "a2" + END]),
        ({"stop_token": "all"}, [END, END, "a1" + END, END, "a2" + END]),
        ({"train_on": "last", "stop_token": "all"}, [END, END, END, END, "a2" + END]),
    ],
)
def test_train_on_and_stop_token(policy, expected):  # L7, L12
    assert trained(TWO_TURNS, **policy) == expected


def test_messages_say_themselves_whether_they_are_trained():
    record = {M: [user("u1"), assistant("a1", train=False), user("u2") | {"weight": 0.5}, assistant("a2")]}
    e = encode(record, TOKENIZER)
    assert [e.text[a:b] for a, b in e.spans] == ["u2" + END, "a2" + END]
    assert sorted(set(e.weights.tolist())) == [0, 0.5, 1]
    both = {"prompt": [user("q"), assistant("h"), user("r")], "completion": [assistant("a")]}
    assert trained(both) == ["a" + END]  # a prompt's own answers are context


def test_contents_that_look_like_anything():
    for content in "a1| x |a\n\n|<s>user\na1|{{ m }}|日本 ✓\u200d|sftjax0z|a</think>".split("|"):
        record = {M: [user(content), assistant(content), user("a1"), assistant("a1")]}
        assert trained(record) == [content + END, "a1" + END]


def test_trimming_templates():
    trim = CHATML.replace("m.content }}", "m.content | trim }}")
    record = {M: [user(" a\n"), assistant("\n a \n"), user("a"), assistant("a")]}
    assert trained(record, make_tokenizer(trim)) == ["a" + END, "a" + END]


def test_a_template_that_drops_or_repeats():
    drops_system = CHATML.replace(" %}<", " if m.role != 'system' %}<", 1)
    assert trained(TWO_TURNS, make_tokenizer(drops_system)) == ["a1" + END, "a2" + END]
    repeats = CHATML + "{{ messages[-1].content }}"
    message = fails(TWO_TURNS, make_tokenizer(repeats))
    assert "the trained turns can't be found" in message and "data.template=FILE" in message
    assert "<|im_start|>user\\nu1" in message
    drops_answers = CHATML.replace(" %}<", " if m.role != 'assistant' %}<", 1)
    assert "can't be found" in fails(TWO_TURNS, make_tokenizer(drops_answers))


def test_generation_tags_where_marks_fail():
    tagged = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content | upper }}<|im_end|>{% endgeneration %}"
        "{% else %}{{ m.content | upper }}<|im_end|>{% endif %}\n{% endfor %}"
    )
    tokenizer = make_tokenizer(tagged)
    assert trained(TWO_TURNS, tokenizer) == ["A1" + END, "A2" + END]
    assert trained(TWO_TURNS, tokenizer, stop_token="none") == ["A1", "A2"]
    assert "can't be found" in fails(TWO_TURNS, tokenizer, train_on="all")


def test_a_template_that_looks_into_the_other_texts():
    """Marks in the trained messages alone: those in the prompt would change what is written."""
    tokenizer = make_tokenizer(
        "{% if messages[0].content | length > 5 %}a mark is longer than that{% endif %}" + CHATML
    )
    record = {M: [user("one"), assistant("yes")]}
    assert trained(record, tokenizer) == ["yes" + END]
    looks_at_answers = make_tokenizer(
        "{% if messages[-1].content | length > 5 %}a mark is longer than that{% endif %}" + CHATML
    )
    assert "can't be found" in fails(record, looks_at_answers)


def test_a_template_that_fails_names_the_row_and_its_message():
    template = "{{ raise_exception('no system please') }}"
    message = fails(TWO_TURNS, make_tokenizer(template))
    assert "the chat template failed: TemplateError: no system please; the roles are" in message
    assert "the chat template failed: TemplateSyntaxError" in fails(TWO_TURNS, make_tokenizer("{% for %}"))


def test_template_from_a_file(tmp_path):
    (tmp_path / "t.jinja").write_text(CHATML.replace("im_start", "im_end"))
    assert encode(TWO_TURNS, PLAIN, template=str(tmp_path / "t.jinja")).text[:10] == END
    assert encode(TWO_TURNS, PLAIN, template=CHATML).text[:12] == "<|im_start|>"


def test_a_chat_without_a_template_is_refused():
    assert "the tokenizer has no chat template; set data.template=FILE" in fails(TWO_TURNS, PLAIN)
    pair = {"prompt": "x", "completion": "y", "system": "s"}
    assert "a system message needs a chat template" in fails(pair, PLAIN)


def test_double_bos_is_refused():
    twice = make_tokenizer("{{ bos_token }}{{ bos_token }}" + CHATML)
    assert "the text begins with '<s>' twice; take it out of the template" in fails(TWO_TURNS, twice)
    once = encode(TWO_TURNS, make_tokenizer("{{ bos_token }}" + CHATML, bos=True))
    assert once.tokens[:2].tolist() == [0, 2]


def test_text_and_pairs_without_a_template():
    e = encode({"text": "the cat"}, PLAIN)
    assert e.text == "the cat</s>" and (e.weights == 1).all() and e.kind == "text"
    e = encode({"text": "the cat"}, make_tokenizer(None, bos=True))
    assert e.text == "<s>the cat</s>" and e.weights[:2].tolist() == [0, 1]
    e = encode({"text": "<s>the cat</s>"}, make_tokenizer(None, bos=True))
    assert e.text == "<s>the cat</s>"  # never twice
    e = encode({"prompt": "two plus ", "completion": "two"}, make_tokenizer(None, bos=True))
    assert e.text == "<s>two plus two</s>" and e.kind == "pair"
    assert [e.text[a:b] for a, b in e.spans] == ["two</s>"]
    assert encode({"text": "the cat"}, TOKENIZER).text == "the cat</s>"  # with a template too


def test_thinking_is_trained_where_it_is_written_and_an_empty_one_is_not():
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n"
        "{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n"
        "{% endfor %}"
    )
    tokenizer = make_tokenizer(template)
    record = {M: [user("q"), assistant("a", reasoning_content="why")]}
    assert trained(record, tokenizer) == ["<think>\nwhy\n</think>\n\na" + END]
    assert trained({M: [user("q"), assistant("a")]}, tokenizer) == ["a" + END]


def test_tool_calls_are_trained():
    template = CHATML.replace(
        "m.content }}",
        "m.content }}{% for c in m.tool_calls or [] %}[{{ c.function | tojson }}]{% endfor %}",
    )
    calls = [{"function": {"name": "f", "arguments": {"x": 1}}}]
    for content in ("", "see"):
        turns = [user("q"), assistant(content, tool_calls=calls)]
        record = {M: [*turns, {"role": "tool", "content": "7"}, assistant("a")]}
        call, answer = trained(record, make_tokenizer(template))
        assert call == content + '[{"name": "f", "arguments": {"x": 1}}]' + END
        assert answer == "a" + END


def test_tokens_that_overlap_a_span_are_trained():
    offsets = [(0, 2), (2, 5), (5, 5), (5, 7), (7, 9)]
    weights = token_weights(5, offsets.__getitem__, [(3, 7, 1.0)])
    assert weights.tolist() == [0, 1, 1, 1, 0]
    assert token_weights(0, [].__getitem__, [(0, 1, 1.0)]).tolist() == []


def test_a_batch_is_its_rows():
    records = [TWO_TURNS, {"prompt": "a", "completion": "b"}, {"text": "the cat"}]
    batch = encode_batch(records, ["", "", ""], TOKENIZER)
    for together, record in zip(batch, records, strict=True):
        alone = encode(record, TOKENIZER)
        assert together.tokens.tolist() == alone.tokens.tolist()
        assert together.weights.tolist() == alone.weights.tolist()
        assert together[2:] == alone[2:]


# --- generation ---


def test_prompt_and_answer():
    tokens, answer = prompt_and_answer(TWO_TURNS, TOKENIZER)
    assert answer == "a2"
    assert TOKENIZER.decode(tokens).endswith("u2<|im_end|>\n<|im_start|>assistant\n")
    e = encode(TWO_TURNS, TOKENIZER)
    assert e.tokens[: len(tokens)].tolist() == tokens.tolist()
    tokens, answer = prompt_and_answer({"prompt": "two plus ", "completion": "two"}, PLAIN)
    assert PLAIN.decode(tokens) in ("two plus ", "two plus") and answer == "two"
    with pytest.raises(DataError, match="plain text has no prompt"):
        prompt_and_answer({"text": "x"}, TOKENIZER)


def test_stop_ids():
    ids = TOKENIZER.convert_tokens_to_ids(["</s>", "<|im_end|>"])
    assert stop_ids(TOKENIZER) == ids and stop_ids(PLAIN) == ids[:1]
    assert stop_ids(make_tokenizer("{{ raise_exception('x') }}")) == ids[:1]


# --- stock tokenizers and real data ---


def stock(fixtures, name):
    return AutoTokenizer.from_pretrained(fixtures / name)


STOCK = {
    "tokenizer-qwen": ("<|im_end|>", "<|im_start|>assistant\n<think>\n\n</think>\n\n"),
    "tokenizer-llama3": ("<|eot_id|>", "<|start_header_id|>assistant<|end_header_id|>\n\n"),
    "tokenizer-deepseek-r1": ("<｜end▁of▁sentence｜>", "<｜Assistant｜>"),
}


@pytest.fixture(params=list(STOCK))
def stock_case(request, fixtures):
    return stock(fixtures, request.param), *STOCK[request.param]


def test_stock_masks(stock_case):
    tokenizer, end, header = stock_case
    e = encode(TWO_TURNS, tokenizer)
    targets, weights = shift(e.tokens, e.weights)
    assert tokenizer.decode(targets[weights > 0]) == f"a1{end}a2{end}"
    turn = int(np.flatnonzero(np.diff(weights) > 0)[-1]) + 1  # predicts the last turn's first
    assert tokenizer.decode(e.tokens[: turn + 1]).endswith(header)
    assert stop_ids(tokenizer) == [tokenizer.convert_tokens_to_ids(end)]
    assert e.text == tokenizer.apply_chat_template(TWO_TURNS[M], tokenize=False)
    plain = tokenizer.apply_chat_template(TWO_TURNS[M], tokenize=True)["input_ids"]
    assert e.tokens.tolist() == plain  # L10: our tokens are the template's own
    assert trained(TWO_TURNS, tokenizer, train_on="last", stop_token="none") == ["a2"]


def test_stock_prompt_is_what_training_saw(stock_case):
    tokenizer, _, header = stock_case
    record = {"prompt": "What is 2 + 2?", "completion": "4"}
    tokens, answer = prompt_and_answer(record, tokenizer)
    assert answer == "4" and tokenizer.decode(tokens).endswith(header)
    assert encode(record, tokenizer).tokens[: len(tokens)].tolist() == tokens.tolist()


def test_qwen_thinking_inside_the_content(fixtures):
    tokenizer = stock(fixtures, "tokenizer-qwen")
    record = {M: [user("q"), assistant("<think>\nwhy\n</think>\n\nb")]}
    assert trained(record, tokenizer) == ["<think>\nwhy\n</think>\n\nb" + END]
    for same in (assistant("why</think>b"), assistant("b", reasoning="why")):
        assert trained({M: [user("q"), same]}, tokenizer) == ["<think>\nwhy\n</think>\n\nb" + END]
    history = {M: record[M] + [user("r"), assistant("c")]}
    assert trained(history, tokenizer) == ["b" + END, "c" + END]  # its history drops thinking


def gsm8k_policy():
    return dict(fields=dict(prompt="question", completion="answer"))


def test_gsm8k(stock_case, fixtures):
    tokenizer, end, _ = stock_case
    source = open_source(fixtures / "gsm8k" / "test.jsonl", limit=100)
    records = source[:]
    for e, record in zip(encode_batch(records, [""] * 100, tokenizer, **gsm8k_policy()), records, strict=True):
        assert tokenizer.decode(e.tokens[e.weights > 0]) == record["answer"] + end


def longest_thread(node):
    reply = max(node.get("replies", []), key=lambda r: len(str(r)), default=None)
    turn = {"role": node["role"], "content": node["text"]}
    return [turn, *(longest_thread(reply) if reply else [])]


def test_oasst(stock_case, fixtures):
    tokenizer, end, _ = stock_case
    for tree in open_source(fixtures / "oasst-en-100" / "en_100_tree.jsonl")[:40]:
        turns = longest_thread(tree["prompt"])
        turns = turns[: len(turns) // 2 * 2]
        if not turns or not all(t["content"].strip() for t in turns):
            continue
        e = encode({M: turns}, tokenizer)
        spans = [e.text[a:b] for a, b in e.spans]
        assert [s.removesuffix(end).strip() for s in spans] == [
            t["content"].strip() for t in turns if t["role"] == "assistant"
        ]


def test_self_instruct_and_sst2(fixtures):
    tokenizer = stock(fixtures, "tokenizer-qwen")
    source = open_source(fixtures / "self-instruct" / "seed_tasks.jsonl")
    fields = dict(prompt="instruction", completion="instances.0.output")
    for i, record in enumerate(source[:50]):
        expected = record["instances"][0]["output"]
        assert "".join(trained(record, tokenizer, fields=fields, where=source.where(i))) in (
            expected + END,
            expected.lstrip("\n") + END,
        )
    record = open_source(fixtures / "sst2" / "dev.tsv")[0]
    fields = dict(prompt="content", completion="label")
    assert trained(record, tokenizer, fields=fields) == [record["label"] + END]
    llama = stock(fixtures, "stories260K-hf")
    e = encode(record, llama, fields=fields)
    assert e.text == "<s>" + record["content"] + record["label"] + "</s>"


def test_prompt_tokens_are_not_trained_and_the_answers_are(fixtures):  # L4
    tokenizer = stock(fixtures, "tokenizer-qwen")
    e = encode({"question": "q", "answer": "a"}, tokenizer, **gsm8k_policy())
    assert 0 < (e.weights > 0).sum() < len(e.weights)
    start = int(np.flatnonzero(e.weights)[0])
    assert tokenizer.decode(e.tokens[start:]) == f"a{END}\n"
