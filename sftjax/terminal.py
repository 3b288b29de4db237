"""What is printed: texts of users and models, with nothing in them that would drive a terminal.

An answer, a test set, a template's error or a file's name may hold escape sequences: they move the cursor, set the
clipboard (OSC 52) or write over a line, and marks of direction show text in another order than it has. All of that is
shown as its escape. Only this file prints.
"""

import json
import logging
import re
import sys
from collections.abc import Callable, Container, Iterable, Sequence
from typing import TextIO

# The control characters but newline and tab (C0, delete, C1), what turns the direction of text or can't be seen at all,
# other ends of lines, halves of surrogate pairs, and the invisible tags.
_DRIVING = re.compile(
    "[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    "\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def in_json(character: str) -> str:
    r"""How JSON writes a character: "\u202e"."""
    return json.dumps(character)[1:-1]


def printable(text: object, escape: Callable[[str], str] = _escaped) -> str:
    r"""Text with what would drive a terminal as its escape, "\x1b"; in JSON by `in_json`."""
    return _DRIVING.sub(lambda match: escape(match[0]), str(text))


def json_text(value: object) -> str:
    """A value as indented JSON that can be printed."""
    return printable(json.dumps(value, indent=1, allow_nan=False), in_json)


def columns(rows: Iterable[Sequence[object]], right: Container[int] = ()) -> str:
    """Rows of as many cells each as aligned lines. right: the columns whose cells end together."""
    texts = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    sides = [f">{w}" if i in right else f"<{w}" for i, w in enumerate(widths)]
    lines = ("  ".join(map(format, row, sides)).rstrip() for row in texts)
    return "\n".join(lines)


def show(text: object = "", file: TextIO | None = None) -> None:
    """Print a text of anybody's, at once. file: None = standard output."""
    print(printable(text), file=file or sys.stdout, flush=True)


def warn(text: object) -> None:
    """Log a warning, which is a line on standard error unless the program has it otherwise."""
    logging.getLogger("sftjax").warning("%s", printable(text))
