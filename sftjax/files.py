"""Text files that are written whole or not at all."""

import os
import uuid
from pathlib import Path


def write_atomic(path: Path | str, text: str) -> None:
    """Write a file in UTF-8, and its folder; who reads it finds the old text or the new one.

    Several processes may write it at once. Raises: OSError, and then the old file is as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # on the same disk
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # of a write that failed
