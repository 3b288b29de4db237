"""The rows of a set as training would have them, one by one, each with what becomes of it."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from sftjax import tasks
from sftjax.clean import prepare
from sftjax.clean.rules import RULES, Finding
from sftjax.data import DataError, open_source
from sftjax.data.masking.encode import Encoded
from sftjax.data.mixing import spec as mix
from sftjax.data.records.rejects import Rejects, record
from sftjax.data.records.sources import RecordSource
from sftjax.data.token_store import encode_rows
from sftjax.evaluation import sets as sets_lib
from sftjax.hf.tokenizer_files import Tokenizer

CHUNK = 250  # rows encoded together
LOST = ("too_long", "no_trained_token_left", "no_trained_token", "skipped")
REASONS = tuple(dict.fromkeys((*LOST, *RULES)))


class Wanted(NamedTuple):
    """Which rows to show."""

    n: int = 5  # of each source
    start: int = 0
    source: str = ""  # "" = all
    min_trained: float = 0.0  # share of a row's tokens, those that could be a target
    max_trained: float = 1.0
    dropped: str = ""  # a reason; "any" = dropped for any; "" = dropped or not

    def takes(self, row: "Row") -> bool:
        """Is this row one of those wanted?"""
        if (self.dropped and not row.dropped) or self.dropped not in ("", "any", row.dropped):
            return False
        return self.min_trained <= row.trained <= self.max_trained

    def check(self) -> None:
        """Raises: DataError for a value that can't be."""
        if self.n < 0 or self.start < 0:
            raise DataError(f"--n={self.n} --start={self.start}: expected 0 or more", kind="setting")
        if not 0 <= self.min_trained <= self.max_trained <= 1:
            found = f"--min_trained={self.min_trained} --max_trained={self.max_trained}"
            raise DataError(f"{found}: expected shares, 0 <= min <= max <= 1", kind="setting")
        if self.dropped not in ("", "any", *REASONS):
            raise DataError(f"--dropped={self.dropped}: expected any | {' | '.join(REASONS)}", kind="setting")


class Part(NamedTuple):
    """The rows of one source."""

    name: str
    config: ConfigDict  # the run's config, with the keys that the source sets itself
    source: RecordSource
    task: tasks.Task  # encodes them
    removed: Mapping[int, Finding] = {}  # by row of data.train: what data.clean took out


def parts_of(config: ConfigDict, set: str, chosen: str, tokenizer: Tokenizer | None, cache: Path | str) -> list[Part]:
    """The sources of a set, or the one called `chosen`. Raises: DataError if there is none."""
    data, parts = config.data, []
    if set == "train" or (set == "validation" and not data.validation):
        sources = mix.sources(config) if data.train or data.sources else []
        for source in _choose({s.name: s for s in sources}, chosen):
            rows = prepare.training_rows(source.config, tasks.make(source.config, tokenizer), cache)
            own: RecordSource | None = rows.train if set == "train" else rows.validation
            if own:
                parts.append(Part(source.name, source.config, own, rows.task, rows.removed if set == "train" else {}))
    else:
        sets = sets_lib.named(data.validation) if set == "validation" else {"test": data.test}
        for name in _choose({k: k for k in sets}, chosen) if data[set] else ():
            parts.append(Part(name, config, open_source(sets[name]), tasks.make(config, tokenizer)))
    if not parts:
        raise DataError(f"data.{set} is empty", "give a file, a glob or a hub data set id", kind="setting")
    return parts


def _choose(items: dict, name: str) -> list:
    if name and name not in items:
        raise DataError(f"--source={name}: expected {' | '.join(items)}", kind="setting")
    return [items[name]] if name else [*items.values()]


@dataclass(frozen=True)
class Row:
    """One record, encoded; and what of it a row of a batch gets."""

    where: str
    example: Encoded
    kept: list[np.ndarray]  # of each document made of it: which of its tokens, int [n]
    dropped: str  # why there is none
    note: str
    shifted: bool = True  # a token is the target of the one before it; a piece's first is none

    @property
    def trained(self) -> float:
        """The share trained of the tokens kept (if dropped: of all) that can be a target."""
        pieces = [piece[int(self.shifted) :] for piece in self.kept or [np.arange(len(self.example.tokens))]]
        trained = sum(np.count_nonzero(self.example.weights[piece]) for piece in pieces)
        return float(trained) / max(sum(map(len, pieces)), 1)


def wanted_rows(part: Part, wanted: Wanted) -> Iterator[Row]:
    """The rows wanted, from the first on; those that cleaning removed come after the others."""
    yield from filter(wanted.takes, _encode(part, range(len(part.source))[wanted.start :]))
    if part.removed:
        others = list(part.removed)[max(wanted.start - len(part.source), 0) :]
        yield from filter(wanted.takes, _removed(part, others))


def _encode(part, indices) -> Iterator[Row]:
    """A Row for each index. Raises: DataError, as training would."""
    d = part.config.data
    for _, where, example, error in _encoded(part, indices, d.on_error):
        if error:
            yield Row(where, example, [], "skipped", error)
            continue
        tally = part.task.tally(d.max_length, d.overlong)
        tally.fit([(where, example)])  # says why it is dropped, if it is
        kept = part.task.kept(example, d.max_length, d.overlong)
        long = 0 < d.max_length < part.task.length(example)
        notes = [getattr(example, "note", ""), f"data.max_length={d.max_length}" * long]
        dropped = next(iter(tally.dropped), "")
        yield Row(where, example, kept, dropped, "; ".join(filter(None, notes)), part.task.layout.shifted)


def _removed(part, indices):
    d, task = part.config.data, tasks.make(part.config, part.task.tokenizer)
    whole = part._replace(source=open_source(d.train, d.limit), task=task)
    for i, where, example, _ in _encoded(whole, indices, "skip"):
        rule, note, other = part.removed[i][1:]
        yield Row(where, example, [], rule, f"{note}: {other}" if other else note)


def _encoded(part, indices, on_error):
    """(index, file and row, Encoded, error); of a row with an error only the text is there."""
    source, nowhere = part.source, Path(os.devnull)
    for at in range(0, len(indices), CHUNK):
        some, rejects = indices[at : at + CHUNK], Rejects(nowhere, nowhere, source, on_error, max_skipped=1.0)
        good = iter(encode_rows(source, some, part.task, rejects))
        for i in some:
            if i in rejects.reasons:
                nothing = np.zeros(0, np.int32), np.zeros(0, np.float32)
                found = record(source, i)  # None where it is malformed: the note says why
                text = json.dumps(found, ensure_ascii=False, indent=1, default=str) if found else ""
                yield i, source.where(i), Encoded(*nothing, text, []), rejects.reasons[i]
            else:
                yield i, *next(good), ""
