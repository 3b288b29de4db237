"""Files that are read with a limit, and text files that are written whole or not at all."""

import contextlib
import importlib.util
import json
import math
import os
import re
import stat
import uuid
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from sftjax.errors import ConfigError, UserError, writing

JSON_BYTES = 1 << 28  # no config, index or tokenizer has more


def write_atomic(path: Path | str, text: str) -> None:
    """Write a UTF-8 file, and its folder, whole or not at all (WriteError); others may at once."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # on the same disk
    with writing("the file", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)  # of a write that failed


def load_python(path: str, key: str) -> ModuleType:
    """The module of a Python file, which is run. Raises: ConfigError, by its key, without one."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if not Path(path).is_file() or spec is None or spec.loader is None:
        raise ConfigError(f"{key}: {path} is no Python file, NAME.py, that is there")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_URL = re.compile(r"\s*([A-Za-z][A-Za-z0-9+.-]+):/")  # one letter is a drive; pathlib halves a "//"
_INSTEAD = {
    "hf": "write the hub id alone, org/name",
    "file": "write the path alone",
    "gs": "mount the bucket (gcsfuse), or copy it, and name the folder",
    "s3": "mount the bucket, or copy it, and name the folder",
}


def url_problem(text: object) -> str:
    """What is wrong with a URL where a path is expected, which pathlib would take; "" of no URL."""
    match = _URL.match(str(text))
    if match is None:
        return ""
    scheme = match[1].lower()
    instead = _INSTEAD.get(scheme, "fetch it first, and name the file or folder")
    return f"{scheme}:// is not read or written, only local paths and hub ids are; {instead}"


def refuse_url(what: str, path: object, error: type[UserError]) -> None:
    """Raise `error` if a path is a URL. what: the option that names it."""
    if problem := url_problem(path):
        raise error(f"{what}={path}: {problem}")


_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
    stat.S_IFSOCK: "a socket",
}


def check_regular(path: Path | str, error: Callable[[str], UserError], most: float = float("inf")) -> int:
    """The size of a file in bytes, once it is known that reading it comes to an end.

    A named pipe would hang, a device such as /dev/zero has no end. Raises: `error` for what is no regular file, can't
    be reached, or has more than `most` bytes.
    """
    try:
        found = os.stat(path)
    except (OSError, ValueError) as e:  # ValueError: a null character in the name
        raise error(f"{path} cannot be read: {getattr(e, 'strerror', None) or e}") from None
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "a special file")
        raise error(f"{path} is {kind}, expected a regular file")
    if found.st_size > most:
        raise error(f"{path} has {found.st_size:,} bytes, expected at most {most:,}")
    return found.st_size


def read_text(path: Path | str, error: type[UserError], most: float = float("inf")) -> str:
    """A regular file's text in UTF-8. Raises: `error`, naming the file."""
    check_regular(path, error, most)
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise error(f"{path} is not UTF-8 at byte {e.start}: {e.reason}") from None
    except OSError as e:
        raise error(f"{path} cannot be read: {e.strerror or e}") from None


def parse_json(text: str | bytes, **hooks: Any) -> Any:
    """json.loads, to which nesting that is too deep is one more ValueError."""
    try:
        return json.loads(text, **hooks)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: Path | str, error: type[UserError]) -> Any:
    """The value of a regular JSON file. Raises: `error`, naming the file."""
    text = read_text(path, error, JSON_BYTES)
    try:
        return parse_json(text)
    except ValueError as e:
        raise error(f"{path} is not valid JSON: {e}") from None


def parse_object(text: str) -> dict[str, Any]:
    """The JSON object that a text holds; {} of any other text."""
    with contextlib.suppress(ValueError):
        value = parse_json(text)
        return value if isinstance(value, dict) else {}
    return {}


def read_object(path: Path | str) -> dict[str, Any]:
    """The JSON object that a file holds; {} where it holds none, or can't be read."""
    with contextlib.suppress(UserError):
        return parse_object(read_text(path, UserError, JSON_BYTES))
    return {}


def finite(value: Any) -> Any:
    """A tree of JSON values with None for numbers that are not finite: JSON has none of them."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
