"""Augmentation: named pure functions (record, rng) -> record, for training rows only.

A new augmentation is one function and one line in `AUGMENTATIONS`. It gets a record in a form of
`canonical` and returns a new one; what is trained, the answers, should stay as it is.
"""

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sftjax.data.masking.conversation import read_record, to_conversation
from sftjax.data.records.protocols import RecordSource
from sftjax.errors import DataError

DROPPED = 0.1  # the share of words that token_dropout takes out
TEMPLATES = ("{}", "Please answer this: {}", "Here is a task. {}", "Respond to the following. {}")


def token_dropout(record: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Drop each word of the user's messages with probability 0.1; one word always stays."""

    def drop(text):
        words = text.split(" ")
        kept = [w for w, u in zip(words, rng.random(len(words)), strict=True) if u >= DROPPED]
        return " ".join(kept) if any(kept) else text

    return _map_prompts(record, drop)


def paraphrase_template(record: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Put the last user message into one of TEMPLATES, drawn at random."""
    template = TEMPLATES[rng.integers(len(TEMPLATES))]
    return _map_prompts(record, lambda text: template.format(text), last=True)


AUGMENTATIONS = {"token_dropout": token_dropout, "paraphrase_template": paraphrase_template}


class Augmented(RecordSource):
    """`copies` variants of each row: all rows once, then all once more, and so on.

    Variant k of row i is a function of (seed, k, i) and the row. A source like any other, so the
    variants are tokenised once and cached; an epoch goes through all of them. form: the keywords of
    `to_conversation` that the rows need; the variants need none.
    """

    def __init__(
        self,
        source: RecordSource,
        names: Sequence[str],
        copies: int = 1,
        seed: int = 0,
        form: Mapping[str, Any] | None = None,
    ) -> None:
        if unknown := [name for name in names if name not in AUGMENTATIONS]:
            raise DataError(
                f"data.augment: unknown augmentation {unknown[0]!r}; known: "
                f"{', '.join(AUGMENTATIONS)}",
                kind="setting",
            )
        if copies < 1:
            raise DataError(f"data.augment_copies={copies}: expected 1 or more", kind="setting")
        self.source, self.names, self.copies, self.seed = source, tuple(names), copies, seed
        self.form = dict(form or {})

    def __len__(self) -> int:
        return self.copies * len(self.source)

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not 0 <= i < len(self):
            raise IndexError(f"record {i} of {len(self)}")
        copy, row = divmod(int(i), len(self.source))
        record = canonical(self.source[row], self.source.where(row), self.form)
        rng = np.random.default_rng([self.seed, copy, row])
        for name in self.names:
            record = AUGMENTATIONS[name](record, rng)
        return record

    def unread(self, i: int) -> list[str]:
        """What the row holds that no variant of it does, in words; of its first variant alone."""
        if i >= len(self.source):
            return []
        row = self.source[int(i)]
        return read_record(row, where=self.source.where(i), **self.form).left_out

    def where(self, i: int) -> str:
        """The place of the row that variant `i` is made of."""
        return self.source.where(i % len(self.source))

    def fingerprint(self) -> str:
        """Changes with the rows, the settings and the code of the functions."""
        code = [inspect.getsource(AUGMENTATIONS[name]) for name in self.names]
        settings = [self.names, code, self.copies, self.seed, self.form, DROPPED, TEMPLATES]
        return hashlib.sha256(f"{self.source.fingerprint()} {settings}".encode()).hexdigest()


def canonical(
    record: dict[str, Any], where: str = "", form: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """A record as {"prompt", "completion"}, {"messages"}, {"segments"} or {"text"}.

    The first two may have "tools" and "chat_template_kwargs" too. `to_conversation` reads from it
    without `form` what it reads from `record` with it.
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


def _map_prompts(record, change, last=False):
    """The record with `change` applied to the text of its user messages, or of the last one."""
    if "prompt" in record:
        return record | {"prompt": change(record["prompt"])}
    if "messages" not in record:
        return record
    messages = list(record["messages"])
    users = [i for i, m in enumerate(messages) if m["role"] == "user" and type(m["content"]) is str]
    for i in users[-1:] if last else users:
        messages[i] = messages[i] | {"content": change(messages[i]["content"])}
    return record | {"messages": messages}
