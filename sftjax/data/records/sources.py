"""Records by index: JSONL (.gz, .zst too), JSON, Parquet, Arrow, CSV, TSV; folders, hub data sets.

Random access (index -> dict) is what makes shuffling and resuming a matter of arithmetic. The kinds of files, and how
each is read, are in readers.py; which files of a folder, in layout.py.
"""

import functools
import glob
import hashlib
import re
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np

from sftjax.data.records import layout
from sftjax.data.records.failures import excerpt, readable
from sftjax.data.records.images import Folder
from sftjax.data.records.layout import kind
from sftjax.data.records.readers import READERS, nested
from sftjax.errors import DataError
from sftjax.files import check_regular, url_problem

BIG_FILE = 1 << 30  # bytes; above this a file is known by size and time, not by its content


class RecordSource(Protocol):
    """Records by index, whatever lies behind them: files, some rows of another source, variants."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> dict[str, Any]: ...

    def where(self, i: int, /) -> str:
        """The file and line (or row number) of record `i`."""

    def fingerprint(self) -> str:
        """A hash that changes with the records."""


class Source(Sequence):
    """The records of several files, one after the other; readers: see readers.py."""

    def __init__(self, readers: Sequence[Any], limit: int = 0) -> None:
        self.readers = readers
        self._ends = np.cumsum([len(r) for r in readers]).tolist()
        self._length = min(self._ends[-1], limit or self._ends[-1])

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, i: Any) -> Any:  # a record, or of a slice the list of them
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        reader, row = self._locate(i)
        record = reader[row]
        if not isinstance(record, dict):
            raise DataError(
                f"the row is {excerpt(record)} ({type(record).__name__}), expected an object "
                'such as {"prompt": "...", "completion": "..."}',
                where=reader.where(row),
                kind="wrong_type",
                subject="the row",
            )
        return record

    def where(self, i: int) -> str:
        """The file and line (text) or row number, both from 1, of record `i`: "file.jsonl:17"."""
        reader, row = self._locate(i)
        return reader.where(row)

    def fingerprint(self) -> str:
        """A hash of what all files hold (of path, size and time for files over 1 GB)."""
        digest = hashlib.sha256()
        for reader in self.readers:
            digest.update(_hash_of(reader).encode())
            digest.update(getattr(reader, "lists", "").encode())
        return digest.hexdigest()

    def files(self) -> list[dict[str, Any]]:
        """Of each file its name, bytes, rows and hash (as in `fingerprint`), for messages."""
        paths = [Path(reader.path) for reader in self.readers]
        short = len({path.name for path in paths}) == len(paths)
        return [
            dict(
                name=path.name if short else str(path),
                bytes=getattr(reader, "bytes", path.stat().st_size),
                rows=len(reader),
                sha256=_hash_of(reader),
            )
            for path, reader in zip(paths, self.readers, strict=True)
        ]

    def _locate(self, i):
        i = i + len(self) if i < 0 else i
        if not 0 <= i < len(self):
            raise IndexError(f"record {i} of {len(self)}")
        part = bisect_right(self._ends, i)
        return self.readers[part], i - (self._ends[part - 1] if part else 0)


def open_source(spec: str, limit: int = 0) -> Source:
    """Open records for random access.

    Args:
      spec: comma-separated files, globs, folders, or a hub data set id: `org/name`, with `:split` where it isn't
        `train`; `org/name:config` or `org/name:config/split` where it has several configurations. Of a folder, all data
        files are read. `#paragraphs.qas` after any of them: a record for each element of these nested lists, with the
        keys of what holds it.
      limit: use only the first so many records; 0 = all.

    Raises: DataError if a file is absent, empty, malformed or of an unknown kind.
    """
    readers: list[Any] = []
    for part in str(spec or "").split(","):
        with readable(part.strip()):
            files, _, lists = (part, "", "") if Path(part.strip()).exists() else part.partition("#")
            opened = [_open(path) for path in find_files(files)]
        readers += [nested(reader, lists.strip()) for reader in opened] if lists else opened
    if not readers:
        raise DataError("no data file is named", "set data.train=FILE (JSONL, JSON, Parquet, CSV)", kind="setting")
    return Source(readers, limit)


def _find(part) -> list[Path]:
    part = part.strip()
    if problem := url_problem(part):
        raise DataError(problem, where=part, kind="no_file")
    path = Path(part).expanduser()
    if path.is_dir():
        return layout.of_folder(path)
    if path.exists():
        return [path]
    if found := sorted(glob.glob(str(path), recursive=True)):
        return [Path(f) for f in found]
    is_hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.+-]+(/[\w.+-]+)?)?", part)
    if is_hub_id and kind(path) not in READERS:
        return _hub_files(*part.partition(":")[::2])
    raise DataError("no such file", "check data.train and data.validation", where=part, kind="no_file")


def _hub_files(repo, asked):
    try:
        from huggingface_hub import snapshot_download

        patterns = ["*" + extension for extension in READERS] + ["README.md"]
        folder = snapshot_download(repo, repo_type="dataset", allow_patterns=patterns)
    except Exception as error:
        raise DataError(
            f"no such local file, and as a hub data set it can't be fetched: {error}", where=repo, kind="no_file"
        ) from error
    return layout.chosen(repo, Path(folder), asked)


def find_files(spec: str) -> list[Path]:
    """The files of a spec, see `open_source`. Raises: DataError if one is absent."""
    return [path for part in str(spec or "").split(",") if part.strip() for path in _find(part)]


def _open(path):
    if path.is_dir():
        return _one_split(Folder(path))
    if kind(path) not in READERS:
        problem = f"unknown kind of file {kind(path)!r}; known: {', '.join(READERS)}"
        raise DataError(problem, where=path, kind="unknown_format")
    if check_regular(path, lambda problem: DataError(problem, kind="unreadable")) == 0:
        raise DataError("the file is empty", where=path, kind="no_rows")
    reader = READERS[kind(path)](path)
    if len(reader) == 0:
        raise DataError("the file holds no row", where=path, kind="no_rows")
    return _one_split(reader)


def _one_split(reader):
    """A reader of images, if these do not all lie in folders of several splits."""
    found = {layout.split_of(PurePosixPath(name)) for name in getattr(reader, "files", ())}
    if len(found) > 1 and "" not in found:
        problem = f"{reader.path} holds several splits ({', '.join(sorted(found))})"
        raise DataError(problem, "name the folder of one of them", kind="mixed_splits")
    return reader


def _hash_of(reader):
    if hasattr(reader, "digest"):
        return reader.digest()
    path = reader.path
    stat = Path(path).stat()
    return _hash(Path(path).resolve(), stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(4096)  # a run asks several times; its files are read once
def _hash(path, size, changed):
    if size > BIG_FILE:
        return hashlib.sha256(f"{path} {size} {changed}".encode()).hexdigest()
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
