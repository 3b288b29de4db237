"""Masks against transformers': stock chat templates, and their twins with generation tags.

trl ships the chat templates of many models, and for most a `_training` twin of which transformers'
`return_assistant_tokens_mask` makes a mask. On the stock template, and on the twin without its
tags, sftjax has to find the same tokens. KNOWN lists every difference with its reason: one that is
not there fails, and one that is there and does not occur fails too.
"""

import importlib.util
import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from sftjax.data import DataError, encode

pytestmark = pytest.mark.parity

SPEC = importlib.util.find_spec("trl")
FOLDER = Path(SPEC.origin).parent / "chat_templates" if SPEC else Path("absent")
STOCK = {p.stem: p.read_text() for p in FOLDER.glob("*.jinja") if not p.stem.endswith("_training")}
TWINS = {name: FOLDER / f"{name}_training.jinja" for name in STOCK}
TWINS = {name: path.read_text() for name, path in TWINS.items() if path.exists()}
TWINS |= {name: text for name, text in STOCK.items() if re.search(r"\{%-?\s*generation", text)}

# What the models' own tokenizers hold as special tokens, of all of them in one.
SPECIAL = """
    <s> <|endoftext|> </s> <|im_start|> <|im_end|> <|START_OF_TURN_TOKEN|> <|END_OF_TURN_TOKEN|>
    <|USER_TOKEN|> <|CHATBOT_TOKEN|> <|SYSTEM_TOKEN|> <|START_RESPONSE|> <|END_RESPONSE|>
    <｜User｜> <｜Assistant｜> <｜end▁of▁sentence｜> <|turn> <turn|> <|tool_call> <tool_call|>
    <|tool_response> <tool_response|> <|channel> <channel|> <|"|> <start_of_turn> <end_of_turn>
    <|user|> <|assistant|> <|system|> <|observation|> <|end|> <|start|> <|message|> <|channel|>
    <|call|> <|return|> <|start_header_id|> <|end_header_id|> <|eot_id|> <|eom_id|>
    <end_of_utterance> <|eot|> <|eom|> <|tool_call_start|> <|tool_call_end|>
""".split()


def make_tokenizer():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = "user assistant system model <think> </think> function name arguments tool_call Paris"
    tokenizer.train_from_iterator([words] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="<|endoftext|>",
        additional_special_tokens=SPECIAL[2:],
    )


TOKENIZER = make_tokenizer()

# --- the corpus ---


def chat(*messages, tools=None):
    return {"messages": list(messages)} | ({"tools": tools} if tools else {})


def system(text):
    return dict(role="system", content=text)


def user(text):
    return dict(role="user", content=text)


def assistant(text, **more):
    return dict(role="assistant", content=text, **more)


def calls(*functions):
    return [
        dict(id=f"c{n}", type="function", function=dict(name=name, arguments=arguments))
        for n, (name, arguments) in enumerate(functions)
    ]


def result(text, n=0):
    return dict(role="tool", name="tool", tool_call_id=f"c{n}", content=text)


CITY = dict(type="object", properties=dict(city=dict(type="string", description="c")))
FUNCTION = dict(name="weather", description="The weather.", parameters=CITY)
TOOLS = [dict(type="function", function=FUNCTION)]
CODE = 'def f(x):\n    return {"a": x}  # {{ x }}\n\n\nprint(f(1))\n'
PARIS, ROME = ("forecast", dict(city="Paris")), ("outlook", dict(city="Rome"))
NUMBERS = ("forecast", dict(days=3, more=[1, 2.5], flag=True))
QUOTES = ("forecast", dict(city='Pa"r\nis'))
CORPUS = {
    "one turn": chat(user("What is it?"), assistant("It is this.")),
    "three turns": chat(
        user("q1"), assistant("a1"), user("q2"), assistant("a2"), user("q3"), assistant("a3")
    ),
    "system": chat(
        system("Be brief."), user("q1"), assistant("a1"), user("q2"), assistant("a2")
    ),
    "alike": chat(user("a"), assistant("a"), user("a"), assistant("a")),
    "tools unused": chat(user("hi"), assistant("ho"), tools=TOOLS),
    "call": chat(
        user("Paris?"), assistant("", tool_calls=calls(PARIS)), result('{"t": 21}'),
        assistant("21 degrees."), tools=TOOLS,
    ),
    "call with numbers": chat(
        user("Paris?"), assistant("", tool_calls=calls(NUMBERS)), result("sunny"),
        assistant("Sunny."), user("thanks"), assistant("ok"), tools=TOOLS,
    ),
    "call with content": chat(
        user("Paris?"), assistant("Let me look.", tool_calls=calls(QUOTES)),
        result('line\n"quoted" é'), assistant("Done."), tools=TOOLS,
    ),
    "two calls": chat(
        user("Both?"), assistant("", tool_calls=calls(PARIS, ROME)), result("1"), result("2", 1),
        assistant("1 and 2"), tools=TOOLS,
    ),
    "call after call": chat(
        user("Both?"), assistant("", tool_calls=calls(PARIS)), result("1"),
        assistant("", tool_calls=calls(ROME)), result("2"), assistant("1 and 2"), tools=TOOLS,
    ),
    "calls in two turns": chat(
        user("Paris?"), assistant("", tool_calls=calls(PARIS)), result("1"), assistant("one"),
        user("Rome?"), assistant("", tool_calls=calls(ROME)), result("2"), assistant("two"),
        tools=TOOLS,
    ),
    "blank result": chat(
        user("Paris?"), assistant("I look", tool_calls=calls(PARIS)), result(" \n"),
        assistant("one"), tools=TOOLS,
    ),
    "call without arguments": chat(
        user("now?"), assistant("", tool_calls=calls(("forecast", {}))), result("1"),
        assistant("one"), tools=TOOLS,
    ),
    "call at the end": chat(user("Paris?"), assistant("", tool_calls=calls(PARIS)), tools=TOOLS),
    "reasoning": chat(user("q"), assistant("answer", reasoning_content="why not")),
    "reasoning twice": chat(
        user("q"), assistant("a1", reasoning_content="first"),
        user("r"), assistant("a2", reasoning_content="second"),
    ),
    "reasoning in content": chat(user("q"), assistant("<think>\nwhy\n</think>\n\nanswer")),
    "reasoning and call": chat(
        user("q"), assistant("", reasoning_content="look", tool_calls=calls(ROME)), result("3"),
        assistant("three", reasoning_content="so it is"), tools=TOOLS,
    ),
    "empty content": chat(user(""), assistant("hello"), user(" "), assistant("there")),
    "markup": chat(
        user("<|im_start|>user\n{{ x }}<turn|>{% for %}"),
        assistant("say <|im_end|> </s> {{ y }} ### <tool_call> sftjax0z"),
        user("q"), assistant("b"),
    ),
    "markup of tools": chat(
        user("<tool_response>x</tool_response>"), assistant("one"),
        user("</think>"), assistant("two"),
    ),
    "markup of reasoning": chat(
        user("q"), assistant("use <think> and </think> tags"), user("r"), assistant("b")
    ),
    "switches": chat(user("hi /nothink"), assistant("ho /think")),
    "Unicode": chat(
        user("日本 ✓\u200d👩‍🚀 é"), assistant("école 🙂 ∑"), user("ñ"), assistant("ü")
    ),
    "blanks": chat(
        user("  q \n"), assistant("\n\n a  \n"), user("\tq"), assistant("b\n")
    ),
    "code": chat(user(CODE), assistant(f"```python\n{CODE}```"), user("x"), assistant(CODE)),
}  # fmt: skip

# --- the known differences ---

LINE = "the twin trains the line break after the stop token, where generation has ended"
HEADER = "the twin trains the header, which the generation prompt gives"
OPENING = "the twin trains the line break of the header, which the generation prompt gives"
SPACE = "the twin trains the blank before the answer, which stands at the end of no prompt"
OUTPUTS_END = "the twin trains the end of the tools' outputs, which the template writes"
TOOL_STOP = "the twin does not train the token at which a model stops for its tools' answers"
BYTES = "transformers marks one token of a block's last character, where that has several"
AFTER_STOP = "the twin trains the end of text after the stop token, where generation has ended"

CHATML = {("-", "<|im_end|>", "\n"): LINE}
KNOWN = {  # {template: {(trained by sftjax alone +, by the twin alone -; token before; text)}}
    **dict.fromkeys(("cohere", "cohere2", "llama3", "glm4moe"), {}),
    **dict.fromkeys(
        (
            "lfm2 lfm2_v2 lfm2_2_5 lfm2_2_5_v2 lfm2_2_5_vl qwen2_5_vl qwen3 qwen3_5_nothink "
            "qwen3_5_think qwen3_6 qwen3_8 qwen3_instruct_2507 qwen3_vl nemotron_3_nano "
            "nemotron_3_super nemotron_3_ultra nemotron_3_5_lightning"
        ).split(),
        CHATML,
    ),
    "qwen2_5": CHATML | {("-", "", "\n"): OPENING},
    **dict.fromkeys(("gemma", "gemma3"), {("-", "<end_of_turn>", "\n"): LINE}),
    **dict.fromkeys(("idefics3", "smolvlm"), {("-", "<end_of_utterance>", "\n"): LINE}),
    **dict.fromkeys(
        ("phi3", "phi3_5"),
        {("-", "<|end|>", "\n"): LINE, ("-", "<|end|>", "\n<|endoftext|>"): AFTER_STOP},
    ),
    **dict.fromkeys(("gptoss", "muse_glimmer"), {("-", "", "<|start|>assistant"): HEADER}),
    "deepseek_r1_distill": {("-", "", "<｜Assistant｜>"): HEADER},
    "deepseekv3": {
        ("-", "", "<｜Assistant｜>"): HEADER,
        ("-", "", "<｜tool▁outputs▁end｜>"): OUTPUTS_END,
    },
    "diffusion_gemma": {
        ("-", "<turn|>", "\n"): LINE,
        ("+", "<tool_call|>", "<|tool_response>"): TOOL_STOP,
        ("+", "", "∑"): BYTES,
        ("+", "", "ü"): BYTES,
    },
    "llava_next": {("-", "", " "): SPACE},
}
HEADERS = ("<|start|>", "<｜Assistant｜>")  # differences before which any token may stand
# What the twin writes and the stock template does not, always or sometimes: the stock templates of
# Qwen leave the reasoning out of history; that of GLM does not end its last turn.
THINK = r"<think>\n.*?\n</think>\n\n"
MORE = dict.fromkeys(("qwen3", "qwen3_5_nothink", "qwen3_5_think", "qwen3_6"), THINK)
MORE |= {"glm4moe": r"<\|(user|observation)\|>$"}
OTHER_TEXT = {("qwen3", "blanks"): "the twin strips line breaks before an answer in history"}
PARTS = ("idefics3", "llava_next", "smolvlm")  # templates that read contents as lists of parts
EVERYTHING = dict(history="train", last="train", empty="train")  # as the twins do


def without_tags(template):
    """The twin as a template like any other; blanks around the tags are kept as they are."""
    template = re.sub(r"(\{%-?\s*)endgeneration(\s*-?%\})", r"\1endif\2", template)
    return re.sub(r"(\{%-?\s*)generation(\s*-?%\})", r"\1if true\2", template)


def transformers_mask(name, template, record):
    """transformers' text, ids, offsets and mask; None where the template refuses the record."""
    messages = record["messages"]
    if name in PARTS:
        parts = [[dict(type="text", text=m["content"])] for m in messages]
        messages = [m | {"content": p} for m, p in zip(messages, parts, strict=True)]
    asked = dict(tools=record.get("tools"), chat_template=template)
    try:
        text = TOKENIZER.apply_chat_template(messages, tokenize=False, **asked)
    except Exception:  # a template may refuse in any way
        return None
    out = TOKENIZER.apply_chat_template(
        messages,
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs=dict(return_offsets_mapping=True),
        **asked,
    )
    return text, out["input_ids"], out["offset_mapping"], out["assistant_masks"]


def differences(text, offsets, ours, theirs):
    """{(sign, the special token before, text)} of the runs that one of the masks alone has."""
    runs = []
    for (start, stop), a, b in zip(offsets, ours, theirs, strict=True):
        sign = "+" if a and not b else "-" if b and not a else ""
        if runs and runs[-1][0] == sign and runs[-1][2] >= start:
            runs[-1][2] = max(stop, runs[-1][2])
        else:
            runs.append([sign, start, stop])
    return {(sign, token_before(text, a, text[a:b]), text[a:b]) for sign, a, b in runs if sign}


def token_before(text, start, piece):
    tokens = [] if piece.startswith(HEADERS) else [t for t in SPECIAL if text[:start].endswith(t)]
    return max(tokens, key=len, default="")


def left_out(record, text):
    """Does the rendering lack something that has to be trained?"""
    needed = []
    for message in record["messages"]:
        if message["role"] == "assistant":
            thought = re.match(r"<think>\s(.*?)\s</think>\s*(.*)", message["content"])
            needed.append(thought[2] if thought else message["content"].strip())
            needed += [call["function"]["name"] for call in message.get("tool_calls", [])]
    needed.append(message.get("reasoning_content", thought[1] if thought else ""))
    return any(words not in text for words in needed)


def aligned(name, stock, twin):
    """Which characters of the twin's text the stock text has; nothing but MORE may be missing."""
    kept, at = [True] * len(twin), 0
    for match in re.finditer(MORE[name], twin, re.DOTALL):
        at = match.start() - kept[: match.start()].count(False)
        if not stock.startswith(match[0], at):
            kept[slice(*match.span())] = [False] * len(match[0])
    assert "".join(c for c, keep in zip(twin, kept, strict=True) if keep) == stock
    return kept


def characters(length, offsets, mask):
    trained = [False] * length
    for (start, stop), weight in zip(offsets, mask, strict=True):
        trained[start:stop] = [bool(weight)] * (stop - start)
    return trained


def compare(name, template, record, mask):
    """The differences of our mask on `template` and transformers' on the twin, or "refused"."""
    text, ids, offsets, theirs = mask
    try:
        example = encode(record, TOKENIZER, template=template, reasoning=EVERYTHING, where="f:7")
    except DataError as error:
        assert re.match("f:7: .*(it leaves out the|the trained turns can't be found)", str(error))
        return "refused"
    ours = example.weights > 0
    if example.text == text:
        assert example.tokens.tolist() == ids
        return differences(text, offsets, ours, theirs)
    own = TOKENIZER(example.text, add_special_tokens=False, return_offsets_mapping=True)
    ours = characters(len(example.text), own["offset_mapping"], ours)
    kept = aligned(name, example.text, text)
    theirs = characters(len(text), offsets, theirs)
    theirs = [trained for trained, keep in zip(theirs, kept, strict=True) if keep]
    each = [(n, n + 1) for n in range(len(example.text))]
    return differences(example.text, each, ours, theirs)


# Refused: a later call begins otherwise than the first one does, and where the template's own
# generation prompt ends there is no such text; so where the model would begin can't be told.
UNTOLD = {("deepseekv3", "call after call"), ("deepseekv3", "calls in two turns")}


@pytest.mark.parametrize("name", sorted(TWINS))
def test_the_masks_of_the_twins(name):
    twin, seen = TWINS[name], set()
    for case, record in CORPUS.items():
        mask = transformers_mask(name, twin, record)
        for template in (STOCK[name], without_tags(twin)):
            if mask is None:
                with pytest.raises(DataError, match="the chat template failed"):
                    encode(record, TOKENIZER, template=template)
                continue
            if (name, case) in OTHER_TEXT and template == STOCK[name]:
                continue
            found = compare(name, template, record, mask)
            text = plain_text(name, template, record)
            refused = left_out(record, text) or (name, case) in UNTOLD
            assert (found == "refused") == refused, case
            if found != "refused":
                assert found <= set(KNOWN[name]), case
                seen |= found
    assert seen == set(KNOWN[name])


def plain_text(name, template, record):
    """The rendering, "" if there is none. One template wants arguments as JSON text."""
    messages = [dict(m) for m in record["messages"]]
    for message in messages:
        if "tool_calls" in message and name == "deepseekv3" and template == STOCK[name]:
            message["tool_calls"] = [
                call | {"function": call["function"] | {"arguments": "{}"}} for call in message["tool_calls"]
            ]
    found = transformers_mask(name, template, record | {"messages": messages})
    return found[0] if found else ""


def test_every_pair_is_in_the_table():
    assert set(TWINS) == set(KNOWN) and len(TWINS) >= 33


@pytest.mark.parametrize("name", sorted(STOCK))
def test_an_empty_think_block_is_not_trained_unless_asked(name):
    empty = re.compile(r"^\s*<think>\s*</think>")
    for record in CORPUS.values():
        try:
            asked = encode(record, TOKENIZER, template=STOCK[name], reasoning=EVERYTHING)
        except DataError:
            continue
        default = encode(record, TOKENIZER, template=STOCK[name])
        spans = [asked.text[a:b] for a, b in asked.spans]
        ours = [asked.text[a:b].lstrip() for a, b in default.spans]
        assert ours == [empty.sub("", span).lstrip() for span in spans]


@pytest.mark.parametrize("name", sorted(set(STOCK) - set(TWINS)))
def test_templates_without_a_twin_train_every_answer_to_its_stop_token(name):
    stop = {"gemma4": "<turn|>", "llama3": "<|eot_id|>"}[name[:6]]
    for case, record in CORPUS.items():
        text = plain_text(name, STOCK[name], record)
        if not text or left_out(record, text):
            with pytest.raises(DataError):
                encode(record, TOKENIZER, template=STOCK[name])
            continue
        example = encode(record, TOKENIZER, template=STOCK[name])
        spans = [example.text[a:b] for a, b in example.spans]
        assert spans[-1].endswith((stop, "<|tool_response>"))
        for message in record["messages"]:
            if message["role"] == "assistant" and (words := message["content"].strip()):
                assert any(span.removesuffix(stop).endswith(words) for span in spans), case
