"""What is not read of a source, or left out: counted, and said once, with the first place."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

MOST = 50  # kinds of things that are counted apart: the fields of a row may be without number
OTHER = "another field or text is not read"


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
