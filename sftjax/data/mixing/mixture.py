"""Rows of several sources, by index.

A mixture comes in cycles. In a cycle each source gives the next documents of its own endless stream: a shuffle of all
it has, then another one, and so on. The cycle's documents are packed together as `Rows` packs those of an epoch. Of the
last cycle of a phase, or of the run, there is as much as fits; what would be over stays at the head of its stream. So
where each stream stands is a function of the row index, like everything else here.
"""

import hashlib
import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from sftjax.data.mixing.spec import Phase
from sftjax.data.packing.pack import Batch, RowPlan
from sftjax.data.packing.rows import Rows, Store, shuffled_plan, take_rows


def name_seed(name: str) -> int:
    """A number that belongs to a source's name: what it gives doesn't depend on the others."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "big")


class Joined:
    """Stores one after the other, without a copy."""

    def __init__(self, stores: Iterable[Store]) -> None:
        self.stores = list(stores)
        self.lengths = np.concatenate([store.lengths for store in self.stores])
        self.starts = np.append(0, np.cumsum([len(store.lengths) for store in self.stores]))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> tuple[np.ndarray, ...]:
        s = int(self.owner(i))
        return self.stores[s][int(i - self.starts[s])]

    def owner(self, docs: int | np.ndarray) -> np.ndarray | np.int64:
        """Which store documents belong to."""
        return np.searchsorted(self.starts, docs, side="right") - 1


class Cycle(NamedTuple):
    """A cycle as it was planned."""

    first: int  # row
    given: np.ndarray  # int [sources]: documents given before it
    plan: RowPlan


@dataclass
class Place:
    """Where a mixture stands between two cycles."""

    ends: tuple[int, ...]  # rows at which the phases end, the last with the run
    row: int
    cycle: int
    phase: int
    queues: list[np.ndarray]  # of each source: documents shuffled, not yet given
    passes: np.ndarray  # int [sources]: shuffles begun
    debt: np.ndarray  # float [sources]: still owed, in the phase's unit; below 0: given too much
    given: np.ndarray  # int [sources]: documents


KEPT = 1 << 20  # documents in the cycles kept; of the newest two, all


class Mixture(Rows):
    """`Rows` of several sources. Batches have `sources` too, int32, shaped like their weights.

    per_epoch is the number of rows of the first phase's cycle. Cycles are planned in order, from the first: two seconds
    for a million documents, at a resumption too.
    """

    store: Joined
    _place: Place | None

    def __init__(
        self,
        stores: Mapping[str, Store],
        length: int,
        packing: str = "bfd",
        seed: int = 0,
        *,
        phases: Sequence[Phase],
        ends: Sequence[int] = (),
        **options: Any,
    ) -> None:
        """ends: the rows at which the phases end, all but the last's; they may be set later. options: as of `Rows`."""
        self.names, self.phases, self.ends = tuple(stores), phases, tuple(ends)
        self._seeds = [name_seed(name) for name in stores]
        self._cycles, self._held, self._place = list[Cycle](), 0, None
        super().__init__(Joined(stores.values()), length, packing, seed, **options)

    def _count_rows(self):
        """Plan a cycle of each phase, to know its number of rows."""
        self._rows = []
        for phase in range(len(self.phases)):
            place = self._start(phase=phase)
            self._rows.append(len(self._pack(place, self._draw(place, 1.0))))
        return self._rows[0]

    def mean(self, values: np.ndarray) -> float:
        """The mean over all rows; until the phases' ends are known, over the phases."""
        sums = [self._by_source(phase, values).sum() for phase in self.phases]
        spans = np.diff([0, *self.ends, self.total]) if len(self.ends) == len(self.phases) - 1 else None
        return float(np.average(np.divide(sums, self._rows), weights=spans))

    def _by_source(self, phase, values) -> np.ndarray:
        """The sum, float [sources], of values [documents] over what each gives in a cycle."""
        values, lengths = (
            np.array([part.mean() for part in np.split(np.asarray(x), self.store.starts[1:-1])])
            for x in (values, self.store.lengths)
        )
        return values * np.where(phase.counted, phase.amounts, phase.amounts / lengths)

    def describe(self) -> list[str]:
        """A line for each phase, with the shares of its tokens."""
        lines = []
        for i, phase in enumerate(self.phases):
            tokens = self._by_source(phase, self.store.lengths)
            shares = zip(self.names, tokens / tokens.sum(), strict=True)
            text = ", ".join(f"{name} {share:.1%}" for name, share in shares if share)
            until = f"phase {i + 1}{f', until {phase.until}' if phase.until else ''}: "
            lines.append(f"{until if len(self.phases) > 1 else ''}{text} of the tokens")
        return lines

    def position(self, r: int) -> dict[str, int]:
        """How many documents each source has given in the rows before r."""
        given, r = np.zeros(len(self.names), int), min(r, self.total)
        if r > 0:
            cycle = self._cycle(r - 1)
            given = cycle.given + self._begun(take_rows(cycle.plan, np.arange(r - cycle.first)))
        return dict(zip(self.names, given.tolist(), strict=True))

    def pieces(self, r: int) -> list[tuple[int, int, int]]:
        """The (document, start, stop) of row r."""
        cycle = self._cycle(r)
        return cycle.plan.row(r - cycle.first)

    def batch(self, indices: Sequence[int]) -> Batch:
        """The rows of these indices, and each cell's source, int32 [B, S] (or [B])."""
        batch = super().batch(indices)
        batch["sources"] = np.zeros(batch["weights"].shape, np.int32)
        for b, r in enumerate(indices):
            if r < self.total:
                owners: Any = self.store.owner(np.array([doc for doc, _, _ in self.pieces(r)]))
                if self.layout.fixed:
                    batch["sources"][b] = owners[0]
                else:
                    segments = batch.get("target_segments", batch["segments"])[b]
                    batch["sources"][b] = np.append(0, owners)[segments]
        return batch

    def _cycle(self, r) -> Cycle:
        with self._lock:
            ends = (*self.ends, self.total)
            place = self._place
            if place is None or r < self._cycles[0].first or place.ends != ends:
                self._cycles, self._held, self._place = [], 0, (place := self._start(ends))
            while r >= place.row:
                self._cycles.append(self._next(place))
                self._held += len(self._cycles[-1].plan.doc)
                while self._held > KEPT and len(self._cycles) > 2:
                    self._held -= len(self._cycles.pop(0).plan.doc)
            return self._cycles[bisect_right(self._cycles, r, key=lambda c: c.first) - 1]

    def _start(self, ends=(), phase=0) -> Place:
        n = len(self.names)
        return Place(ends, 0, 0, phase, [np.zeros(0, int)] * n, np.zeros(n, int), np.zeros(n), np.zeros(n, int))

    def _next(self, place) -> Cycle:
        """Plan the cycle at `place`, and move `place` behind it."""
        if place.row == place.ends[place.phase]:
            place.phase, place.debt = place.phase + 1, np.zeros_like(place.debt)
        left, whole = place.ends[place.phase] - place.row, self._rows[place.phase]
        docs = self._draw(place, min(1.0, left / whole))
        packed = self._pack(place, docs)
        while len(packed) < left < whole:  # the last part of a phase came out too short
            docs = np.append(docs, self._draw(place, (left - len(packed)) / whole))
            packed = self._pack(place, docs)
        if len(packed) > left:
            packed = take_rows(packed, np.arange(left))
            over = np.delete(docs, packed.doc)
            owner = self.store.owner(over)
            place.queues = [np.append(over[owner == s], q) for s, q in enumerate(place.queues)]
        packed = replace(packed, doc=docs[packed.doc])
        cycle = Cycle(place.row, place.given, packed)
        place.row, place.cycle = place.row + len(packed), place.cycle + 1
        place.given = place.given + self._begun(packed)
        return cycle

    def _pack(self, place, docs) -> RowPlan:
        """The plan of docs; its `doc` are places in docs, as one may be there twice."""
        return shuffled_plan(self.store.lengths[docs], self.length, self.packing, [self.seed, place.cycle])

    def _draw(self, place, share) -> np.ndarray:
        """Take `share` of a cycle's documents out of the queues."""
        phase, drawn = self.phases[place.phase], []
        place.debt = place.debt + phase.amounts * share
        for s, owed in enumerate(place.debt):
            size = np.ones_like(self.store.lengths) if phase.counted[s] else self.store.lengths
            all_of_it = size[self.store.starts[s] : self.store.starts[s + 1]].sum(dtype=np.int64)
            missing = owed - size[place.queues[s]].sum(dtype=np.int64)
            for _ in range(math.ceil(missing / all_of_it)):
                place.queues[s] = np.append(place.queues[s], self._shuffle(s, place.passes[s]))
                place.passes[s] += 1
            ends = np.append(0, np.cumsum(size[place.queues[s]], dtype=np.int64))
            n = np.searchsorted(ends, owed) if owed > 0 else 0
            place.debt[s] -= ends[n]
            drawn.append(place.queues[s][:n])
            place.queues[s] = place.queues[s][n:]
        return np.concatenate(drawn)

    def _shuffle(self, s, n) -> np.ndarray:
        """All documents of source s, in the order of its n-th pass."""
        seed = np.random.SeedSequence([self.seed, self._seeds[s], int(n)])
        docs = np.arange(self.store.starts[s], self.store.starts[s + 1])
        return np.random.Generator(np.random.Philox(seed)).permutation(docs)

    def _begun(self, plan) -> np.ndarray:
        """How many documents of each source begin in a plan: int [sources]."""
        return np.bincount(self.store.owner(plan.doc[plan.start == 0]), minlength=len(self.names))

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_cycles": [], "_held": 0, "_place": None}
