"""Records of many forms to one canonical conversation, checked.

A new record form is one function and one line in `_read_form`.
"""

import json

from sftjax.data.sources import DataError

ROLES = {  # the names that data sets use -> the names that templates use
    **{role: role for role in ("system", "developer", "user", "assistant", "tool")},
    **{"human": "user", "prompter": "user", "gpt": "assistant", "model": "assistant"},
    **{"bot": "assistant", "function": "tool", "observation": "tool", "ipython": "tool"},
}
MAY_FOLLOW = {
    "": ("system", "developer", "user"),
    "system": ("developer", "user"),
    "developer": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}
KNOWN_FORMS = (
    "messages (or conversations) | prompt + completion | instruction (+ input) + output | text"
)


def to_conversation(record: dict, *, fields=None, system: str = "", where: str = "") -> dict:
    """Bring a record of any known form into one form.

    Args:
      record: messages | conversations (from/value) | prompt + completion (text or message lists)
        | instruction (+ input) + output | text.
      fields: the record's own names for prompt, completion, system, messages or text; a dotted
        name such as "instances.0.output" looks inside; an empty one is found by the known forms.
      system: a system message for conversations that have none.
      where: file and row, for errors.

    Returns: dict(messages=[{role, content, ...}], tools=list or None, kind="chat" | "pair" |
      "text"). A pair is one prompt and completion in text, which may be rendered as a chat or
      run together. Text is one message of role "text".
    Raises: DataError.
    """
    fields = {key: name for key, name in dict(fields or {}).items() if name}
    kind, messages = _read_form(record, fields, where)
    tools = record.get("tools") or None
    if isinstance(tools, str):
        tools = _parse_json(tools, "tools", where)
    if kind == "text" and (system or "system" in fields):
        raise DataError(f"{where}: a system message is set, but plain text is no conversation")
    if kind != "text":
        own = _field(record, fields["system"], where) if "system" in fields else None
        system = own or record.get("system") or system
        if not isinstance(system, str):
            raise _wrong_type("system", system, "text", where)
        if system and messages[0]["role"] not in ("system", "developer"):
            messages = [{"role": "system", "content": system}, *messages]
        _check_order(messages, where)
    return dict(messages=messages, tools=tools, kind=kind)


def _read_form(record, fields, where):
    present = {key for key, value in record.items() if value is not None}
    pair = {"prompt", "completion"}
    if "messages" in fields:
        return "chat", _messages(_field(record, fields["messages"], where), where)
    if "text" in fields:
        return "text", _text_message(record, fields["text"], where)
    if pair & set(fields):
        names = [fields.get(key, key) for key in ("prompt", "completion")]
        return _read_pair(record, *names, where)
    for key in ("messages", "conversations"):
        if key in present:
            return "chat", _messages(record[key], where)
    if "instruction" in present:
        return _read_instruction(record, where)
    if present & pair:
        return _read_pair(record, "prompt", "completion", where)
    if "text" in present:
        return "text", _text_message(record, "text", where)
    raise DataError(
        f"{where}: no known form in the fields {_names(record)}; expected {KNOWN_FORMS}, or say "
        "which are which: data.fields.prompt=NAME data.fields.completion=NAME"
    )


def _read_pair(record, prompt_name, completion_name, where):
    prompt = _field(record, prompt_name, where)
    completion = _field(record, completion_name, where)
    if isinstance(completion, str) and isinstance(prompt, str):
        return "pair", [_user(prompt), _answer(completion, completion_name, where)]
    if isinstance(prompt, str):
        prompt = [_user(prompt)]
    if isinstance(completion, str):
        completion = [_answer(completion, completion_name, where)]
    if not isinstance(prompt, list):
        raise _wrong_type(prompt_name, prompt, "text or a list of messages", where)
    if not isinstance(completion, list):
        raise _wrong_type(completion_name, completion, "text or a list of messages", where)
    given = [{"train": False, **m} if isinstance(m, dict) else m for m in prompt]
    return "chat", _messages(given + completion, where)


def _read_instruction(record, where):
    parts = [_text(record, "instruction", where)]
    if record.get("input"):
        parts.append(_text(record, "input", where))
    name = "output" if record.get("output") is not None else "response"
    name = name if record.get(name) is not None else "output"
    answer = _answer(_text(record, name, where), name, where)
    return "chat", [_user("\n\n".join(parts)), answer]


def _user(text):
    return {"role": "user", "content": text}


def _answer(text, name, where):
    if not text.strip():
        raise DataError(f"{where}: empty response: {name!r} is {text!r}; fill it or drop the row")
    return {"role": "assistant", "content": text}


def _text_message(record, name, where):
    text = _text(record, name, where)
    if not text.strip():
        raise DataError(f"{where}: empty text: {name!r} is {text!r}; fill it or drop the row")
    return [{"role": "text", "content": text}]


def _messages(raw, where):
    if isinstance(raw, str):
        raw = _parse_json(raw, "messages", where)
    if not isinstance(raw, list) or not raw:
        raise _wrong_type("messages", raw, "a list of messages, not empty", where)
    return [_message(m, f"{where}: message {n}") for n, m in enumerate(raw, 1)]


def _message(raw, where):
    if not isinstance(raw, dict):
        raise _wrong_type("the message", raw, 'an object {"role": ..., "content": ...}', where)
    message = {k: v for k, v in raw.items() if v is not None and k not in ("from", "value")}
    role = raw.get("role", raw.get("from"))
    if not isinstance(role, str) or role not in ROLES:
        raise DataError(f"{where}: unknown role {role!r}; known roles: {', '.join(ROLES)}")
    content = raw.get("content", raw.get("value"))
    reasoning = raw.get("reasoning_content") or raw.get("reasoning") or raw.get("thinking")
    if isinstance(reasoning, str) and ROLES[role] == "assistant":
        message["reasoning_content"] = reasoning
    if isinstance(message.get("tool_calls"), str):
        message["tool_calls"] = _parse_json(message["tool_calls"], "tool_calls", where)
    if content is None and message.get("tool_calls"):
        content = ""
    if isinstance(content, list) and all(_is_text_part(part) for part in content):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise _wrong_type("content", content, "text (or a list of text parts)", where)
    message |= dict(role=ROLES[role], content=content)
    spoken = content.strip() or message.get("tool_calls") or message.get("reasoning_content")
    if message["role"] == "assistant" and not spoken:
        raise DataError(f"{where}: empty response: content is {content!r}; fill it or drop the row")
    return message


def _is_text_part(part):
    return isinstance(part, dict) and isinstance(part.get("text"), str)


def _check_order(messages, where):
    before = ""
    for n, message in enumerate(messages, 1):
        role = message["role"]
        if role not in MAY_FOLLOW[before]:
            place = f"after {before!r}" if before else "first"
            raise DataError(
                f"{where}: roles out of order: message {n} is {role!r} {place}, where "
                f"{' or '.join(MAY_FOLLOW[before])} is expected; "
                f"the roles are: {', '.join(m['role'] for m in messages)}"
            )
        before = role
    if before != "assistant":
        raise DataError(
            f"{where}: roles out of order: the last message is {before!r}, expected 'assistant': "
            "there is no answer to train on; drop the last message or the row"
        )


def _field(record, name, where):
    """`record[name]`, or one step inside for each part of a dotted name."""
    value = record.get(name)
    if value is None and "." in name:
        value = record
        for part in name.split("."):
            if isinstance(value, list) and part.isdigit() and int(part) < len(value):
                value = value[int(part)]
            else:
                value = value.get(part) if isinstance(value, dict) else None
    if value is None:
        state = "is null" if name in record else "is missing"
        raise DataError(
            f"{where}: field {name!r} {state}; the row has {_names(record)}; "
            "set data.fields.* to the names that your data uses"
        )
    return value


def _text(record, name, where):
    value = _field(record, name, where)
    if not isinstance(value, str):
        raise _wrong_type(name, value, "text", where)
    return value


def _wrong_type(name, value, expected, where):
    found = f"{value!r:.60} ({type(value).__name__})"
    return DataError(f"{where}: {name!r} is {found}, expected {expected}")


def _parse_json(text, name, where):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: {name!r} is not valid JSON: {error}: {text[:60]!r}") from None


def _names(record):
    return ", ".join(map(repr, record)) or "(none)"
