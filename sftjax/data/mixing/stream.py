"""Sources too large to tokenise first: read shard by shard, endlessly, and packed as they come.

The graph, each step with a state of a few numbers, so that resuming is exact:
records -> window shuffle -> documents -> (mixture) -> packed rows -> batches
"""

import hashlib
import json
import re
from collections.abc import Collection, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import grain
import numpy as np
from grain import experimental as graph
from ml_collections import ConfigDict

from sftjax.config import ConfigError, flat
from sftjax.data.mixing import spec as mix
from sftjax.data.mixing.mixture import name_seed
from sftjax.data.packing.pack import Batch
from sftjax.data.records.layout import kind
from sftjax.data.records.readers import READERS, Table
from sftjax.data.records.rejects import Notes, Rejects, said
from sftjax.data.records.sources import Source, find_files
from sftjax.data.token_store import CHUNK, encode_rows
from sftjax.errors import DataError
from sftjax.terminal import warn

if TYPE_CHECKING:
    from sftjax.tasks import Task

BINS = 256  # rows packed at a time
EMPTY = 100  # chunks of CHUNK rows without a document, after which the run ends
SAMPLE = 2000  # records looked at before training


def _read(path, start):
    return ((f"{path}:{row + 1}", row, value) for row, value in READERS[kind(path)].stream(path, start))


def _table(path, found):
    """A reader of (where, record or line)."""
    places, rows = zip(*found, strict=True) if (found := list(found)) else ((), ())
    return Table(path, rows, places)


def shards(spec: str) -> list[Path]:
    """The files of a spec, see `open_source`. Raises: DataError if one can't be streamed."""
    known = [suffix for suffix, reader in READERS.items() if hasattr(reader, "stream")]
    files = find_files(spec)
    for path in files:
        if kind(path) not in known:
            raise DataError(
                f"{kind(path)!r} can't be streamed; known: {', '.join(known)}", where=path, kind="unknown_format"
            )
    return files


def sample(spec: str, n: int = SAMPLE) -> Source:
    """About n records, from the beginnings of up to 16 shards: what training will see."""
    files = shards(spec)
    files = files[:: -(-len(files) // 16)]
    each = -(-n // len(files))
    parts = [_table(p, ((where, x) for where, _, x in islice(_read(p, 0), each))) for p in files]
    if not any(map(len, parts)):
        raise DataError("the shards hold no row", where=spec, kind="no_rows")
    return Source(parts)


def identity(spec: str) -> str:
    """A hash of the names and sizes of shards, too much to read, and of what a state counts in."""
    known = [[path.name, path.stat().st_size] for path in shards(spec)] + [CHUNK, BINS]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:32]


def check(config: ConfigDict, sources: Sequence[mix.Share], streams: bool = True) -> None:
    """Raises: ConfigError for what a stream can't do. streams: a task's examples are documents."""
    d = config.data
    if not d.streaming:
        return
    text = config.train.duration
    if re.search("epoch|example|%", str(text)):
        raise ConfigError(
            f"train.duration={text!r}: a stream has no end, so max_steps is required: write "
            "'1000 steps', or '5e6 tokens'"
        )
    if not streams:
        raise ConfigError(
            "data.streaming packs documents, and the examples of this task have one shape, or are"
            " pairs; set data.streaming=False"
        )
    refused = dict(phases=d.phases, workers=d.workers, packing=d.packing == "wrapped")
    for source in sources:
        own = flat(source.config.data.to_dict())
        refused |= {key: own[key] for key in ("limit", "augment", "clean.rules", "split.share") if own[key]}
        if len(sources) > 1 and source.weight is None and not source.replay:
            raise ConfigError(f"data.streaming: the size of {source.name!r} is not known; give it a weight")
    if there := [key for key, value in refused.items() if value]:
        raise ConfigError(f"data.{there[0]} can't be had with data.streaming; take it out, or tokenise first")


class Spec(NamedTuple):
    """A source of a stream."""

    name: str
    paths: str  # as open_source takes them
    task: "Task"  # what its examples are
    overlong: str = "truncate_end"
    on_error: str = "raise"
    max_skipped: float = 0.01  # of CHUNK rows
    weight: float = 1.0  # its share of the tokens, beside the other weights
    known: Collection[str] = ()  # what is not read, and was said of the sample


def batches(
    sources: Sequence[Spec],
    *,
    length: int,
    rows: int,
    packing: str = "bfd",
    seed: int = 0,
    window: int = 10_000,
    part: int = 0,
    parts: int = 1,
    prefetch: int = 2,
    rejects: Path | None = None,
) -> grain.DatasetIterator:
    """An endless iterator of Batches [rows, length], with get_state() and set_state().

    Of several sources the batches have `sources` too: int32 [B, S], each token's source. packing: "bfd" or "bfd_split"
    (best fit, among BINS rows) | "none" (one document a row). window: records of a source that are shuffled together.
    prefetch: batches made ahead, by a thread. rejects: the file for rows that can't be used, where on_error is "skip".

    This is the part `part`, from 0 on, of `parts` of the data: each has whole shards where there is at least one for
    each, else every parts-th row.
    """
    streams = []
    for source in sources:
        drawn = np.random.SeedSequence([seed, name_seed(source.name), part]).generate_state(2)
        seeds = [int(s) // 2 for s in drawn]  # the number of a window is added, in 32 bits
        records = _Step(_Records, [], shards(source.paths), part, parts, seeds[0])
        records = graph.WindowShuffleIterDataset(records, window_size=window, seed=seeds[1])
        streams.append(_Step(_Documents, [records], source, length, rejects))
    several = len(sources) > 1
    keys = ["tokens", "targets", "weights", *(["sources"] if several else [])]
    packed = graph.BestFitPackIterDataset(
        _Step(_Mixed, streams, [s.weight for s in sources]) if several else streams[0],
        length_struct=dict.fromkeys(keys, length),
        num_packing_bins=BINS,
        seed=seed,
        max_sequences_per_bin=1 if packing == "none" else None,
    )
    return iter(graph.ThreadPrefetchIterDataset(packed.map(_batch_row).batch(rows), prefetch_buffer_size=prefetch))


def _batch_row(row):
    """A row as grain's packer makes it -> a Batch's."""
    places = dict(positions=row["tokens_positions"], segments=row["tokens_segment_ids"])
    return {k: v for k, v in row.items() if not k.endswith(("_positions", "_segment_ids"))} | places


# ---- steps of the graph; grain calls get_state between any two elements -----------------------


class _Step(grain.IterDataset):
    """A step of the graph whose iterator is `made(parents' iterators, *args)`."""

    def __init__(self, made, parents, *args: Any) -> None:
        super().__init__(parents)
        self.made, self.args = made, args

    def __iter__(self) -> grain.DatasetIterator:
        return self.made([iter(parent) for parent in self._parents], *self.args)


class _Records(grain.DatasetIterator):
    """(where, record or line), endlessly; the shards in a new order in every pass."""

    order: Any  # of the shards, in this pass
    shard: int  # the place in it
    row: int  # the next of the shard
    rows: Any  # those left of the shard; None where it is not open

    def __init__(self, parents: Sequence, files: Sequence[Path], part: int, parts: int, seed: int) -> None:
        super().__init__(parents)
        self.by_shard = len(files) >= parts
        self.files = files[part::parts] if self.by_shard else files
        self.part, self.parts, self.seed = part, parts, seed
        self.set_state(dict(passed=0, shard=0, row=0))

    def __next__(self) -> tuple[str, dict[str, Any] | bytes]:
        while True:
            if self.rows is None:
                self.rows = _read(self.files[self.order[self.shard]], self.row)
            for where, row, record in self.rows:
                self.row = row + 1
                if self.by_shard or row % self.parts == self.part:
                    self.empty = False
                    return where, record
            self._next_shard()

    def _next_shard(self):
        self.rows, self.row, self.shard = None, 0, self.shard + 1
        if self.shard == len(self.order):
            if self.empty:
                names = ", ".join(map(str, self.files[:3]))
                raise DataError(f"no row for part {self.part + 1} of {self.parts}", where=names, kind="no_rows")
            self._begin(self.passed + 1)

    def _begin(self, passed):
        self.passed, self.shard, self.empty = passed, 0, True
        self.order = np.random.default_rng([self.seed, passed]).permutation(len(self.files))

    def get_state(self):
        return dict(passed=self.passed, shard=self.shard, row=self.row)

    def set_state(self, state):
        self._begin(state["passed"])
        self.shard, self.row, self.rows = state["shard"], state["row"], None
        self.empty = not (self.shard or self.row)


class _Documents(grain.DatasetIterator):
    """The tokens, targets and weights of records, cut as their source says."""

    def __init__(self, parents: Sequence, source: Spec, length: int, rejects: Path | None) -> None:
        super().__init__(parents)
        self.source, self.length, self.rejects = source, length, rejects
        self.before, self.documents, self.at = self._parent.get_state(), list[tuple](), 0
        self.notes = Notes()

    def __next__(self) -> Batch:
        chunks = 0
        while self.at == len(self.documents):
            if chunks == EMPTY:
                raise DataError(
                    f"nothing is trained in {chunks * CHUNK} rows one after the other",
                    f"check data.max_length={self.length} with sftjax inspect",
                    where=self.source.paths,
                    kind="nothing_trained",
                )
            self.before, self.at, chunks = self._parent.get_state(), 0, chunks + 1
            self._read()
        document = self.documents[self.at]
        self.at += 1
        layout: Any = self.source.task.layout  # of tokens, as all that is streamed
        return layout.document(*document)

    def _read(self):
        s = self.source
        chunk = Source([_table(s.paths, islice(self._parent, CHUNK))])
        rejects = Rejects(self.rejects, self.rejects, chunk, s.on_error, s.max_skipped)
        known = {*s.known, *self.notes.counts}
        encoded = encode_rows(chunk, range(len(chunk)), s.task, rejects, self.notes)
        new = {what: n for what, n in self.notes.counts.items() if what not in known}
        for line in said(new):  # of a stream each thing is said when it first comes
            warn(f"{s.name}: {line}, of {len(chunk)} read")
        self.documents = s.task.tally(self.length, s.overlong).fit(encoded)

    def get_state(self):
        return dict(before=self.before, at=self.at)

    def set_state(self, state):
        self.before, self.at = state["before"], state["at"]
        self._parent.set_state(self.before)
        self.documents = []
        if self.at:
            self._read()


class _Mixed(grain.DatasetIterator):
    """Documents of several streams: next comes one of the stream that is furthest behind."""

    def __init__(self, parents: Sequence, weights: Sequence[float]) -> None:
        super().__init__(parents)
        self.weights = np.asarray(weights, float)
        self.given = np.zeros(len(weights), np.int64)  # tokens

    def __next__(self) -> Batch:
        given = self.given / np.maximum(self.weights, 1e-300)
        s = int(np.argmin(np.where(self.weights > 0, given, np.inf)))
        document = next(self._parents[s])
        n = len(document["tokens"])
        self.given[s] += n
        return document | {"sources": np.full(n, s, np.int32)}

    def get_state(self):
        return dict(given=self.given.tolist(), parents=[p.get_state() for p in self._parents])

    def set_state(self, state):
        self.given = np.array(state["given"], np.int64)
        for parent, own in zip(self._parents, state["parents"], strict=True):
            parent.set_state(own)
