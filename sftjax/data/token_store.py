"""Tokenise once into memory-mapped arrays, cached under a hash of everything that changes them.

What an example is, how it is cut and what is counted of it is the task's to say: see tasks/base.py.
"""

import contextlib
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sftjax.data.packing.truncate import OVERLONG, describe
from sftjax.data.records.rejects import Notes, Rejects, check, said
from sftjax.data.records.sources import RecordSource
from sftjax.errors import DataError
from sftjax.terminal import warn

if TYPE_CHECKING:
    from sftjax.tasks.base import Task

FORMAT = 7  # of the files below; part of the cache's key
CHUNK = 1000  # records in one call of the tokenizer
COLUMNS = {"tokens": ("int32", None), "weights": ("float32", None)}
OWN = (-1,)  # the shape of a column with any number of values, not one a token: the bytes of images
BUILDING = ".building-"  # prefix of a store being written
STALE = 3600  # seconds; a process that builds one writes to it after every chunk
SUFFIXES = {"int32": "i32", "float32": "f32", "uint8": "u8"}


class TokenStore:
    """Examples in a folder of memory-mapped arrays.

    columns: {name: (dtype, shape)} of an example's arrays, in order; shape None is one value a token, whose number
    differs from document to document; OWN any number of values.

    Attributes:
      arrays: {name: all examples' values, one after the other}; those of a fixed shape stacked.
      tokens: int32 [all tokens], and weights: float32 [all tokens], is each token itself trained, not shifted; where
        there are columns of these names.
      offsets: int64 [documents + 1], document i is tokens[offsets[i]:offsets[i + 1]].
      lengths: int32 [documents]; 1 where no column has a value a token.
      records: int64 [documents], the index in its source of the record that each came from.
      report: what was read, dropped and truncated, and what is trained.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.report = json.loads((self.folder / "report.json").read_text(encoding="utf-8"))
        self.columns = self.report.get("columns", COLUMNS)
        self.arrays = {
            name: self._mapped(column_file(name, dtype), dtype).reshape((-1, *(() if _is_own(shape) else shape or ())))
            for name, (dtype, shape) in self.columns.items()
        }
        self.offsets = np.load(self.folder / "offsets.npy")
        self.own = {k: np.load(self.folder / f"{k}.npy") for k, (_, shape) in self.columns.items() if _is_own(shape)}
        self.records = np.load(self.folder / "records.npy", mmap_mode="r")
        self.lengths = np.diff(self.offsets).astype(np.int32)
        self.tokens, self.weights = self.arrays.get("tokens"), self.arrays.get("weights")

    def _mapped(self, name, dtype):
        path = self.folder / name  # a file of no bytes, as of no images, cannot be mapped
        return np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> tuple[np.ndarray, ...]:
        return tuple(self.arrays[name][self._at(name, shape, i)] for name, (_, shape) in self.columns.items())

    def _at(self, name, shape, i):
        if shape is None or name in self.own:
            stops = self.own.get(name, self.offsets)
            return slice(stops[i], stops[i + 1])
        return i

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        # Worker processes map the files anew instead of copying them.
        return TokenStore, (self.folder,)


def _is_own(shape) -> bool:
    return tuple(shape or ()) == OWN


def column_file(name: str, dtype: str) -> str:
    """The name of a column's file in a store: "tokens.i32"."""
    return f"{name}.{SUFFIXES[dtype]}"


def build_store(
    source: RecordSource,
    task: "Task",
    max_length: int,
    overlong: str,
    cache_dir: Path | str,
    on_error: str = "raise",
    max_skipped: float = 0.01,
) -> TokenStore:
    """Encode all of `source`, or open what an earlier call with the same inputs has written.

    task: says what an example is, such as tasks.CausalLM(tokenizer, policy). max_length (0 = no limit), overlong,
    on_error, max_skipped: as of the config's section `data`; a document or piece without a trained token is dropped and
    counted, and bad rows go to rejects.jsonl. cache_dir: where a folder is made for it, named by a hash of everything
    that changes it.

    Raises: DataError for a bad row, or if nothing at all is trained.
    """
    if overlong not in OVERLONG:
        problem = f"data.overlong={overlong!r}: expected {' | '.join(OVERLONG)}"
        raise DataError(problem, kind="setting")
    check(on_error, max_skipped)
    settings = (max_length, overlong, on_error, max_skipped)
    folder = Path(cache_dir) / store_key(source, task, *settings)
    if not (folder / "report.json").exists():
        _write_atomically(folder, source, task, *settings)
    store = TokenStore(folder)
    for warning in [*said(store.report["left_out"]), *task.warnings(store.report)]:
        warn(warning)
    return store


def store_key(
    source: RecordSource,
    task: "Task",
    max_length: int,
    overlong: str,
    on_error: str = "raise",
    max_skipped: float = 0.01,
) -> str:
    """The name of a store: a hash of the data, the tokenizer and the settings."""
    limits = [len(source), max_length, overlong, on_error == "skip" and max_skipped, FORMAT]
    known = json.dumps([*task.key(), limits], sort_keys=True, default=str)
    digest = hashlib.sha256(source.fingerprint().encode())
    if task.tokenizer is not None:
        digest.update(task.tokenizer.backend_tokenizer.to_str().encode())
    digest.update(known.encode())
    return digest.hexdigest()[:32]


def _write_atomically(folder, *inputs: Any):
    """Write beside `folder`, then rename: a killed or second process leaves no half of a store."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _sweep(folder.parent)
        made = tempfile.TemporaryDirectory(prefix=BUILDING, dir=folder.parent, ignore_cleanup_errors=True)
        with made as temporary:
            _write(Path(temporary), folder, *inputs)
            os.rename(temporary, folder)
    except OSError as error:
        if not (folder / "report.json").exists():  # else another process was first
            problem = f"data.cache_dir={folder.parent}: can't be written: {error}"
            raise DataError(problem, kind="unwritable") from None


def _sweep(parent):
    """Delete what killed processes were building, on this host or another: nothing was written to it lately."""
    for left in parent.glob(f"{BUILDING}*"):
        with contextlib.suppress(OSError):  # gone meanwhile
            if time.time() - max(path.stat().st_mtime for path in (left, *left.iterdir())) > STALE:
                shutil.rmtree(left, ignore_errors=True)


def _write(temporary, folder, source, task, max_length, overlong, on_error, max_skipped):
    hashes = np.zeros(len(source), np.uint32)  # of each row; 0 of what could not be read

    def read(i):
        record = source[i]
        # Fields in order: the same row in another order of fields may be trained otherwise.
        hashes[i] = zlib.crc32(json.dumps(record, default=str).encode())
        return record

    kept = folder.with_name(folder.name + ".rejects.jsonl")
    rejects = Rejects(temporary / "rejects.jsonl", kept, source, on_error, max_skipped)
    tally = task.tally(max_length, overlong)
    first, notes, records, sizes = None, Notes(), list[int](), list[int]()
    shapes = [shape for _, shape in task.columns.values()]
    varying = shapes.index(None) if None in shapes else None  # the column that gives the offsets
    own = {name: list[int]() for name, (_, shape) in task.columns.items() if _is_own(shape)}
    with contextlib.ExitStack() as files:
        names = [column_file(name, dtype) for name, (dtype, _) in task.columns.items()]
        out = [files.enter_context(open(temporary / name, "wb")) for name in names]
        for rows in _chunks(len(source), 64 if own else CHUNK):
            encoded = encode_rows(source, rows, task, rejects, notes, read)
            first = first or next(iter(encoded), None)
            tally.wheres = []
            pieces = tally.fit(encoded)
            tally.count(pieces)
            sizes += [1 if varying is None else len(piece[varying]) for piece in pieces]
            index = {source.where(i): i for i in rows}
            records += [index[where] for where in tally.wheres]
            for file, (dtype, _), values in zip(out, task.columns.values(), zip(*pieces, strict=True), strict=False):
                np.concatenate([np.ravel(x) for x in values]).astype(dtype, copy=False).tofile(file)
            for i, name in enumerate(task.columns):
                if name in own:
                    own[name] += [len(piece[i]) for piece in pieces]
    report = tally.report(rejects.counts) | dict(left_out=notes.counts)
    if not tally.lengths:
        raise DataError(task.nothing_left(first, report, max_length), kind="nothing_trained")
    np.save(temporary / "rows.npy", hashes)  # says later which rows were edited
    for name, counts in ({"offsets": sizes} | own).items():
        np.save(temporary / f"{name}.npy", np.append(0, np.cumsum(counts, dtype=np.int64)))
    np.save(temporary / "records.npy", np.array(records, np.int64))
    (temporary / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")


def _chunks(total, size):
    """Ranges of `size` rows, with a progress bar where there are several."""
    from tqdm import tqdm

    quiet = total < 2 * CHUNK or not sys.stderr.isatty()
    with tqdm(total=total, desc="tokenise", unit="row", disable=quiet) as progress:
        for start in range(0, total, size):
            rows = range(start, min(start + size, total))
            yield rows
            progress.update(len(rows))


def encode_rows(
    source: RecordSource,
    rows: Sequence[int],
    task: "Task",
    rejects: Rejects,
    notes: Notes | None = None,
    read: Callable[[int], dict[str, Any]] | None = None,
) -> list[tuple[str, Any]]:
    """(file and row, example) of the rows that can be encoded; the others go to `rejects.add`.

    What a row holds and its example does not is counted in `notes`. read: in place of `source[i]`. Where it fails,
    halves of the rows are tried: the good ones are still encoded together.
    """
    wheres = [source.where(i) for i in rows]
    try:
        records = [*map(read or source.__getitem__, rows)]
        examples = task.examples(records, wheres)
        if notes is not None:
            for where, record, example in zip(wheres, records, examples, strict=True):
                notes.add(where, task.left_out(record, example))
        return list(zip(wheres, examples, strict=True))
    except DataError as error:
        if len(rows) == 1 or rejects.on_error == "raise":
            rejects.add(rows[0], error)
            return []
    middle = len(rows) // 2
    first, second = (encode_rows(source, half, task, rejects, notes, read) for half in (rows[:middle], rows[middle:]))
    return first + second


class Tally:
    """Cuts documents that are too long, and counts everything for the report."""

    def __init__(self, task: "Task", max_length: int, overlong: str) -> None:
        self.task, self.max_length, self.overlong = task, max_length, overlong
        self.wheres: list[str] = []  # of each document of `fit`, whence it came
        self.read: list[int] = []  # tokens of each example
        self.lengths: list[int] = []  # and of each document kept
        self.tokens = self.trained = self.cut = self.pieces_dropped = 0
        self.dropped = Counter[str]()

    def fit(self, encoded: Sequence[tuple[str, Any]]) -> list[tuple[np.ndarray, ...]]:
        """The arrays of all documents that (where, example) give."""
        found = []
        for where, example in encoded:
            n = self.task.length(example)
            too_long = 0 < self.max_length < n
            if too_long and self.overlong == "error":
                raise DataError(
                    f"{n} tokens, more than data.max_length={self.max_length}",
                    "raise it, or set data.overlong to truncate_end, truncate_prompt, drop or split",
                    where=where,
                    kind="too_long",
                )
            pieces = self.task.cut(example, self.max_length, self.overlong)
            self.read.append(n)
            self.cut += too_long and bool(pieces)
            if too_long and pieces and self.overlong == "split":
                self.pieces_dropped += -(-n // self.max_length) - len(pieces)
            if not pieces:
                self.dropped[self._reason(example, too_long)] += 1
            found += pieces
            self.wheres += [where] * len(pieces)
        return found

    def _reason(self, example, too_long):
        if too_long and self.overlong == "drop":
            return "too_long"
        trained = self.task.layout.trained(example.arrays)
        return "no_trained_token_left" if too_long and trained else "no_trained_token"

    def count(self, pieces: Sequence[tuple[np.ndarray, ...]]) -> None:
        """Count the documents of a chunk."""
        fixed, trained = self.task.layout.fixed, self.task.layout.trained
        self.lengths += [1 if fixed else len(piece[0]) for piece in pieces]
        self.trained += sum(map(trained, pieces))
        self.tokens += sum(map(self.task.tokens_of, pieces))

    def report(self, skipped: Mapping[str, int]) -> dict[str, Any]:
        """All counts, as JSON holds them."""
        documents = len(self.lengths)
        could = self.tokens - documents * self.task.layout.shifted  # be a target
        return dict(
            columns=self.task.columns,
            examples=len(self.read),
            documents=documents,
            dropped=dict(self.dropped),
            skipped=dict(skipped),
            truncated=self.cut if self.overlong != "split" else 0,
            split=self.cut if self.overlong == "split" else 0,
            pieces_dropped=self.pieces_dropped,  # of those split: nothing is trained in them
            tokens=self.tokens,
            targets=could,
            trained_tokens=self.trained,
            trained_fraction=self.trained / max(could, 1),
            longest=max(self.lengths, default=0),
            lengths=describe(self.read) if self.read else None,
        )


def facts_of(source: RecordSource, store: TokenStore | None = None) -> dict[str, Any]:
    """What is known of a source's rows: their number, their files, and where they lie tokenised."""
    inner: Any = source
    while not hasattr(inner, "files") and hasattr(inner, "source"):
        inner = inner.source  # of some rows of another source, or variants of them
    files = inner.files() if hasattr(inner, "files") else []
    where = str(store.folder.absolute()) if store else ""
    return {"rows": len(source), "files": files, "store": where}
