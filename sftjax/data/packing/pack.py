"""Packing: which document goes into which row, and the arrays of a batch.

`plan` works on lengths alone, so the rows of an epoch (and the number of steps) are known before a token is read.
`shift` is the one place in which targets and their weights are built.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from sftjax.errors import DataError

Batch = dict[str, np.ndarray]
NONE = -1  # no token: what fills up the shorter one of a pair


class Field(NamedTuple):
    """One array of a batch: its shape, its dtype, and the logical axis of each dimension."""

    shape: tuple[int, ...]
    dtype: type
    axes: tuple[str | None, ...]


class Examples(Protocol):
    """Examples by index, each as its arrays: a list of them, or a store."""

    def __getitem__(self, i: int, /) -> tuple[np.ndarray, ...]: ...


class Layout(Protocol):
    """How examples lie in the rows of a batch: the one place that knows the batch's arrays."""

    @property
    def fixed(self) -> bool:
        """Is a row exactly one example, whose arrays have one shape? Nothing is packed then."""

    @property
    def shifted(self) -> bool:
        """Are targets the next tokens? The first token of a document is none then."""

    def spec(self, rows: int, width: int) -> dict[str, Field]:
        """The arrays of a batch of `rows` rows of `width` tokens."""

    def fill(self, row: Batch, examples: Examples, pieces: Sequence[tuple[int, int, int]]) -> None:
        """Write `pieces`, (example, start, stop) each, into the arrays of one row."""

    def trained(self, example: tuple[np.ndarray, ...]) -> int:
        """How many targets of an example (or of a piece of one) have a weight."""


@dataclass(frozen=True)
class RowPlan:
    """Rows as flat arrays: row r holds the pieces [offsets[r], offsets[r + 1])."""

    doc: np.ndarray  # int64 [pieces]
    start: np.ndarray  # int64 [pieces], first token of the piece in its document
    stop: np.ndarray  # int64 [pieces], one past its last token
    offsets: np.ndarray  # int64 [rows + 1]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, r: int) -> list[tuple[int, int, int]]:
        """The (document, start, stop) of row r."""
        pieces = slice(self.offsets[r], self.offsets[r + 1])
        columns = (self.doc[pieces], self.start[pieces], self.stop[pieces])
        return list(zip(*(c.tolist() for c in columns), strict=True))


def pack(lengths: Sequence[int] | np.ndarray, capacity: int, strategy: str = "bfd") -> list[list[tuple[int, int, int]]]:
    """Rows of at most `capacity` tokens, each a list of (document, start, stop).

    lengths: number of tokens of each document; empty ones are skipped. strategy: one of
      `bfd`: best-fit decreasing; a document longer than a row is cut to the row's length; `bfd_split`: as bfd, but a
      longer document is cut into pieces and none is lost;
      `wrapped`: one stream of all documents, cut every `capacity` tokens;
      `none`: one document a row, cut to the row's length.
    """
    rows = plan(lengths, capacity, strategy)
    return [rows.row(r) for r in range(len(rows))]


def plan(lengths: Sequence[int] | np.ndarray, capacity: int, strategy: str = "bfd") -> RowPlan:
    """`pack` as flat arrays: a million documents in about a second. Raises: DataError."""
    if strategy not in STRATEGIES:
        raise DataError(f"data.packing={strategy!r}: expected one of {', '.join(STRATEGIES)}", kind="setting")
    if capacity < 1:
        raise DataError(f"a row holds at least 1 token, but the capacity is {capacity}", kind="setting")
    return STRATEGIES[strategy](np.asarray(lengths, np.int64).reshape(-1), int(capacity))


def _bfd(lengths, capacity):
    kept = np.flatnonzero(lengths)
    return _best_fit(kept, np.zeros_like(kept), np.minimum(lengths[kept], capacity), capacity)


def _bfd_split(lengths, capacity):
    pieces = -(-lengths // capacity)
    doc = np.repeat(np.arange(len(lengths)), pieces)
    first = np.repeat(np.cumsum(pieces) - pieces, pieces)
    start = (np.arange(len(doc)) - first) * capacity
    return _best_fit(doc, start, np.minimum(lengths[doc], start + capacity), capacity)


def _wrapped(lengths, capacity):
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    cuts = np.arange(0, total, capacity)
    starts = np.unique(np.concatenate([cuts, (ends - lengths)[lengths > 0]]))
    stops = np.append(starts[1:], total)[: len(starts)]
    doc = np.searchsorted(ends, starts, side="right")
    base = (ends - lengths)[doc]
    return RowPlan(doc, starts - base, stops - base, np.append(np.searchsorted(starts, cuts), len(starts)))


def _none(lengths, capacity):
    kept = np.flatnonzero(lengths)
    return RowPlan(kept, np.zeros_like(kept), np.minimum(lengths[kept], capacity), np.arange(len(kept) + 1))


STRATEGIES = {"bfd": _bfd, "bfd_split": _bfd_split, "wrapped": _wrapped, "none": _none}


def _best_fit(doc, start, stop, capacity):
    """Best-fit decreasing, row by row: the longest piece that fits, until two more can fill a row.

    These two are chosen together, to leave the least room; this closes most of the gap between best-fit decreasing and
    full rows. Pieces of one length are taken in the given order.
    """
    lengths = stop - start
    counts = np.bincount(lengths, minlength=capacity + 1).tolist()
    there = bytearray(n > 0 for n in counts)  # is a piece of this length left; found by memchr
    placed, offsets = list[int](), [0]
    while (smallest := there.find(1)) > 0:
        room = capacity
        while room >= smallest > 0:
            longest = there.rfind(1, 0, room + 1)
            pick = (longest,)
            if 2 * smallest <= room < longest + 2 * smallest:
                pick = _best_pair(there, counts, smallest, room, longest)
            for length in pick:
                counts[length] -= 1
                there[length] = counts[length] > 0
            placed += pick
            room -= sum(pick)
            smallest = there.find(1)
        offsets.append(len(placed))
    # The n-th placement of a length is the n-th piece of that length.
    order = np.empty(len(placed), np.int64)
    order[np.argsort(placed, kind="stable")] = np.argsort(lengths, kind="stable")
    return RowPlan(doc[order], start[order], stop[order], np.array(offsets))


def _best_pair(there, counts, smallest, room, longest):
    """Lengths of two pieces that leave the least of `room`, or of one that leaves no more."""
    left = smallest + np.flatnonzero(np.frombuffer(there, np.uint8)[smallest : room - smallest + 1])
    other = left[np.searchsorted(left, room - left, side="right") - 1]
    for i in np.argsort(-(left + other), kind="stable"):
        a, b = int(left[i]), int(other[i])
        if a + b <= longest:
            break
        if a != b or counts[a] > 1:
            return max(a, b), min(a, b)
    return (longest,)


def shift(tokens: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The targets, int32 [n], and their loss weights, float32 [n], of a document or piece of one.

    Position i predicts token i + 1, so it carries that token's weight: `weights` has those of the tokens themselves.
    Nothing follows the last token: target 0, weight 0. The first token of a document is never a target.
    """
    targets = np.zeros(len(tokens), np.int32)
    moved = np.zeros(len(tokens), np.float32)
    targets[:-1] = tokens[1:]
    moved[:-1] = weights[1:]
    return targets, moved


def make_batch(
    encoded_docs: Iterable[Sequence[Any]],
    length: int | None = None,
    rows: Sequence[Sequence[tuple[int, int, int]]] | None = None,
) -> Batch:
    """`Encoded` examples, or pairs (tokens [n], weights [n]), to a batch for a language model.

    length: tokens in a row; default the longest row's. rows: the result of `pack`; default one document a row.

    Returns: tokens, targets, positions, segments int32 and weights float32, each [B, S]. Raises: DataError if a row
    doesn't fit.
    """
    docs = [(np.asarray(d[0]), np.asarray(d[1])) for d in encoded_docs]
    if rows is None:
        rows = [[(i, 0, len(tokens))] for i, (tokens, _) in enumerate(docs)]
    used = [sum(stop - start for _, start, stop in row) for row in rows]
    length = max(used, default=0) if length is None else length
    if max(used, default=0) > length:
        r = int(np.argmax(used))
        raise DataError(
            f"row {r} has {used[r]} tokens, but length is {length}",
            "raise the length, or place the documents with pack(lengths, length, strategy)",
            kind="too_long",
        )
    batch = blank_batch(len(rows), length)
    for r, row in enumerate(rows):
        CAUSAL.fill({k: v[r] for k, v in batch.items()}, docs, row)
    return batch


@dataclass(frozen=True)
class TokenRows:
    """Documents one after the other in a row of tokens; segments 1, 2, ... say which is which.

    shifted: a position's target is the next token, with that token's weight (see `shift`), and an example is (tokens,
    weights). Otherwise an example is (tokens, weights, targets), each [n], and targets stand where they are: the class
    of a document at the token that it is read from.
    target: the dtype of targets. types: an example has also, last, the type of each token.
    """

    shifted: bool = True
    target: type = np.int32
    types: bool = False
    fixed = False

    def spec(self, rows: int, width: int) -> dict[str, Field]:
        """The arrays of a batch, each [rows, width]."""
        kinds = dict(tokens=np.int32, targets=self.target, weights=np.float32)
        kinds |= dict(positions=np.int32, segments=np.int32)
        kinds |= dict(token_types=np.int32) if self.types else {}
        return {k: Field((rows, width), dtype, ("batch", "seq")) for k, dtype in kinds.items()}

    def document(self, tokens: np.ndarray, weights: np.ndarray, targets: Any = None, types: Any = None) -> Batch:
        """The arrays [n] that a document brings into its row; targets [n], where not shifted."""
        if self.shifted:
            targets, weights = shift(tokens, weights)
        own = dict(tokens=tokens, targets=targets, weights=weights)
        return own if types is None else own | {"token_types": types}

    def fill(self, row: Batch, examples: Examples, pieces: Sequence[tuple[int, int, int]]) -> None:
        """Write the pieces one after the other into a row, with their positions and segments."""
        at = 0
        for segment, (doc, start, stop) in enumerate(pieces, 1):
            cells = slice(at, at + stop - start)
            for name, values in self.document(*(x[start:stop] for x in examples[doc])).items():
                row[name][cells] = values
            row["positions"][cells] = np.arange(stop - start)
            row["segments"][cells] = segment
            at = cells.stop

    def trained(self, example: tuple[np.ndarray, ...]) -> int:
        """How many targets of an example (or of a piece of one) have a weight."""
        return int(np.count_nonzero(example[1][1:] if self.shifted else example[1]))


CAUSAL = TokenRows()


@dataclass(frozen=True)
class FixedRows:
    """One example a row, of arrays that have one shape each: images, features.

    fields: (name, shape of one example's array, dtype), in the order of an example's arrays. Where none is `weights`, a
    batch has them too, float32 [rows]: 1, and 0 of the blank rows that fill up a last batch.
    """

    fields: tuple[tuple[str, tuple[int, ...], type], ...]
    fixed, shifted = True, False

    def spec(self, rows: int, width: int) -> dict[str, Field]:
        """The arrays of a batch, each [rows, *shape]; they have no width."""
        kinds = (("weights", (), np.float32), *self.fields)
        return {name: Field((rows, *shape), dtype, ("batch", *(None,) * len(shape))) for name, shape, dtype in kinds}

    def fill(self, row: Batch, examples: Examples, pieces: Sequence[tuple[int, int, int]]) -> None:
        """Write the one example of a row, with weight 1."""
        [(i, _, _)] = pieces
        for (name, _, _), values in zip(self.fields, examples[i], strict=True):
            row[name][...] = values
        row["weights"][...] = 1.0

    def trained(self, example: tuple[np.ndarray, ...]) -> int:
        """1: an example is one target."""
        return 1


@dataclass(frozen=True)
class PairRows:
    """Rows of `source` tokens of sources beside `target` of targets, or as many per width; a pair is one segment.

    An example is (tokens, targets), int32 [n] both, the shorter one filled up with NONE. Its n is the length by which
    pairs are packed: that of the source, or what its target takes of a row.
    """

    source: int
    target: int
    fixed, shifted = False, False

    def example(self, source: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, ...]:
        """The arrays of a pair of token ids."""
        n = max(len(source), -(-len(target) * self.source // self.target))
        parts = (np.asarray(x, np.int32) for x in (source, target))
        return tuple(np.pad(x, (0, n - len(x)), constant_values=NONE) for x in parts)

    def spec(self, rows: int, width: int) -> dict[str, Field]:
        """The arrays of a batch: those of sources [rows, width], and those of targets."""
        short, axes = -(-width * self.target // self.source), ("batch", "seq")
        sizes = dict.fromkeys(("tokens", "positions", "segments"), width)
        sizes |= dict.fromkeys(("targets", "target_positions", "target_segments", "weights"), short)
        return {k: Field((rows, n), np.float32 if k == "weights" else np.int32, axes) for k, n in sizes.items()}

    def fill(self, row: Batch, examples: Examples, pieces: Sequence[tuple[int, int, int]]) -> None:
        """Write the pairs one after the other into a row."""
        at = {"tokens": 0, "targets": 0}
        for segment, (doc, _, _) in enumerate(pieces, 1):
            for (name, start), ids in zip(at.items(), examples[doc], strict=True):
                ids, side = ids[ids != NONE], "target_" if name == "targets" else ""
                cells = slice(start, start + len(ids))
                row[name][cells], row[f"{side}segments"][cells] = ids, segment
                row[f"{side}positions"][cells] = np.arange(len(ids))
                if side:
                    row["weights"][cells] = 1.0
                at[name] = cells.stop

    def trained(self, example: tuple[np.ndarray, ...]) -> int:
        """How many tokens the target has."""
        return int(np.count_nonzero(example[1] != NONE))


def blank_batch(rows: int, length: int, layout: Layout = CAUSAL) -> Batch:
    """A batch of padding: every segment 0, every weight 0."""
    return {k: np.zeros(f.shape, f.dtype) for k, f in layout.spec(rows, length).items()}


def pad_to_multiple(length: int, multiple: int) -> int:
    """`length` rounded up to a multiple: few row lengths mean few compilations."""
    return -(-length // multiple) * multiple
