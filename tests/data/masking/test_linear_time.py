"""The work that a text takes grows with its length, whatever it holds.

Steps are counted, not seconds: Python's own of a function, and of a regex the structure that could
make it try a run of characters from each of its places.
"""

import re
import sys
from pathlib import Path

import pytest
from test_chat import make_tokenizer

import sftjax
from sftjax.data.masking import marks, template
from sftjax.data.masking.conversation import to_conversation

OLD_THINK = re.compile(r"(?:\s*<think>)?(?:(?!<think>).)*?</think>\s*(.*)", re.DOTALL)
OLD_TAG = re.compile(r"(\s*</?think>\s*)")
OLD_EMPTY = re.compile(r"\s*(?:<think>)?\s*</think>\s*|\s*<\|channel>thought\s*<channel\|>\s*")
OLD_OPEN = re.compile(r"(?:</?think>\s*)+$")

TEXTS = [
    "", "a", "<think>", "</think>", "<think>a</think>b", " \n<think> a </think>\n\nb ",
    "a</think>b",
    "a<think>b</think>c", "<think><think>a</think>b", "<think></think>",
    "\n<think>\n\n</think>\n\n",
    "<think>a</think>b</think>c", "</think>a<think>", "a </think> </think> b", " <think> x",
    "think>",
    "<|channel>thought\n<channel|>x", " </think>\n</think> ", "\n\n", "<think>\n",
    "a<think>\n</think>",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS, ids=repr)
def test_what_replaced_a_regex_finds_the_same(text):
    thought = OLD_THINK.fullmatch(text)
    assert marks.after_thinking(text) == (thought[1] if thought else None)
    assert marks.split_tags(text) == OLD_TAG.split(text)
    for start in range(len(text) + 1):
        old, new = OLD_EMPTY.match(text, start), template.EMPTY_THINK.match(text, start)
        assert (old and old.span()) == (new and new.span())
        old, new = OLD_OPEN.search(text, 0, start), template.OPEN_THINK.match(text[:start][::-1])
        assert (old and old.start()) == (new and start - new.end())


def steps(function, *arguments):
    """Lines of Python that a call takes, in this package and below."""
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        count += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function(*arguments)
    finally:
        sys.settrace(before)
    return count


PARTS = ["<think>", "</think>", " ", "<think> ", "\n</think>\n", "<think>a</think>", "<"]


@pytest.mark.parametrize("part", PARTS, ids=repr)
def test_steps_grow_with_the_length(part):
    """Ten times the text takes at most ten times the steps, and some more."""

    def work(n):
        message = {"role": "assistant", "content": f"a{part * n}b"}
        record = {"messages": [{"role": "user", "content": part * n + "x"}, message]}
        chat = to_conversation(record)
        return marks.put_marks(chat["messages"], "SALT")

    few, many = (steps(work, n) for n in (2_000, 20_000))
    assert many <= 11 * few


def test_no_regex_of_the_package_tries_a_run_twice():
    """No two runs of blanks side by side, and no search that begins with one."""
    twice = re.compile(r"\\s\*(?!\+)(?:\((?:\?:)?[^()]*\)[?*])?\\s[*+]")
    for file in Path(sftjax.__file__).parent.rglob("*.py"):
        text = file.read_text()
        assert not twice.search(text), (file, twice.search(text))
        for call in re.finditer(r"re\.(?:split|sub|search|findall|finditer)\(\s*r?f?[\"'](\(?)\\s", text):
            assert file.parent.name == "plan", (file, call[0])  # texts of our own compiler


def test_a_rendering_with_many_tags():
    """Through the template too: the tags stand in the rendering between two texts."""
    tokenizer = make_tokenizer()
    from sftjax.data import encode

    content = "a" + "<think>" * 3000
    record = {"messages": [
        {"role": "user", "content": "q"}, {"role": "assistant", "content": content},
        {"role": "user", "content": "q"}, {"role": "assistant", "content": "b"},
    ]}  # fmt: skip
    few = steps(encode, record, tokenizer)
    record["messages"][1]["content"] = content * 10
    assert steps(encode, record, tokenizer) <= 11 * few
