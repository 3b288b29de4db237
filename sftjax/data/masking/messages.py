"""One message of any data set to the form that chat templates read, checked.

The form: {"role", "content": text}, and where there are any "reasoning_content": text and "tool_calls": [{"type":
"function", "function": {"name", "arguments": dict}}]. The keys `train` and `weight` are for us; all others are kept,
for templates that know them, and those that a template does not know are counted (`ChatTemplate.left_out`).
"""

import json
from collections.abc import Mapping
from typing import Any

from sftjax.data.records.failures import located
from sftjax.errors import DataError

ROLES = {  # the names that data sets use -> the names that templates use
    **{role: role for role in ("system", "developer", "user", "assistant", "tool")},
    **{"human": "user", "prompter": "user", "gpt": "assistant", "model": "assistant"},
    **{"bot": "assistant", "function": "tool", "observation": "tool", "ipython": "tool"},
    **{"tool_response": "tool", "function_response": "tool", "tool_result": "tool"},
    **{"tool_call": "assistant", "function_call": "assistant", "tool_calls": "assistant"},
}
CALLS = ("tool_call", "function_call", "tool_calls")  # of these roles the content is the call
REASONING = ("reasoning_content", "reasoning", "thinking")
TRAINED = ("loss", "trainable", "training")  # other names of `train`
WEIGHTED = ("loss_weight", "loss_scale")  # and of `weight`
FLAGS = ("train", "weight", *TRAINED, *WEIGHTED)
# Their contents move to other keys.
READ = ("from", "value", "function_call", *REASONING, *TRAINED, *WEIGHTED)
PART = ("text", "value", "thinking", "tool_call")  # where a part of a content has it
CALL = ("id", "type", "index", "function", "name")
ARGUMENTS = ("arguments", "parameters", "args")  # names for them in data; templates read the first


def known_roles(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """{name in the data: a name in ROLES}: ROLES' own and `more` ({your name: one of ours})."""
    for name, role in dict(more or {}).items():
        if role not in ROLES:
            expected = ", ".join(sorted(set(ROLES.values())))
            raise DataError(f"data.roles: {name}={role!r}, expected one of {expected}", kind="setting")
    return {name: name for name in ROLES} | dict(more or {})


def read_messages(raw: Any, fields: Mapping[str, str], roles: Mapping[str, str]) -> list[dict[str, Any]]:
    """The messages of a list, of its JSON text, or of a tree of replies.

    fields: may name the keys "role" and "content" of a message; roles: as from `known_roles`.
    """
    if isinstance(raw, str):
        raw = parse_json(raw, "messages")
    if isinstance(raw, dict) and isinstance(raw.get("replies"), list):
        raw = _best_thread(raw, fields, roles)
    if not isinstance(raw, list) or not raw:
        raise wrong_type("messages", raw, "a list of messages, not empty")
    messages: list[dict[str, Any]] = []
    for n, one in enumerate(raw, 1):
        with located(inside=f"message {n}: "):
            message, is_call = _message(one, fields, roles)
        # Several messages that are one call each are one turn of the assistant's with them all.
        if is_call and messages and _same_turn(messages[-1], message):
            messages[-1] = messages[-1] | {"tool_calls": messages[-1].get("tool_calls", []) + message["tool_calls"]}
        else:
            messages.append(message)
    return messages


def _same_turn(before, message):
    own = ("content", "reasoning_content", "tool_calls")  # all else has to be alike
    rest = ({k: v for k, v in m.items() if k.partition(".")[0] not in own} for m in (before, message))
    return next(rest) == next(rest)


def _best_thread(node, fields, roles):
    """From the root of a tree to a leaf by the best ranked replies, as far as an answer."""
    thread, role = [node], fields.get("role", "role")
    while isinstance(replies := node.get("replies"), list):
        if not (replies := [r for r in replies if isinstance(r, dict)]):
            break
        ranks = [r["rank"] if isinstance(r.get("rank"), (int, float)) else len(replies) for r in replies]
        node = replies[ranks.index(min(ranks))]
        thread.append(node)
    while len(thread) > 1 and ROLES.get(roles.get(str(thread[-1].get(role)), "")) == "user":
        thread.pop()
    return [{k: v for k, v in node.items() if k != "replies"} for node in thread]


def _message(raw, fields, roles):
    if not isinstance(raw, dict):
        raise wrong_type("the message", raw, 'an object {"role": ..., "content": ...}')
    name = raw.get(fields.get("role"), raw.get("role", raw.get("from")))
    if not isinstance(name, str) or name not in roles:
        raise DataError(
            f"unknown role {name!r}; known roles: {', '.join(roles)}",
            "map yours with data.roles=NAME=user,NAME=assistant",
            kind="unknown_role",
        )
    role = ROLES[roles[name]]
    is_call = role == "assistant" and (name in CALLS or roles[name] in CALLS)
    content = raw.get(fields.get("content"), raw.get("content", raw.get("value")))
    used = (*READ, *fields.values())
    message = {k: v for k, v in raw.items() if v is not None and k not in used}
    message |= dict(role=role, content="") | trained_by(raw)
    reasoning = next((raw[k] for k in REASONING if isinstance(raw.get(k), str)), "")
    calls = raw.get("tool_calls") or raw.get("function_call") or []
    if is_call:
        calls, content = content or calls, None
    calls = _listed(calls, "tool_calls")
    if content is None and calls:
        content = ""
    if isinstance(content, list):
        message |= _unread("content", content, ("type", *PART))
        content, reasoning, calls = _parts(content, reasoning, calls)
    if role == "tool" and content is not None and not isinstance(content, str):
        content = json.dumps(content, ensure_ascii=False)
    if not isinstance(content, str):
        raise wrong_type("content", content, "text (or a list of text parts)")
    message["content"] = content
    message.pop("tool_calls", None)
    if role == "assistant" and reasoning:
        message["reasoning_content"] = reasoning
    if role == "assistant" and calls:
        message |= _unread("tool_calls", calls, CALL) | {"tool_calls": [_tool_call(call) for call in calls]}
    if role == "assistant" and not (content.strip() or calls or reasoning):
        raise empty("response", f"content is {content!r}")
    return message, is_call and "tool_calls" in message


def trained_by(raw: dict[str, Any]) -> dict[str, Any]:
    """What the other names of `train` and `weight` say of a message; {} for nothing. Raises: DataError, by the key."""
    said: dict[str, Any] = {}
    for key in (k for k in (*TRAINED, *WEIGHTED) if raw.get(k) is not None):
        value = raw[key]
        number = isinstance(value, (int, float)) and 0 <= value < float("inf")
        if not number or (key in WEIGHTED and isinstance(value, bool)):
            expected = "a number" if key in WEIGHTED else "true, false or a number"
            raise wrong_value(key, value, f"expected {expected}")
        ours, value = ("train", bool(value)) if key in TRAINED and value in (0, 1) else ("weight", value)
        given = said.get(ours, raw.get(ours))
        if given is not None and given != value:
            raise wrong_value(key, value, f"but another key says {ours}={given!r}")
        said[ours] = value
    return said


def _unread(name, parts, known):
    """What of a message's parts has no place in its form, as fields that no template knows."""
    functions = [f for p in parts if isinstance(p, dict) and isinstance(f := p.get("function"), dict)]
    found: dict[str, Any] = {}
    for part in (p for p in (*parts, *functions) if isinstance(p, dict)):
        used = {*known, next((k for k in ARGUMENTS if part.get(k) is not None), "")}
        found |= {f"{name}.{k}": v for k, v in part.items() if k not in used and v is not None}
    return found


def _parts(parts, reasoning, calls):
    """A content of typed parts to text, reasoning and tool calls; other lists stay as they are."""
    texts, thoughts, called = [], [reasoning], list(calls)
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, dict) else None
        value = next((part[k] for k in PART if k in part), None) if kind else None
        if kind in ("text", "input_text", "output_text") and isinstance(value, str):
            texts.append(value)
        elif kind in ("reasoning", "thinking") and isinstance(value, str):
            thoughts.append(value)
        elif kind == "tool_call" and value is not None:
            called.append(value)
        else:
            return parts, reasoning, calls
    return "".join(texts), "".join(thoughts), called


def _tool_call(raw):
    """Nested or flat, its arguments an object or JSON text of one: to the form of templates."""
    call = parse_json(raw, "tool call") if isinstance(raw, str) else raw
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise wrong_type("tool call", raw, 'an object {"name": ..., "arguments": {...}}')
    arguments = next((function[k] for k in ARGUMENTS if function.get(k) is not None), None)
    if isinstance(arguments, str) and arguments.strip():
        with located(inside=f"{function['name']}: "):
            arguments = parse_json(arguments, "arguments")
    if not isinstance(arguments or {}, dict):
        raise wrong_type("arguments", arguments, "an object or JSON text of one")
    known = {"id": call["id"]} if call.get("id") else {}
    return known | {"type": "function", "function": {"name": function["name"], "arguments": arguments or {}}}


def read_tools(raw: Any) -> list[dict[str, Any]] | None:
    """A list of tools, each with or without its {"type": "function"} wrapper; JSON text as well."""
    tools = [parse_json(t, "tools") if isinstance(t, str) else t for t in _listed(raw or [], "tools")]
    tools = [t for t in tools if t not in (None, {})]  # these describe no tool
    if wrong := [t for t in tools if not isinstance(t, dict)]:
        raise wrong_type("tools", wrong[0], "an object that describes a function")
    return [t if "function" in t else {"type": "function", "function": t} for t in tools] or None


def _listed(value, name):
    if isinstance(value, str):
        value = parse_json(value, name) if value.strip() else None
    if value is None or value == {}:  # as json.dumps writes it where there is none
        return []
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list):
        raise wrong_type(name, value, "a list, or JSON text of one")
    return value


def parse_json(text: str, name: str) -> Any:
    """The value of the JSON text of a field. Raises: DataError, with the field's name."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name!r} is not valid JSON: {error}: {text[:60]!r}", kind="bad_json") from None


def wrong_type(name: str, value: Any, expected: str) -> DataError:
    """The error of a field of another type."""
    problem = f"{name!r} is {value!r:.60} ({type(value).__name__}), expected {expected}"
    return DataError(problem, kind="wrong_type", subject=repr(name))


def wrong_value(key: str, value: Any, why: str) -> DataError:
    """The error of a value of the right type that a key can't have."""
    return DataError(f"{key}={value!r}, {why}", kind="wrong_value", subject=repr(key))


def empty(what: str, found: str) -> DataError:
    """The error of an empty "response" or "text"."""
    return DataError(f"empty {what}: {found}", "fill it or drop the row", kind=f"empty_{what}")
