"""The errors of files that can't be read, in words."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sftjax.errors import DataError


@contextmanager
def readable(name: Path | str) -> Iterator[None]:
    """The system's own errors, such as a missing permission, as errors of the data."""
    try:
        yield
    except OSError as error:
        raise unreadable(name, "data", error) from None


def unreadable(path: Path | str, what: str, error: Exception) -> DataError:
    """The error of a file that can't be read as the kind of file, `what`, that it should be."""
    return DataError(f"not a readable {what} file: {error}", where=path, kind="unreadable")


def malformed(where: str | Path, error: Any) -> DataError:
    """The error of JSON that does not parse."""
    near = error.doc[max(0, error.pos - 20) : error.pos + 20].strip("\r\n")
    problem = f"malformed JSON at column {error.colno}: {error.msg}, near {near!r}"
    fix = "expected JSON, in .jsonl one object per line"
    return DataError(problem, fix, where=where, kind="bad_json")


def not_read(where: str | Path, error: Any) -> DataError:
    """The error of JSON that parses and can't be read, such as one that is too deep."""
    return DataError(f"JSON that can't be read: {error}", where=where, kind="bad_json")


def not_utf8(where: str | Path, error: Any) -> DataError:
    """The error of a text that is not UTF-8."""
    problem, fix = f"not UTF-8 at byte {error.start}", "save the file as UTF-8"
    return DataError(problem, fix, joint=": ", where=where, kind="not_utf8")


def excerpt(value: Any, width: int = 60) -> str:
    """The beginning of a value, for a message."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return repr(text if len(text) <= width else text[:width] + "…")
