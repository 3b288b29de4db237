"""Sentinels: render a conversation with a mark for each of its texts, and put the texts back.

The rendering with marks is the skeleton: what the template itself writes. It is right if the texts put back into it
give the plain rendering, character by character; then every text's place is known.
"""

import json
import re
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

THINK_TAG = re.compile(r"(</?think>)")


class Mark(NamedTuple):
    """Which text of which message a mark stands for."""

    message: int
    part: str  # think | content | call (a tool's name) | argument
    text: str  # for which the mark stands


class Place(NamedTuple):
    """Where the text of a mark stands in the rendering."""

    number: int  # of the mark
    start: int
    stop: int


def put_marks(
    messages: Sequence[dict[str, Any]], salt: str, only: Collection[int] | None = None
) -> tuple[list[dict[str, Any]], list[Mark]]:
    """Messages with a mark, f"{salt}{number}z", for each text of theirs.

    only: the messages that get marks, and these none in the arguments of their tool calls.
    """
    marks = []

    def mark(i, part, text):
        if not text.strip() or (part == "argument" and only is not None):
            return text
        marks.append(Mark(i, part, text))
        return f"{salt}{len(marks) - 1}z"

    marked = [
        _put_marks(message, i, mark) if only is None or i in only else message for i, message in enumerate(messages)
    ]
    return marked, marks


def _put_marks(message, i, mark):
    marked = dict(message)
    if reasoning := message.get("reasoning_content"):
        marked["reasoning_content"] = mark(i, "think", reasoning)
    marked["content"] = _mark_content(message, i, mark)
    if calls := message.get("tool_calls"):
        marked["tool_calls"] = [_mark_call(call, i, mark) for call in calls]
    return marked


def _mark_content(message, i, mark):
    """A mark for the content; an answer keeps its think tags, as templates look for them."""
    content, reasoning = message["content"], message.get("reasoning_content")
    split = split_tags(content) if message["role"] == "assistant" and "think>" in content else []
    if not any(split[::2]):
        return mark(i, "content", content)
    pieces, part = [], "content" if reasoning or after_thinking(content) is None else "think"
    for n, piece in enumerate(split):
        pieces.append(piece if n % 2 else mark(i, part, piece))
        part = "content" if "</think>" in piece else part
    return "".join(pieces)


# No regex with blanks on both sides of a tag: it would try every run of blanks from each of its places, in time that
# grows with the square of a text that a data set may hold.


def after_thinking(content: str) -> str | None:
    """The answer of a content that begins with its reasoning; None of one that does not."""
    thought, closing, answer = content.lstrip().removeprefix("<think>").partition("</think>")
    return answer.lstrip() if closing and "<think>" not in thought else None


def split_tags(content: str) -> list[str]:
    """[text, tag, text, ..., text]; a think tag has the blanks on both of its sides."""
    pieces = THINK_TAG.split(content)
    for n in range(1, len(pieces), 2):
        before, after = pieces[n - 1].rstrip(), pieces[n + 1].lstrip()
        left = pieces[n - 1][len(before) :]
        right = pieces[n + 1][: len(pieces[n + 1]) - len(after)]
        pieces[n - 1 : n + 2] = before, left + pieces[n] + right, after
    return pieces


def _mark_call(call, i, mark):
    name, arguments = call["function"]["name"], call["function"]["arguments"]
    return call | {"function": {"name": mark(i, "call", name), "arguments": _mark_strings(arguments, i, mark)}}


def _mark_strings(value, i, mark):
    if isinstance(value, dict):
        return {key: _mark_strings(inner, i, mark) for key, inner in value.items()}
    if isinstance(value, list):
        return [_mark_strings(inner, i, mark) for inner in value]
    return mark(i, "argument", value) if isinstance(value, str) else value


def split(rendering: str, salt: str) -> list[str]:
    """The skeleton: [literal, number, literal, ..., literal]."""
    return re.split(rf"{salt}(\d+)z", rendering)


def put_back(text: str, skeleton: Sequence[str], marks: Sequence[Mark]) -> list[Place] | None:
    """Put the texts back into the skeleton; None if that does not give `text`.

    A template may trim or quote a text, so those forms of it are tried as well.
    """
    if not text.startswith(skeleton[0]):
        return None
    at, places = len(skeleton[0]), []
    for number, literal in zip(map(int, skeleton[1::2]), skeleton[2::2], strict=True):
        form = next((f for f in _forms(marks[number].text) if text.startswith(f + literal, at)), None)
        if form is None:
            return None
        places.append(Place(number, at, at + len(form)))
        at += len(form) + len(literal)
    return places if at == len(text) else None


def _forms(text):
    yield from (text, text.strip(), text.lstrip(), text.rstrip())
    yield from (text.strip("\n"), text.lstrip("\n"), text.rstrip("\n"))
    for form in (text, text.strip()):
        yield json.dumps(form, ensure_ascii=False)[1:-1]
        yield json.dumps(form)[1:-1]
