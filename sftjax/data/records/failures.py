"""The errors of files and rows that can't be read, in words."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sftjax.errors import DataError


@contextmanager
def readable(path: Path | str, what: str = "data", errors: tuple[type[Exception], ...] = (OSError,)) -> Iterator[None]:
    """Turn errors, such as a missing permission, into those of a file that is no `what`."""
    try:
        yield
    except errors as error:
        raise DataError(f"not a readable {what} file: {error}", where=path, kind="unreadable") from None


@contextmanager
def located(where: Path | str = "", inside: str = "") -> Iterator[None]:
    """Give a DataError its place, unless it has one, and what of a row it is in: "message 2: "."""
    try:
        yield
    except DataError as error:
        error.where = error.where or str(where)
        error.problem = inside + error.problem
        raise


def not_json(where: str | Path, error: ValueError | RecursionError) -> DataError:
    """The error of a text that is not UTF-8, of JSON that does not parse, or that is too deep."""
    if isinstance(error, UnicodeDecodeError):
        return not_utf8(where, error)
    if not isinstance(error, json.JSONDecodeError):
        return DataError(f"JSON that can't be read: {error}", where=where, kind="bad_json")
    near = error.doc[max(0, error.pos - 20) : error.pos + 20].strip("\r\n")
    problem = f"malformed JSON at column {error.colno}: {error.msg}, near {near!r}"
    return DataError(problem, "expected JSON, in .jsonl one object per line", where=where, kind="bad_json")


def not_utf8(where: str | Path, error: UnicodeDecodeError) -> DataError:
    """The error of a text that is not UTF-8."""
    return DataError(f"not UTF-8 at byte {error.start}", "save the file as UTF-8", where=where, kind="not_utf8")


def excerpt(value: Any) -> str:
    """The beginning of a value, for a message."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return repr(text if len(text) <= 60 else text[:60] + "…")
