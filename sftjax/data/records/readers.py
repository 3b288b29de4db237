"""Files of many kinds, each to records by index, or one after the other.

A new format is one function `path -> reader` and one line in `READERS`. A reader has a length, gives the record at an
index, and says by `where` which line or row of the file that is. If it can also be streamed, `stream(path, start)`
gives (row number, record or line of JSON) one after the other from row `start` on, without the whole file in memory.
"""

import codecs
import csv
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

from sftjax.data.records import failures, images
from sftjax.data.records.failures import excerpt, readable
from sftjax.errors import DataError
from sftjax.terminal import warn

COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
# A compressed file may grow to so many bytes, and by so many times its size. Text grows 3 to 20 times; a file made to
# fill memory and disks grows a thousand times and more.
GROWTH_BYTES, GROWTH = 1 << 26, 100
PARQUET_GROWTH = 1000  # its columns are of one kind each, and compress better


class JsonLines:
    """One JSON object a line, found through an index of the lines; blank ones are skipped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._bytes: bytes | mmap.mmap
        with open_bytes(path) as file:
            if path.suffix.lower() in COMPRESSED:
                self._bytes = file.read()
                found = _filled_lines(io.BytesIO(self._bytes))
            else:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                found = _filled_lines(file)
            self._lines = np.fromiter(found, np.dtype((np.int64, 3)))

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, i: int) -> Any:
        _, start, stop = self._lines[i]
        return parse_line(self._bytes[start:stop], self.where(i))

    def where(self, i: int) -> str:
        """The file and line of record `i`."""
        return f"{self.path}:{self._lines[i, 0] + 1}"

    @staticmethod
    def stream(path: Path, start: int) -> Iterator[tuple[int, bytes]]:
        """(line number from 0, line) of the lines from `start` on that aren't blank."""
        with open_bytes(path) as file:
            yield from ((row, x) for row, x in enumerate(file) if row >= start and x.strip())


def _filled_lines(file):
    """(line number from 0, start, stop) of the lines that aren't blank."""
    start = 0
    for number, line in enumerate(file):
        if line.strip():
            yield number, start, start + len(line)
        start += len(line)


def parse_line(line: bytes, where: str) -> Any:
    """The value of one line of JSON. Raises: DataError."""
    try:
        return json.loads(line.removeprefix(codecs.BOM_UTF8).decode().rstrip("\r\n"))
    except (ValueError, RecursionError) as error:  # also a number too long, or nested too deeply
        raise failures.not_json(where, error) from None


@contextmanager
def open_bytes(path: Path) -> Iterator[io.BufferedReader]:
    """A binary file to read, decompressed where the name ends in .gz or .zst."""
    compression = COMPRESSED.get(path.suffix.lower())
    if compression is None:
        with readable(path):
            file = open(path, "rb")  # noqa: SIM115 (an error of its reader is not one of opening)
        with file:
            yield file
        return
    import pyarrow as pa

    limited: Any = _Limited  # typeshed has a reader of its own
    with (
        readable(path, compression),
        pa.input_stream(path, compression=compression) as stream,
        io.BufferedReader(limited(path, stream), 1 << 20) as file,
    ):
        yield file


class _Limited(io.RawIOBase):
    """The bytes of a compressed file, up to the limit of its growth."""

    def __init__(self, path, stream) -> None:
        self._path, self._stream, self._read = path, stream, 0
        self._most = GROWTH_BYTES + GROWTH * path.stat().st_size

    def readable(self):
        return True

    def readinto(self, buffer):
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        self._read += len(data)
        if self._read > self._most:
            raise _grown(self._path, f"more than {self._most:,} bytes", GROWTH)
        return len(data)


def _grown(path, found, growth):
    problem = f"unpacked, the file has {found}, over {growth} times its size"
    fix = "if it is meant to, unpack it first and name the unpacked file"
    if path.suffix.lower() in COMPRESSED:
        tool = "gunzip -k" if path.suffix.lower() == ".gz" else "zstd -d"
        fix = f"if it is meant to, unpack it first ({tool} {path.name}) and name {path.stem}"
    return DataError(problem, fix, where=path, kind="grown")


class Table:
    """Rows in memory, with what `where` says of each.

    A line of JSON among them is parsed when it is asked for, so that a bad one is an error of its own row. A place is
    the number of a line, or a file with it. lists: as of `nested`.
    """

    def __init__(
        self, path: Path | str, rows: Sequence[Any], places: Sequence[int | str] | None = None, lists: str = ""
    ) -> None:
        self.path, self._rows, self._places, self.lists = path, rows, places, lists

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> Any:
        row = self._rows[i]
        return parse_line(row, self.where(i)) if isinstance(row, bytes) else row

    def where(self, i: int) -> str:
        """The file and the place of record `i`: what `places` says, else its number."""
        place = self._places[i] if self._places else i + 1
        return place if isinstance(place, str) else f"{self.path}:{place}"


def _read_json(path):
    try:
        text = path.read_text(encoding="utf-8-sig")
        data = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text[: error.pos].count("\n") <= 1:
            return JsonLines(path)  # JSON lines under the name .json, as many tools write them
        raise failures.not_json(f"{path}:{error.lineno}", error) from None
    except (ValueError, RecursionError) as error:
        raise failures.not_json(path, error) from None
    lists = [v for v in data.values() if isinstance(v, list)] if isinstance(data, dict) else [data]
    if len(lists) != 1 or not isinstance(lists[0], list):
        raise DataError(
            f'expected a list of objects, or an object with one list such as {{"data": [...]}}; found {excerpt(data)}',
            "one object per line belongs in .jsonl",
            where=path,
            kind="bad_table",
        )
    return Table(path, lists[0])


def nested(reader: Any, lists: str) -> Table:
    """A record for each element of the nested lists `lists`, a dotted name, in a reader's rows.

    Its place is the row's, and the element in it: "file.json:1#paragraphs.0.qas.2".
    """
    found = []
    for row in range(len(reader)):
        where = reader.where(row)
        found += _elements({}, reader[row], lists.split("."), where, f"{where}#")
    if not found:
        raise DataError(f"#{lists} holds no element in any row", where=reader.path, kind="no_rows")
    places, rows = zip(*found, strict=True)
    return Table(reader.path, rows, places, lists)


def _elements(outer, value, names, where, place):
    """(place, record) of all elements of the nested lists in a value, with what `outer` holds."""
    if not isinstance(value, dict):
        raise _no_list(f"{excerpt(value)} is no object", "an element", where)
    record = outer | value
    if not names:
        return [(place.rstrip("."), record)]
    inner = value.get(names[0])
    if not isinstance(inner, list):
        raise _no_list(f"#{names[0]} is {excerpt(inner)}", repr(names[0]), where)
    del record[names[0]]
    places = (f"{place}{names[0]}.{n}." for n in range(len(inner)))
    return [one for e, at in zip(inner, places, strict=True) for one in _elements(record, e, names[1:], where, at)]


def _no_list(found, subject, where):
    return DataError(f"{found}, expected a list of objects", where=where, kind="wrong_type", subject=subject)


class Columns:
    """Rows of an Arrow table; a row becomes a dict when it is asked for."""

    def __init__(self, path: Path, table: Any) -> None:
        self.path, self._parts = path, table.to_batches()
        self._ends = np.cumsum([len(part) for part in self._parts]).tolist()
        self._sound = dict[int, bool]()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, i: int) -> dict[str, Any]:
        n = bisect_right(self._ends, i)
        row = self._parts[n].slice(i - (self._ends[n - 1] if n else 0), 1)
        if n not in self._sound:  # read through once, where its rows are read anyway
            self._sound[n] = not _damage(self._parts[n])
        if not self._sound[n] and (problem := _damage(row)):
            raise DataError(problem, where=self.where(i), kind="unreadable")
        return _records(row, self.where(i))[0]

    def where(self, i: int) -> str:
        """The file and row number of record `i`."""
        return f"{self.path}:{i + 1}"


def _damage(rows):
    """What is wrong with a part of an Arrow table, whose file may say that a text lies anywhere."""
    import pyarrow as pa

    try:
        rows.validate(full=True)
    except pa.ArrowException as error:
        return f"damaged: {error}"
    return ""


def _records(rows, where):
    """The rows as dicts; Python has no date of the year 300,000, and no half of a character."""
    try:
        records = rows.to_pylist()
    except (ValueError, OverflowError) as error:
        raise DataError(f"not read: {error}", where=where, kind="unreadable") from None
    return [{name: unfilled(value) for name, value in record.items()} for record in records]


def unfilled(value: Any) -> Any:
    """A value of a column without the nulls of structs.

    Arrow gives all structs of a column the same fields, and fills those that a row has not with nulls: a message would
    have tool calls, a call the arguments of all other calls. Nulls of lists and columns are the file's own.
    """
    if isinstance(value, dict):
        return {key: unfilled(inner) for key, inner in value.items() if inner is not None}
    return [unfilled(inner) for inner in value] if isinstance(value, list) else value


def _rows(path, batches, start):
    """(row number from 0, record) of the rows from `start` on."""
    first = 0
    for batch in batches:
        if first + len(batch) > start:
            if problem := _damage(batch):
                raise DataError(problem, where=path, kind="unreadable")
            for row, record in enumerate(_records(batch, path), first):
                if row >= start:
                    yield row, record
        first += len(batch)


class Parquet(Columns):
    """A Parquet file, memory-mapped."""

    def __init__(self, path: Path) -> None:
        import pyarrow.parquet as pq

        with _arrow(path, "Parquet"):
            _check_growth(path, pq.read_metadata(path))
            super().__init__(path, pq.read_table(path, memory_map=True))

    @staticmethod
    def stream(path: Path, start: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """(row number from 0, record) of the rows from `start` on; one part of a group is held."""
        import pyarrow.parquet as pq

        with _arrow(path, "Parquet"), pq.ParquetFile(path) as file:
            _check_growth(path, file.metadata)
            yield from _rows(path, file.iter_batches(1000), start)


class Arrow(Columns):
    """A file of Arrow's own formats, memory-mapped: a stream, as `datasets` saves it, or a file."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa

        with _arrow(path, "Arrow"):
            super().__init__(path, pa.Table.from_batches(*_batches(path)))

    @staticmethod
    def stream(path: Path, start: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """(row number from 0, record) of the rows from `start` on."""
        with _arrow(path, "Arrow"):
            yield from _rows(path, _batches(path)[0], start)


def _batches(path):
    """The record batches of an Arrow file, which read nothing yet, and their schema."""
    import pyarrow as pa

    file = pa.memory_map(str(path))
    if file.read(6) == b"ARROW1":
        reader = pa.ipc.open_file(file)
        found = (reader.get_batch(n) for n in range(reader.num_record_batches))
    else:
        file.seek(0)
        reader = found = pa.ipc.open_stream(file)
    return found, reader.schema


def _check_growth(path, metadata):
    size = sum(group.total_byte_size for group in map(metadata.row_group, range(metadata.num_row_groups)))
    if size > GROWTH_BYTES + PARQUET_GROWTH * path.stat().st_size:
        raise _grown(path, f"{size:,} bytes", PARQUET_GROWTH)


def _arrow(path, what):
    """Arrow's errors of a file as errors of the data."""
    import pyarrow as pa

    return readable(path, what, (pa.ArrowException, OSError, UnicodeDecodeError))  # of names, too


def _read_table(path, **dialect: Any):
    csv.field_size_limit(1 << 30)  # the library's 128 kB is shorter than some documents
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True, **dialect)
            lines = [(reader.line_num, row) for row in reader if row]
    except csv.Error as error:
        raise DataError(f"malformed: {error}", where=f"{path}:{reader.line_num}", kind="bad_table") from None
    except UnicodeDecodeError as error:
        raise failures.not_utf8(path, error) from None
    names = lines[0][1] if lines else []
    if len(set(names)) < len(names):
        raise DataError(f"the header names a column twice: {names}", where=f"{path}:{lines[0][0]}", kind="bad_table")
    for line, row in lines[1:]:
        if len(row) != len(names):
            raise DataError(
                f"{len(row)} fields, but the header has {len(names)} ({', '.join(names)}); the "
                f"row begins {excerpt(row[0])}",
                where=f"{path}:{line}",
                kind="bad_table",
            )
    return Table(path, [dict(zip(names, row, strict=True)) for _, row in lines[1:]], [line for line, _ in lines[1:]])


# A field in quotes, and what is between them.
QUOTED = re.compile(r'(?<![^\t\r\n])"((?:[^"]++|"")*+)"(?![^\t\r\n])')


def _read_tsv(path):
    """A file of one of two dialects, told by its fields.

    Most tab-separated files have no quoting: in GLUE's a field may begin with a lone quote. Those of pandas and of
    spreadsheets have it as CSV does, and then every quote is in a quoted field.
    """
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
        quoted = _is_quoted(file.read())
    if quoted:
        return _read_table(path, delimiter="\t")
    table = _read_table(path, delimiter="\t", quoting=csv.QUOTE_NONE)
    wrapped = [i for i in range(len(table)) if any(len(v) > 1 and v[0] == v[-1] == '"' for v in table[i].values())]
    if wrapped:
        warn(
            "fields that are wrapped in quotes are read with their quotes, as others have quotes of"
            f" their own: in {len(wrapped)} row{'s' * (len(wrapped) > 1)}, first in " + table.where(wrapped[0])
        )
    return table


def _is_quoted(text):
    """Is each quote of the text in a field that CSV would quote, and some field in need of it?"""
    inside, rest = QUOTED.findall(text), QUOTED.sub("\0", text)
    lines, rows = ({line.count("\t") for line in re.split(r"[\r\n]+", x) if line} for x in (text, rest))
    if not inside or '"' in rest or len(rows) > 1:
        return False
    if re.search(r"[\t\r\n]", "".join(inside)):
        # Where lone quotes begin and end fields, what is between them may look like one field.
        return len(lines) > 1
    return set(rest) <= set("\0\t\r\n") or any('"' in field for field in inside)


READERS: dict[str, Any] = {
    ".jsonl": JsonLines,
    ".ndjson": JsonLines,
    ".json": _read_json,
    ".parquet": Parquet,
    ".arrow": Arrow,
    ".csv": _read_table,
    ".tsv": _read_tsv,
    ".jsonl.gz": JsonLines,
    ".jsonl.zst": JsonLines,
    ".json.gz": JsonLines,  # as C4 and others name their JSON lines
    ".json.zst": JsonLines,
    ".tar": images.Tar,
}
