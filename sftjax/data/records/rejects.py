"""What of a source is not used: rows, an error at once or a line in a file; fields and texts, counted and said once."""

import json
import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sftjax.data.records.sources import RecordSource
from sftjax.errors import DataError, writing

ON_ERROR = ("raise", "skip")
MOST = 50  # kinds of things that are counted apart: the fields of a row may be without number
OTHER = "another field or text is not read"


def check(on_error: str, max_skipped: float) -> None:
    """Raises: DataError for settings that there are not."""
    if on_error not in ON_ERROR:
        raise DataError(f"data.on_error={on_error!r}: expected {' | '.join(ON_ERROR)}", kind="setting")
    if not 0 <= max_skipped <= 1:
        raise DataError(f"data.max_skipped={max_skipped!r}: expected a share of rows, 0 to 1", kind="setting")


@dataclass
class Rejects:
    """The rows of a source that can't be used, as JSON lines: row, file, kind, reason, record."""

    path: Path | None  # the file, made with its first line
    kept: Path | None  # its place after too many rows
    source: RecordSource
    on_error: str  # "raise" | "skip"
    max_skipped: float  # the share of rows past which it raises after all
    counts: Counter[str] = field(default_factory=Counter)  # by the kind in words (DataError.label)
    reasons: dict[int, str] = field(default_factory=dict)  # by row

    def add(self, row: int, error: DataError) -> None:
        """Raises: DataError as the settings want it, and if the error is of no single row."""
        alone = error.where == self.source.where(row)
        if self.on_error == "raise" or not alone or self.path is None or self.kept is None:
            raise error
        line = dict(row=row + 1, file=error.where, kind=error.kind, reason=error.reason)
        text = json.dumps(line | {"record": record(self.source, row)}, ensure_ascii=False, default=str) + "\n"
        with writing("the file", self.path), open(self.path, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
        self.counts[error.label] += 1
        self.reasons[row] = error.reason
        rows, rejected = len(self.source), self.counts.total()
        if rejected > self.max_skipped * rows:
            os.replace(self.path, self.kept)
            counts = ", ".join(f"{n} {label}" for label, n in self.counts.most_common())
            raise DataError(
                f"{rejected} of {rows} rows can't be used, more than data.max_skipped="
                f"{self.max_skipped:g} allows ({counts}); the last one was {error}\nThey are in "
                f"{self.kept}",
                "repair them, or raise data.max_skipped",
                kind="too_many_rejects",
            )


def record(source: RecordSource, i: int) -> dict[str, Any] | None:
    """Record `i`; None where it is malformed, as its error says."""
    try:
        return source[i]
    except DataError:
        return None


class Notes:
    """Counts rows by what is not read of them."""

    def __init__(self) -> None:
        self.counts: dict[str, list] = {}  # {what, in words: [rows, file and row of the first]}, as JSON holds it

    def add(self, where: str, words: Iterable[str]) -> None:
        """Count what one row leaves out."""
        for what in words:
            if what not in self.counts:
                what = what if len(self.counts) < MOST else OTHER
            self.counts.setdefault(what, [0, where])[0] += 1


def unread(record: Mapping[str, Any], read: Collection[str]) -> list[str]:
    """The fields of a record that hold something and are not among those read, in words."""
    empty = {name for name, v in record.items() if isinstance(v, (str, list, dict)) and not v}
    known = {*read, *empty, *(name for name, v in record.items() if v is None)}
    return [f"field {name!r} is not read" for name in record if name not in known]


def said(counts: Mapping[str, Iterable]) -> list[str]:
    """A line for each of `Notes.counts`."""
    return [f"{what}: in {rows:,} row{'s' * (rows != 1)}, first in {where}" for what, (rows, where) in counts.items()]
