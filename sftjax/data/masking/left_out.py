"""What of a conversation is not in what the chat template made of it, in words that are counted."""

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from sftjax.data.masking.marks import after_thinking, split_tags

OWN = ("role", "content", "reasoning_content", "tool_calls", "train", "weight")
PARTS = {
    "content": "the content",
    "think": "the reasoning",
    "call": "a tool call",
    "argument": "an argument of a tool call",
}


def of_conversation(
    chat: Mapping[str, Any], text: str, absent: Collection[tuple[int, str]] | None, literals: str, source: str
) -> list[str]:
    """What of a conversation is not in its rendering `text`, each kind of thing once.

    absent: (message, part) of the texts that it leaves out; None where that is not known. literals: what the template
    wrote itself, or `text` where that is not known. source: the template.
    """
    messages = chat["messages"]
    if absent is None:
        absent = {(i, part) for i, m in enumerate(messages) for part in _not_in(m, text)}
    found = [f"{PARTS[part]} of role {messages[i]['role']!r}" for i, part in sorted(absent)]
    for message in messages:
        for name, value in message.items():
            if name not in OWN and not (name in source and all(_in(leaf, text) for leaf in _leaves(value))):
                found.append(f"field {name!r} of role {message['role']!r}")
    found += _of_tools(chat.get("tools") or [], literals)
    words = [f"{what} is left out by the chat template" for what in found]
    unread = (name for name in chat.get("options", {}) if name not in source)
    words += [f"option {name!r} is not read by the chat template" for name in unread]
    return list(dict.fromkeys(words))


def of_text(chat: Mapping[str, Any]) -> list[str]:
    """What has no place in a text that is rendered with no template."""
    given = {"the definitions of tools": chat.get("tools"), "chat_template_kwargs": chat["options"]}
    return [f"{what} are left out: there is no template" for what, there in given.items() if there]


def _not_in(message, text):
    """The parts of a message that are not found in the text."""
    content, reasoning = message["content"], message.get("reasoning_content", "")
    if message["role"] == "assistant" and not reasoning:
        answer = after_thinking(content)
        if answer is not None:
            reasoning, content = content.removesuffix(answer), answer
    reasoning = "".join(split_tags(reasoning)[::2])
    calls = [call["function"] for call in message.get("tool_calls", ())]
    parts = {"content": [content], "think": [reasoning], "call": [c["name"] for c in calls]}
    parts["argument"] = [leaf for c in calls for leaf in _leaves(c["arguments"])]
    return [part for part, texts in parts.items() if not all(_in(t, text) for t in texts)]


def _of_tools(tools: Sequence[Any], literals) -> Iterator[str]:
    functions = [f if isinstance(f := t.get("function"), dict) else t for t in tools]
    names = [str(f.get("name", "")) for f in functions]
    if any(not re.search(rf"(?<!\w){re.escape(name)}(?!\w)", literals) for name in names):
        yield "the definition of a tool"
        return
    if any(not _in(str(f.get("description") or ""), literals) for f in functions):
        yield "the description of a tool"
    if any(not _in(name, literals) for f in functions for name in _parameters(f)):
        yield "a parameter of a tool"


def _parameters(function):
    parameters = function.get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, dict) else None
    return list(properties) if isinstance(properties, dict) else []


def _leaves(value) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _leaves(inner)


def _in(part, text):
    """Is it there as it stands, in JSON, or with other blanks?"""
    part = part.strip()
    forms = (part, *(json.dumps(part, ensure_ascii=ascii)[1:-1] for ascii in (False, True)))
    return any(f in text for f in forms) or " ".join(part.split()) in " ".join(text.split())
