"""What other code expects of records."""

from typing import Any, Protocol


class RecordSource(Protocol):
    """Records by index, whatever lies behind them: files, some rows of another source, variants."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> dict[str, Any]: ...

    def where(self, i: int, /) -> str:
        """The file and line (or row number) of record `i`."""

    def fingerprint(self) -> str:
        """A hash that changes with the records."""
