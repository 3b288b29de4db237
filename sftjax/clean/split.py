"""Rows of a source: by index, by a lasting split into training and validation.

A row's side is decided by a hash of its prompt (or of its group), so equal prompts stay together and the same row goes
to the same side on every machine, in every order, at any time.
"""

import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sftjax.data.masking.conversation import read_field, to_conversation
from sftjax.data.records.sources import RecordSource
from sftjax.errors import DataError

DRIFT = 0.005  # how far a stratified label's share may be from the one asked for


class Subset(RecordSource):
    """The rows of a source at some indices, with the places and the fingerprint of a source."""

    def __init__(self, source: RecordSource, rows: Sequence[int] | np.ndarray) -> None:
        self.source, self.rows = source, np.asarray(rows, np.int64)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.source[int(self.rows[i])]

    def where(self, i: int) -> str:
        """The place of row `i` in the files of the source."""
        return self.source.where(int(self.rows[i]))

    def fingerprint(self) -> str:
        """A hash of the source's own and of the indices."""
        return hashlib.sha256(self.source.fingerprint().encode() + self.rows.tobytes()).hexdigest()


def split(
    source: RecordSource,
    share: float,
    *,
    group_by: str = "",
    stratify_by: str = "",
    form: Mapping[str, Any] | None = None,
    skip: bool = False,
) -> tuple[Subset, Subset]:
    """Training and validation rows: (Subset, Subset).

    Without `stratify_by` a row's side depends on its prompt (or group) alone: no other row moves it. A label's share is
    right within sampling error, sqrt(share * (1 - share) / its rows).

    With it the hash decides unless the label's share, counted from the first row on, would be off by more than half a
    percent (and more than one row). A side then depends on the rows before it too; rows appended move no other. Rows
    that share a prompt or group stay together first.

    share, group_by, stratify_by: as in the config's data.split. form: keywords of to_conversation: fields, roles; the
    prompt is the first user message. skip: leave a row that can't be read to training, which lists it
    (data.on_error="skip"). Raises: DataError for a row without the field, or if a side is left empty.
    """
    if not 0 < share < 1:
        raise DataError(f"data.split.share={share!r}: expected a share between 0 and 1", kind="setting")
    side_of, held, seen = {}, Counter[Any](), Counter[Any]()
    sides = np.zeros(len(source), bool)
    for i in range(len(source)):
        where = source.where(i)
        try:
            record = source[i]
            group = group_by and str(read_field(record, group_by, where, "data.split.group_by"))
            key = group if group_by else prompt_key(record, where, form)
        except DataError:
            if group_by or not skip:
                raise
            continue  # for training, where it can't be encoded either
        label = str(read_field(record, stratify_by, where, "data.split.stratify_by")) if stratify_by else None
        seen[label] += 1
        if key not in side_of:
            side = fraction(key) < share
            if stratify_by:
                off, bound = held[label] - share * seen[label], max(1, DRIFT * seen[label])
                side = off + 1 <= bound if side else off < -bound
            side_of[key] = side
        sides[i] = side_of[key]
        held[label] += sides[i]
    if sides.all() or not sides.any():
        raise DataError(
            f"data.split.share={share}: of {len(source)} rows with {len(side_of)} different "
            f"{group_by or 'prompt'}s {'all' if sides.any() else 'none'} fall to validation",
            "set another share, or give data.validation",
            kind="setting",
        )
    return Subset(source, np.flatnonzero(~sides)), Subset(source, np.flatnonzero(sides))


def fraction(key: str) -> float:
    """A number in [0, 1) that belongs to `key` for ever."""
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def normalise(text: str) -> str:
    """Text without what makes no difference: letter case, kinds and runs of blanks, ligatures."""
    return " ".join(unicodedata.normalize("NFKC", text).lower().split())


def prompt_key(record: dict[str, Any], where: str = "", form: Mapping[str, Any] | None = None) -> str:
    """The normalised first user message; of plain text, the text."""
    chat = to_conversation(record, where=where, **(form or {}))
    messages = [m for m in chat["messages"] if m["role"] == "user"] or chat["messages"]
    return normalise(said(messages[0]))


def said(message: dict[str, Any]) -> str:
    """All that a message says, as text: its reasoning, its content, its tool calls."""
    content = message["content"]
    parts = [
        message.get("reasoning_content") or "",
        content if isinstance(content, str) else json.dumps(content, default=str),
        json.dumps(message["tool_calls"], default=str) if message.get("tool_calls") else "",
    ]
    return "\n".join(part for part in parts if part)
