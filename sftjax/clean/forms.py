"""A record in the form in which its answers can be asked about, or its prompts be changed."""

from collections.abc import Mapping
from typing import Any

from sftjax.data.masking.conversation import to_conversation


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
