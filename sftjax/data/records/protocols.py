"""What other code expects of records: types that signatures name; nothing is run here."""

from pathlib import Path
from typing import Any, Protocol

from sftjax.errors import DataError


class Reader(Protocol):
    """The records of one file, by index; see READERS in readers.py."""

    @property
    def path(self) -> Path | str:
        """The file, or what names it in messages."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> Any: ...

    def where(self, i: int, /) -> str:
        """The file and line (or row number) of record `i`."""


class RecordSource(Protocol):
    """Records by index, whatever lies behind them: files, some rows of another source, variants."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> dict[str, Any]: ...

    def where(self, i: int, /) -> str:
        """The file and line (or row number) of record `i`."""

    def fingerprint(self) -> str:
        """A hash that changes with the records."""


class RejectSink(Protocol):
    """Takes the rows that can't be used."""

    on_error: str  # "raise" | "skip"

    def add(self, row: int, error: DataError, /) -> None:
        """Keep a row, or raise its error."""
