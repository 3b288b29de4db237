"""Records by index: JSONL (.gz, .zst too), JSON, Parquet, CSV, TSV; folders, globs, hub data sets.

Random access (index -> dict) is what makes shuffling and resuming a matter of arithmetic.
A new format is one function `path -> reader` and one line in `READERS`. A reader has a length,
gives the record at an index, and says by `where` which line or row of the file that is.
"""

import codecs
import csv
import glob
import hashlib
import io
import json
import mmap
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from sftjax.data.records.protocols import Reader
from sftjax.errors import DataError

COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
BIG_FILE = 1 << 30  # bytes; above this a file is known by size and time, not by its content


class Source(Sequence):
    """The records of several files, one after the other."""

    def __init__(self, readers: Sequence[Reader], limit: int = 0) -> None:
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
                f"the row is {_excerpt(record)} ({type(record).__name__}), expected an object "
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
            digest.update(_file_hash(reader.path).encode())
            digest.update(getattr(reader, "lists", "").encode())
        return digest.hexdigest()

    def _locate(self, i):
        i = i + len(self) if i < 0 else i
        if not 0 <= i < len(self):
            raise IndexError(f"record {i} of {len(self)}")
        part = bisect_right(self._ends, i)
        return self.readers[part], i - (self._ends[part - 1] if part else 0)


def open_source(spec: str, limit: int = 0) -> Source:
    """Open records for random access.

    Args:
      spec: comma-separated files, globs, folders, or a hub data set id `org/name`, with `:split`
        where it isn't `train`. Of a folder, all data files are read. `#paragraphs.qas` after any
        of them: a record for each element of these nested lists, with the keys of what holds it.
      limit: use only the first so many records; 0 = all.

    Raises: DataError if a file is absent, empty, malformed or of an unknown kind.
    """
    readers: list[Reader] = []
    for part in str(spec or "").split(","):
        with _readable(part.strip()):
            files, _, lists = (part, "", "") if Path(part.strip()).exists() else part.partition("#")
            opened = [_open(path) for path in (_find(files) if files.strip() else [])]
        readers += [Nested(reader, lists.strip()) for reader in opened] if lists else opened
    if not readers:
        fix = "set data.train=FILE (JSONL, JSON, Parquet, CSV)"
        raise DataError("no data file is named", fix, joint=": ", kind="setting")
    return Source(readers, limit)


def _find(part) -> list[Path]:
    part = part.strip()
    path = Path(part).expanduser()
    if path.is_dir():
        return _folder_files(path)
    if path.exists():
        return [path]
    found = sorted(glob.glob(str(path), recursive=True))
    if found:
        return [Path(f) for f in found]
    is_hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+)?", part)
    if is_hub_id and kind(path) not in READERS:
        return _hub_files(*part.partition(":")[::2])
    fix = "check data.train and data.validation"
    raise DataError("no such file", fix, where=part, kind="no_file")


def _data_files(folder):
    files = sorted(folder.rglob("*"))
    return [f for f in files if kind(f) in READERS and not f.name.startswith(".")]


def _folder_files(folder):
    files = _data_files(folder)
    names = ", ".join(f.name for f in files[:8])
    if not files:
        problem = f"no data file in this folder (known: {', '.join(READERS)})"
        raise DataError(problem, where=folder, kind="no_file")
    if len({_split_of(f.name) for f in files}) > 1:
        problem, fix = f"{folder} holds several splits ({names})", "name the files to use"
        raise DataError(problem, fix, joint=": ", kind="mixed_splits")
    return files


def _split_of(name):
    """Which split a file's name tells: mixing test rows into training must not happen unseen."""
    splits = ("train", "test", "validation", "valid", "val", "dev", "eval")
    return next((w for w in re.split(r"[^a-z]+", name.lower()) if w in splits), "")


def _hub_files(repo, split):
    try:
        from huggingface_hub import snapshot_download

        patterns = ["*" + extension for extension in READERS]
        folder = snapshot_download(repo, repo_type="dataset", allow_patterns=patterns)
    except Exception as error:
        raise DataError(
            f"no such local file, and as a hub data set it can't be fetched: {error}",
            where=repo,
            kind="no_file",
        ) from error
    files = _data_files(Path(folder))
    names = [str(f.relative_to(folder)) for f in files]
    known = ("train", "") if not split else ()
    pairs = zip(files, names, strict=True)
    wanted = [f for f, n in pairs if _split_of(n) in known or (split and split in n)]
    if not wanted:
        some = ", ".join(names[:8])
        problem = f"no file of split {split or 'train'!r}; it holds: {some}"
        raise DataError(problem, where=repo, kind="no_file")
    return wanted


def find_files(spec: str) -> list[Path]:
    """The files of a spec, see `open_source`. Raises: DataError if one is absent."""
    return [path for part in str(spec or "").split(",") if part.strip() for path in _find(part)]


def kind(path: Path) -> str:
    """The suffix that says how a file is read: ".parquet", ".jsonl.gz"."""
    compressed = path.suffix.lower() in COMPRESSED
    return "".join(path.suffixes[-2:] if compressed else path.suffixes[-1:]).lower()


def _open(path):
    if kind(path) not in READERS:
        problem = f"unknown kind of file {kind(path)!r}; known: {', '.join(READERS)}"
        raise DataError(problem, where=path, kind="unknown_format")
    if path.stat().st_size == 0:
        raise DataError("the file is empty", where=path, kind="no_rows")
    reader = READERS[kind(path)](path)
    if len(reader) == 0:
        raise DataError("the file holds no row", where=path, kind="no_rows")
    return reader


@contextmanager
def _readable(name):
    """The system's own errors, such as a missing permission, as errors of the data."""
    try:
        yield
    except OSError as error:
        raise unreadable(name, "data", error) from None


def unreadable(path: Path | str, what: str, error: Exception) -> DataError:
    """The error of a file that can't be read as the kind of file, `what`, that it should be."""
    return DataError(f"not a readable {what} file: {error}", where=path, kind="unreadable")


class JsonLines:
    """One JSON object a line, found through an index of line starts; blank lines are skipped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.suffix.lower() in COMPRESSED:
            with open_bytes(path) as file:
                self._bytes: bytes | mmap.mmap = file.read()
        else:
            with open(path, "rb") as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        starts = _line_starts(self._bytes)
        stops = np.append(starts[1:], len(self._bytes))
        first = np.frombuffer(self._bytes, np.uint8)[starts]
        filled = np.ones(len(starts), bool)
        for line in np.flatnonzero(np.isin(first, list(b" \t\r\n"))):
            filled[line] = bool(self._bytes[starts[line] : stops[line]].strip())
        self._lines = np.flatnonzero(filled)
        self._starts, self._stops = starts[filled], stops[filled]

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, i: int) -> Any:
        return parse_line(self._bytes[self._starts[i] : self._stops[i]], self.where(i))

    def where(self, i: int) -> str:
        """The file and line of record `i`."""
        return f"{self.path}:{self._lines[i] + 1}"


_ENDS = {
    "Expecting value": ("]", "array"),
    "Expecting property name enclosed in double quotes": ("}", "object"),
}


def loads(text: str) -> Any:
    """json.loads, whose error names a trailing comma in every Python, as it does since 3.13."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        end, kind = _ENDS.get(error.msg, ("", ""))
        before = text[: error.pos].rstrip(" \t\r\n")
        if end and text[error.pos :].startswith(end) and before.endswith(","):
            message = f"Illegal trailing comma before end of {kind}"
            raise json.JSONDecodeError(message, text, len(before) - 1) from None
        raise


def parse_line(line: bytes, where: str) -> Any:
    """The value of one line of JSON. Raises: DataError."""
    try:
        return loads(line.removeprefix(codecs.BOM_UTF8).decode().rstrip("\r\n"))
    except json.JSONDecodeError as error:
        raise _malformed(where, error) from None
    except UnicodeDecodeError as error:
        raise _not_utf8(where, error) from None
    except (ValueError, RecursionError) as error:  # a number too long, or nested too deeply
        raise _not_read(where, error) from None


@contextmanager
def open_bytes(path: Path) -> Iterator[io.BufferedReader]:
    """A binary file to read, decompressed where the name ends in .gz or .zst."""
    compression = COMPRESSED.get(path.suffix.lower())
    if compression is None:
        with _readable(path):
            file = open(path, "rb")  # noqa: SIM115 (an error of its reader is not one of opening)
        with file:
            yield file
        return
    import pyarrow as pa

    try:
        with io.BufferedReader(pa.input_stream(path, compression=compression)) as file:
            yield file
    except OSError as error:
        raise unreadable(path, compression, error) from None


def _line_starts(data, chunk=1 << 26):
    found = [np.zeros(1, np.int64)]
    for at in range(0, len(data), chunk):
        block = np.frombuffer(data, np.uint8, min(chunk, len(data) - at), at)
        found.append(np.flatnonzero(block == ord("\n")) + at + 1)
    starts = np.concatenate(found)
    return starts[starts < len(data)]


class Table:
    """Rows in memory, with what `where` says of each."""

    def __init__(
        self, path: Path, rows: Sequence[Any], places: Sequence[int] | None = None
    ) -> None:
        self.path, self._rows, self._places = path, rows, places

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> Any:
        return self._rows[i]

    def where(self, i: int) -> str:
        """The file and the place of record `i`: what `places` says, else its number."""
        return f"{self.path}:{self._places[i] if self._places else i + 1}"


def _read_json(path):
    try:
        text = path.read_text(encoding="utf-8-sig")
        data = loads(text)
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error) from None
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text[: error.pos].count("\n") <= 1:
            return JsonLines(path)  # JSON lines under the name .json, as many tools write them
        raise _malformed(f"{path}:{error.lineno}", error) from None
    except (ValueError, RecursionError) as error:
        raise _not_read(path, error) from None
    lists = [v for v in data.values() if isinstance(v, list)] if isinstance(data, dict) else [data]
    if len(lists) != 1 or not isinstance(lists[0], list):
        raise DataError(
            "expected a list of objects, or an object with one list such as "
            f'{{"data": [...]}}; found {_excerpt(data)}',
            "One object per line belongs in .jsonl",
            joint=". ",
            where=path,
            kind="bad_table",
        )
    return Table(path, lists[0])


class Nested:
    """A record for each element of the nested lists `lists`, a dotted name, in another's rows."""

    def __init__(self, reader: Reader, lists: str) -> None:
        self.path, self.lists, self._reader = reader.path, lists, reader
        names = lists.split(".")
        self._at = [
            (row, at)
            for row in range(len(reader))
            for at in _elements(reader[row], names, reader.where(row))
        ]
        if not self._at:
            problem = f"#{lists} holds no element in any row"
            raise DataError(problem, where=self.path, kind="no_rows")

    def __len__(self) -> int:
        return len(self._at)

    def __getitem__(self, i: int) -> dict[str, Any]:
        row, at = self._at[i]
        record = element = self._reader[row]
        for name, n in zip(self.lists.split("."), at, strict=True):
            element = element[name][n]
            record = {k: v for k, v in record.items() if k != name} | element
        return record

    def where(self, i: int) -> str:
        """The place of the row, and the element in it: "file.json:1#paragraphs.0.qas.2"."""
        row, at = self._at[i]
        names = zip(self.lists.split("."), at, strict=True)
        return f"{self._reader.where(row)}#{'.'.join(f'{name}.{n}' for name, n in names)}"


def _elements(value, names, where):
    """The indices of all elements of the nested lists in one row."""
    if not isinstance(value, dict):
        raise _no_list(f"{_excerpt(value)} is no object", "an element", where)
    if not names:
        return [()]
    inner = value.get(names[0])
    if not isinstance(inner, list):
        raise _no_list(f"#{names[0]} is {_excerpt(inner)}", repr(names[0]), where)
    return [(n, *at) for n, e in enumerate(inner) for at in _elements(e, names[1:], where)]


def _no_list(found, subject, where):
    problem = f"{found}, expected a list of objects"
    return DataError(problem, where=where, kind="wrong_type", subject=subject)


class Parquet:
    """A Parquet file, memory-mapped; a row becomes a dict when it is asked for."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.path = path
        try:
            self._table = pq.read_table(path, memory_map=True)
        except (pa.ArrowInvalid, OSError) as error:
            raise unreadable(path, "Parquet", error) from None

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, i: int) -> dict[str, Any]:
        columns = zip(self._table.column_names, self._table.columns, strict=True)
        return {name: column[i].as_py() for name, column in columns}

    def where(self, i: int) -> str:
        """The file and row number of record `i`."""
        return f"{self.path}:{i + 1}"


def _read_table(path, **dialect: Any):
    csv.field_size_limit(1 << 30)  # the library's 128 kB is shorter than some documents
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True, **dialect)
            lines = [(reader.line_num, row) for row in reader if row]
    except csv.Error as error:
        where = f"{path}:{reader.line_num}"
        raise DataError(f"malformed: {error}", where=where, kind="bad_table") from None
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error) from None
    names = lines[0][1] if lines else []
    if len(set(names)) < len(names):
        problem = f"the header names a column twice: {names}"
        raise DataError(problem, where=f"{path}:{lines[0][0]}", kind="bad_table")
    for line, row in lines[1:]:
        if len(row) != len(names):
            raise DataError(
                f"{len(row)} fields, but the header has {len(names)} ({', '.join(names)}); the "
                f"row begins {_excerpt(row[0])}",
                where=f"{path}:{line}",
                kind="bad_table",
            )
    rows = [dict(zip(names, row, strict=True)) for _, row in lines[1:]]
    return Table(path, rows, [line for line, _ in lines[1:]])


def _read_tsv(path):
    # A tab-separated file has no quoting: in GLUE's files a field may begin with a lone quote.
    return _read_table(path, delimiter="\t", quoting=csv.QUOTE_NONE)


READERS = {
    ".jsonl": JsonLines,
    ".ndjson": JsonLines,
    ".json": _read_json,
    ".parquet": Parquet,
    ".csv": _read_table,
    ".tsv": _read_tsv,
    ".jsonl.gz": JsonLines,
    ".jsonl.zst": JsonLines,
}


def _malformed(where, error):
    near = error.doc[max(0, error.pos - 20) : error.pos + 20].strip("\r\n")
    problem = f"malformed JSON at column {error.colno}: {error.msg}, near {near!r}"
    fix = "expected JSON, in .jsonl one object per line"
    return DataError(problem, fix, where=where, kind="bad_json")


def _not_read(where, error):
    return DataError(f"JSON that can't be read: {error}", where=where, kind="bad_json")


def _not_utf8(where, error):
    problem, fix = f"not UTF-8 at byte {error.start}", "save the file as UTF-8"
    return DataError(problem, fix, joint=": ", where=where, kind="not_utf8")


def _excerpt(value, width=60):
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return repr(text if len(text) <= width else text[:width] + "…")


def _file_hash(path):
    stat = path.stat()
    if stat.st_size > BIG_FILE:
        known = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"
        return hashlib.sha256(known.encode()).hexdigest()
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
