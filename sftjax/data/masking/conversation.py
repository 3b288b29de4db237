"""Records of many forms to one conversation, checked. A new form is one function and one line in `_read_form`."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from sftjax.data.masking.marks import after_thinking
from sftjax.data.masking.messages import (
    FLAGS,
    empty,
    known_roles,
    parse_json,
    read_messages,
    read_tools,
    trained_by,
    wrong_type,
)
from sftjax.data.records.failures import located
from sftjax.data.records.rejects import unread
from sftjax.errors import DataError

MAY_FOLLOW = {
    "": ("system", "developer", "user"),
    "system": ("developer", "user"),
    "developer": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}
ANSWERS = ("output", "response", "answer", "completion")  # beside an instruction
EXTRAS = ("context", "input")  # what an instruction is about
SYSTEM = ("system", "system_prompt", "system_message")
TOOLS = ("tools", "functions")
FIELDS = ("prompt", "completion", "input", "system", "messages", "text", "tools")  # of a record
MESSAGE_FIELDS = ("role", "content")  # of a message


def canonical(record: dict[str, Any], where: str = "", form: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A record as {"prompt", "completion"}, {"messages"}, {"segments"} or {"text"}.

    The first two may have "tools" and "chat_template_kwargs" too. `to_conversation` reads from it without `form` what
    it reads from `record` with it.
    """
    chat = to_conversation(record, where=where, **(form or {}))
    messages = chat["messages"]
    if chat["kind"] == "text":
        return {"text": messages[0]["content"]}
    if chat["kind"] == "segments":
        return {"segments": messages}
    rest = {"tools": chat["tools"], "chat_template_kwargs": chat["options"]}
    rest = {key: value for key, value in rest.items() if value}
    if chat["kind"] == "pair":
        *system, prompt, answer = (m["content"] for m in messages)
        rest |= {"system": system[0]} if system else {}
        return {"prompt": prompt, "completion": answer} | rest
    return {"messages": messages} | rest


def to_conversation(
    record: dict[str, Any],
    *,
    fields: Mapping[str, str] | None = None,
    roles: Mapping[str, str] | None = None,
    system: str = "",
    template_kwargs: Mapping[str, Any] | None = None,
    where: str = "",
) -> dict[str, Any]:
    r"""Bring a record of any known form into one form, a conversation.

    That is dict(messages=[{role, content, ...}], tools=list or None, options=dict for the template, kind="chat" |
    "pair" | "segments" | "text", read=the fields asked for, left_out=what was not read, in words). A pair is one prompt
    and completion in text; it may be rendered as a chat or run together. Text and segments are messages of role "text".

    record: messages | conversations (from/value) | prompt + completion (text or message lists)
      | instruction (+ context, input, history) + output | segments | text; and beside them
      tools, system, chat_template_kwargs. Usual other names of these are read as well.
    fields: the record's own names for prompt, completion, input, system, messages, text, tools,
      and a message's for role and content; an empty one is found by the known forms. A dotted
      name such as "instances.0.output" looks inside, "turns.*.text" joins lines, and a text
      with names in braces is filled in: "{context}\n\n{question}".
    roles: {the data's name of a role: ours}, beside the known ones.
    system: a system message for conversations that have none.
    template_kwargs: for the chat template; the record's chat_template_kwargs count before them. Raises: DataError.
    """
    record = Asked(record)
    fields = {key: name for key, name in dict(fields or {}).items() if name}
    if unknown := set(fields) - {*FIELDS, *MESSAGE_FIELDS}:
        raise DataError(f"data.fields has no {min(unknown)!r}; it has {', '.join(FIELDS)}", kind="setting")
    roles = known_roles(roles)
    left_out = []
    with located(where):
        _, tools = _given(record, fields, "tools", TOOLS)
        chat = dict(tools=read_tools(tools), options=_options(record, template_kwargs))
        kind, messages = _read_form(record, fields, roles)
        if kind in ("chat", "pair"):
            name, own = _given(record, fields, "system", SYSTEM)
            if not isinstance(own or system, str):
                raise wrong_type(name, own or system, "text")
            if messages[0]["role"] not in ("system", "developer"):
                if own or system:
                    messages = [{"role": "system", "content": own or system}, *messages]
            elif own and own.strip() != messages[0]["content"].strip():
                left_out = [f"field {name!r} is not read: the messages have a system message"]
            _check_order(messages)
        elif system or "system" in fields:
            raise DataError("a system message is set, but plain text is no conversation", kind="system_unused")
    left_out += unread(record, record.read)
    return chat | dict(messages=messages, kind=kind, read=record.read, left_out=left_out)


class Asked(dict):
    """A record that remembers which of its fields were asked for."""

    def __init__(self, record: dict[str, Any]) -> None:
        super().__init__(record)
        self.read = set[str]()

    def get(self, name: str, default: Any = None) -> Any:
        """As of a dict."""
        self.read.add(name)
        return super().get(name, default)

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return super().__getitem__(name)


def _given(record, fields, key, names):
    """The name and the value of what `fields` names, else of the first of `names` that says any."""
    if key in fields:
        return fields[key], read_field(record, fields[key])
    return next(((name, record[name]) for name in names if record.get(name)), (names[0], None))


def last_turn(messages: Sequence[dict[str, Any]]) -> int:
    """The index at which the last turn begins: after the last user's message."""
    return max((i + 1 for i, m in enumerate(messages) if m["role"] == "user"), default=0)


def without_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """A message, without the reasoning of an assistant's."""
    if message["role"] != "assistant":
        return message
    answer = after_thinking(message["content"])
    kept = {k: v for k, v in message.items() if k != "reasoning_content"}
    return kept | ({} if answer is None else {"content": answer})


def _options(record, template_kwargs):
    own = record.get("chat_template_kwargs") or {}
    own = parse_json(own, "chat_template_kwargs") if isinstance(own, str) else own
    if not isinstance(own, dict):
        raise wrong_type("chat_template_kwargs", own, "an object")
    return dict(template_kwargs or {}) | own


# --- record forms ---


def _read_form(record, fields, roles):
    present = {key for key, value in record.items() if value is not None}
    pair = {"prompt", "completion"}
    if "messages" in fields:
        return "chat", read_messages(read_field(record, fields["messages"]), fields, roles)
    if "text" in fields:
        return "text", _text_message(record, fields["text"])
    if pair & set(fields):
        return _read_pair(record, fields, roles)
    for key in ("messages", "conversations"):
        if key in present:
            return "chat", read_messages(record[key], fields, roles)
    if "segments" in present:
        return "segments", _read_segments(record["segments"])
    if "instruction" in present:
        return "chat", _read_instruction(record, fields)
    if present & pair:
        return _read_pair(record, fields, roles)
    if "text" in present:
        return "text", _text_message(record, "text")
    raise DataError(
        f"no known form in the fields {_names(record)}; expected messages (or conversations) | "
        "prompt + completion | instruction (+ input) + output | segments | text",
        "say which are which: data.fields.prompt=NAME data.fields.completion=NAME",
        kind="no_form",
    )


def _read_pair(record, fields, roles):
    names = [fields.get(key, key) for key in ("prompt", "completion")]
    prompt, completion = (read_field(record, name) for name in names)
    if "input" in fields and isinstance(prompt, str):
        prompt = _with_input(prompt, read_field(record, fields["input"]))
    if isinstance(completion, str) and isinstance(prompt, str):
        return "pair", [_user(prompt), _answer(completion, names[1])]
    if isinstance(prompt, str):
        prompt = [_user(prompt)]
    if isinstance(completion, str):
        completion = [_answer(completion, names[1])]
    for name, value in zip(names, (prompt, completion), strict=True):
        if not isinstance(value, list):
            raise wrong_type(name, value, "text or a list of messages")
    says = lambda message: any(message.get(key) is not None for key in FLAGS)  # noqa: E731
    given = [m if not isinstance(m, dict) or says(m) else m | {"train": False} for m in prompt]
    return "chat", read_messages(given + completion, fields, roles)


def _read_instruction(record, fields):
    turns = []
    history = record.get("history") or []
    for turn in history if isinstance(history, list) else [history]:
        if not isinstance(turn, list) or [type(text) for text in turn] != [str, str]:
            raise wrong_type("history", turn, "pairs [instruction, output]")
        turns += [_user(turn[0]), _answer(turn[1], "history")]
    prompt = _text(record, "instruction")
    if "input" in fields:
        prompt = _with_input(prompt, read_field(record, fields["input"]))
    for extra in EXTRAS if "input" not in fields else ():
        prompt = _with_input(prompt, record.get(extra) or "", extra)
    name = next((name for name in ANSWERS if record.get(name) is not None), ANSWERS[0])
    return [*turns, _user(prompt), _answer(_text(record, name), name)]


def _with_input(prompt, extra, name="input"):
    if not isinstance(extra, str):
        raise wrong_type(name, extra, "text")
    return "\n\n".join(part for part in (prompt, extra) if part.strip())


def _read_segments(segments):
    """Texts that are run together as they stand, each with its weight."""
    if not isinstance(segments, list) or not segments:
        raise wrong_type("segments", segments, "a list, not empty")
    messages = []
    for n, segment in enumerate(segments, 1):
        with located(inside=f"segment {n}: "):
            messages.append(_segment(segment))
    return messages


def _segment(segment):
    if not isinstance(segment, dict):
        raise wrong_type("the segment", segment, 'an object {"text": ..., "train": ...}')
    text = segment.get("text", segment.get("content"))
    if not isinstance(text, str):
        raise wrong_type("text", text, "text")
    said = {k: segment[k] for k in ("train", "weight") if segment.get(k) is not None}
    said |= trained_by(segment)
    said |= {"train": segment["label"]} if "label" in segment else {}
    if not said:
        raise DataError('it says neither "train" (true, false) nor "weight"', kind="no_weight")
    return {"role": "text", "content": text} | said


def _user(text):
    return {"role": "user", "content": text}


def _answer(text, name):
    if not text.strip():
        raise empty("response", f"{name!r} is {text!r}")
    return {"role": "assistant", "content": text}


def _text_message(record, name):
    text = _text(record, name)
    if not text.strip():
        raise empty("text", f"{name!r} is {text!r}")
    return [{"role": "text", "content": text}]


def _check_order(messages):
    before = ""
    for n, message in enumerate(messages, 1):
        role = message["role"]
        if role not in MAY_FOLLOW[before]:
            place = f"after {before!r}" if before else "first"
            raise DataError(
                f"roles out of order: message {n} is {role!r} {place}, where {' or '.join(MAY_FOLLOW[before])} is"
                f" expected; the roles are: {', '.join(m['role'] for m in messages)}",
                kind="role_order",
            )
        before = role
    if before != "assistant":
        raise DataError(
            f"roles out of order: the last message is {before!r}, expected 'assistant': there is no answer to train on",
            "drop the last message or the row",
            kind="role_order",
        )


# --- the fields of a record ---


def read_field(record: dict[str, Any], name: str, where: str = "", key: str = "data.fields.*") -> Any:
    """`record[name]`; inside for a dotted name; a text with names in braces is filled in.

    where: file and row; key: of the config, that says this name. Both are for errors.
    """
    if "{" in name:
        with located(where):
            return _filled(record, re.split(r"\{([^{}]+)\}", name))
    value = record.get(name)
    if value is None and "." in name:
        value = _inside(record, name.split("."))
    if value is None:
        kind, state = ("null_field", "null") if name in record else ("missing_field", "missing")
        raise DataError(
            f"field {name!r} is {state}; the row has {_names(record)}",
            f"set {key} to the names that your data uses",
            where=where,
            kind=kind,
            subject=repr(name),
        )
    return value


def _filled(record, pieces):
    """[literal, name, literal, ...] as a text, in which an empty part has no separator."""
    filled = pieces[0]
    for n in range(1, len(pieces), 2):
        text, (before, after) = _text(record, pieces[n]), pieces[n - 1 : n + 2 : 2]
        if text.strip():
            filled += text + after
        elif not after.isspace():
            filled = filled.removesuffix(before if before.isspace() else "") + after
    return filled


def _inside(value, parts):
    for n, part in enumerate(parts):
        if part == "*" and isinstance(value, list):
            lines = [_inside(element, parts[n + 1 :]) for element in value]
            return "\n".join(lines) if all(isinstance(line, str) for line in lines) else None
        if isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            value = value.get(part) if isinstance(value, dict) else None
    return value


def _text(record, name):
    value = read_field(record, name)
    if not isinstance(value, str):
        raise wrong_type(name, value, "text")
    return value


def _names(record):
    return ", ".join(map(repr, record)) or "(none)"
