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
THINKING = [USER, ANSWER | {"reasoning_content": T}]
PARAMETERS = {"type": "object", "properties": {"x": {"type": "string"}}}
TOOL = {"name": N, "description": T, "parameters": PARAMETERS}
TOOLS = [{"type": "function", "function": TOOL}]
IDS = ("c", "sftjaxcid", "call_sftjax0123456789abcdef")  # some templates want nine characters
Render = Callable[[list[dict[str, Any]], bool, Any], str]


def calling(call_id: str = "c", content: str | None = "") -> list[dict[str, Any]]:
    """A question and a tool call in place of an answer."""
    calls = [{"id": call_id, "type": "function", "function": FUNCTION}]
    return [USER, dict(role="assistant", content=content, tool_calls=calls)]


class Dialect(NamedTuple):
    """What was learned of one template."""

    parts: bool  # contents are lists of parts, {"type": "text", "text": ...}
    text_arguments: bool  # a tool call's arguments are JSON text, not an object
    header: str  # what precedes an assistant's own words, as in the generation prompt
    # Of the parts "think" and "call": what is written after the header; None could not be learnt.
    openings: dict[str, str | None]
    ends: tuple[str, ...]  # the special tokens that end an assistant's turn
    stops: tuple[str, ...]  # those of them that end the whole answer
    developer: bool = True  # a message of the role "developer" is written, and not only "system"

    def message(self, message: dict[str, Any]) -> dict[str, Any]:
        """A canonical message in the form that the template reads."""
        if self.parts:
            message = message | {"content": [{"type": "text", "text": message["content"]}]}
        if self.text_arguments and message.get("tool_calls"):
            message = message | {"tool_calls": [_in_text(c) for c in message["tool_calls"]]}
        if message["role"] == "developer" and not self.developer:
            message = message | {"role": "system"}
        return message


def _in_text(call):
    arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    return call | {"function": call["function"] | {"arguments": arguments}}


def learn(render: Render, special: Pattern[str]) -> Dialect:
    """The dialect of a template.

    render: (messages, with the generation prompt?, tools) -> text, "" where the template fails. special: a pattern of
    the tokenizer's special tokens.
    """

    def rendered(dialect, messages, prompt=False, tools=None):
        return render([dialect.message(m) for m in messages], prompt, tools)

    dialect, whole = Dialect(False, False, "", {}, (), ()), [USER, ANSWER, *AGAIN]
    in_parts = dialect._replace(parts=True)
    if _shows(rendered(in_parts, whole)) and not _shows(rendered(dialect, whole)):
        dialect = in_parts
    call_id, tools, call = _accepted(rendered, dialect)
    in_text = dialect._replace(text_arguments=True)
    encoded = (rendered(d, call, tools=tools) for d in (in_text, dialect))
    if _encoded_once(next(encoded)) and not _encoded_once(next(encoded)):
        dialect = in_text
    dialect = dialect._replace(developer=_knows_developer(rendered, dialect))

    whole = rendered(dialect, whole)
    prompt, alone = (_after(rendered(dialect, [USER], prompt=p), U) for p in (True, False))
    before_answer = _between(whole, U, A)
    header = _header(prompt, alone, before_answer, special)
    called = rendered(dialect, call, tools=tools)
    openings = {
        "think": _opening(rendered(dialect, THINKING), T, before_answer),
        "call": _opening(called, N, before_answer),
    }

    between, tail = (special.findall(text) for text in (_between(whole, A, B), _after(whole, C)))
    common = tail[: alike(between, tail)][-1:]
    calls = special.findall(_after(called, A))[-1:]
    if not calls:
        result = dict(role="tool", content=B, tool_call_id=call_id, name="t")
        answered = rendered(dialect, [*call, result, AGAIN[1]], tools=tools)
        calls = special.findall(_between(answered, A, B))[:1]
    stops = dict.fromkeys([*(common or tail[:1] or between[:1]), *calls])
    ends = dict.fromkeys([*stops, *([] if common else between[:1])])
    return dialect._replace(header=header, openings=openings, ends=tuple(ends), stops=tuple(stops))


def alike(a: Sequence, b: Sequence) -> int:
    """How many items two texts or lists begin with in common."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _accepted(rendered, dialect):
    """(id, tools, conversation) of a tool call that the template writes; the first where none is.

    A template may refuse ids of another form, a call of no tool that is given, or an empty content.
    """
    tried = [
        (call_id, tools, calling(call_id, content))
        for content in ("", None)
        for tools in (None, TOOLS)
        for call_id in IDS
    ]
    for d in (dialect, dialect._replace(text_arguments=True)):
        for call_id, tools, call in tried:
            if d.parts and call[-1]["content"] is None:
                continue
            if N in _after(rendered(d, call, tools=tools), U):
                return call_id, tools, call
    return tried[0]


def _knows_developer(rendered, dialect):
    """Is a developer's message written as such? If not, it can only be written as the system's."""
    messages = [dict(role="developer", content=B), USER, ANSWER]
    as_system = [dict(role="system", content=B), USER, ANSWER]
    return B in rendered(dialect, messages) or B not in rendered(dialect, as_system)


def _opening(text, mark, before_answer):
    """What is written between the header and the mark, where the template writes the mark."""
    if mark not in text.partition(U)[2]:
        return None
    lead = _between(text, U, mark)
    return lead[alike(lead, before_answer.split("<think>")[0]) :]


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
