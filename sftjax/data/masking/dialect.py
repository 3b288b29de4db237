"""What a chat template expects of a message, and how it begins and ends an assistant's turn.

Learned once for each template, by rendering a few short conversations.
"""

import json
from collections.abc import Callable, Sequence
from re import Pattern
from typing import Any, NamedTuple

# Texts that no template writes itself.
U, A, B, C, T, N = "sftjaxu", "sftjaxa", "sftjaxb", "sftjaxc", "sftjaxt", "sftjaxn"
USER, ANSWER = dict(role="user", content=U), dict(role="assistant", content=A)
AGAIN = [dict(role="user", content=B), dict(role="assistant", content=C)]
FUNCTION = {"name": N, "arguments": {"x": A}}
CALLS = [{"id": "c", "type": "function", "function": FUNCTION}]
CALLING = [USER, dict(role="assistant", content="", tool_calls=CALLS)]
RESULT = dict(role="tool", content=B, tool_call_id="c", name="t")
THINKING = [USER, ANSWER | {"reasoning_content": T}]


class Dialect(NamedTuple):
    """What was learned of one template."""

    parts: bool  # contents are lists of parts, {"type": "text", "text": ...}
    text_arguments: bool  # a tool call's arguments are JSON text, not an object
    header: str  # what precedes an assistant's own words, as in the generation prompt
    openings: dict[str, str]  # of the parts "think" and "call": what is written after the header
    ends: tuple[str, ...]  # the special tokens that end an assistant's turn
    stops: tuple[str, ...]  # those of them that end the whole answer

    def message(self, message: dict[str, Any]) -> dict[str, Any]:
        """A canonical message in the form that the template reads."""
        if self.parts:
            parts = [{"type": "text", "text": message["content"]}]
            message = message | {"content": parts}
        if self.text_arguments and message.get("tool_calls"):
            message = message | {"tool_calls": [_in_text(c) for c in message["tool_calls"]]}
        return message


def _in_text(call):
    arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    return call | {"function": call["function"] | {"arguments": arguments}}


def learn(render: Callable[[list[dict[str, Any]], bool], str], special: Pattern[str]) -> Dialect:
    """The dialect of a template.

    Args:
      render: (messages, with the generation prompt?) -> text, or "" where the template fails.
      special: a pattern of the tokenizer's special tokens.
    """

    def rendered(dialect, messages, prompt=False):
        return render([dialect.message(m) for m in messages], prompt)

    dialect, whole = Dialect(False, False, "", {}, (), ()), [USER, ANSWER, *AGAIN]
    in_parts = dialect._replace(parts=True)
    if _shows(rendered(in_parts, whole)) and not _shows(rendered(dialect, whole)):
        dialect = in_parts
    in_text = dialect._replace(text_arguments=True)
    if _encoded_once(rendered(in_text, CALLING)) and not _encoded_once(rendered(dialect, CALLING)):
        dialect = in_text

    whole = rendered(dialect, whole)
    prompt, alone = (_after(rendered(dialect, [USER], prompt=p), U) for p in (True, False))
    before_answer = _between(whole, U, A)
    header = _header(prompt, alone, before_answer, special)
    called = rendered(dialect, CALLING)
    openings = {
        part: lead[alike(lead, before_answer.split("<think>")[0]) :]
        for part, lead in {
            "think": _between(rendered(dialect, THINKING), U, T),
            "call": _between(called, U, N),
        }.items()
    }

    between, tail = (special.findall(text) for text in (_between(whole, A, B), _after(whole, C)))
    common = tail[: alike(between, tail)][-1:]
    calls = special.findall(_after(called, A))[-1:]
    if not calls:
        answered = rendered(dialect, [*CALLING, RESULT, AGAIN[1]])
        calls = special.findall(_between(answered, A, B))[:1]
    stops = dict.fromkeys([*(common or tail[:1] or between[:1]), *calls])
    ends = dict.fromkeys([*stops, *([] if common else between[:1])])
    found = dict(header=header, openings=openings, ends=tuple(ends), stops=tuple(stops))
    return dialect._replace(**found)


def alike(a: Sequence, b: Sequence) -> int:
    """How many items two texts or lists begin with in common."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((n for n, (x, y) in pairs if x != y), min(len(a), len(b)))


def _shows(text):
    return U in text and A in text


def _encoded_once(text):
    """Are the arguments in the text, neither as Python writes a dict nor quoted twice?"""
    return A in text and "{'x" not in text and '\\"' not in text


def _header(prompt, alone, before_answer, special):
    """The generation prompt without the end of the user's turn, as far as training text has it."""
    cut = alike(prompt, alone)
    for token in special.finditer(prompt):  # two turns may differ inside a token
        cut = token.start() if token.start() < cut < token.end() else cut
    return prompt[cut : alike(prompt, before_answer)].split("<think>")[0]


def _after(text, mark):
    return text.rpartition(mark)[2] if mark in text else ""


def _between(text, first, second):
    after = text.partition(first)[2]
    return after.partition(second)[0] if second in after else ""
