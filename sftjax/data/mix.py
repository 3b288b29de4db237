"""Several sources in one stream of rows: shares of tokens or counts of documents, in phases.

A mixture comes in cycles. In a cycle each source gives the next documents of its own endless
stream: a shuffle of all it has, then another one, and so on. The cycle's documents are packed
together as `Rows` packs those of an epoch. Where each stream stands is a function of the row index,
like everything else here.
"""

import difflib
import hashlib
import math
import re
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sftjax import config as config_lib
from sftjax.config import ConfigError
from sftjax.data.pack import Batch, Plan
from sftjax.data.rows import Rows, shuffled_plan, take_rows

# ---- what the config says ------------------------------------------------------------------

# Keys of `data` that an entry of data.sources may set for its rows alone.
OWN = ("limit", "fields", "roles", "train_on", "stop_token", "reasoning", "system", "overlong")
OWN += ("template_kwargs", "clean", "split", "augment", "augment_copies", "on_error")
OWN += ("max_skipped",)


class Source(NamedTuple):
    """An entry of data.sources. Of weight, count and replay at most one is given."""

    name: str
    config: object  # the run's config, as if this were its only source
    weight: float | None = None  # its share of the tokens, beside the other weights
    count: int = 0  # its documents in a cycle
    replay: float = 0.0  # its share of all tokens in every phase; the others keep their proportions


def sources(config) -> list[Source]:
    """The entries of data.sources, or data.train as the only one. Raises: ConfigError."""
    d = config.data
    if d.train and d.sources:
        raise ConfigError("data.train and data.sources are both set; keep one of them")
    if not d.train and not d.sources:
        raise ConfigError("data.train is empty; give a file, a glob or a hub data set id")
    found = [_source(config, i, entry) for i, entry in enumerate(d.sources)]
    found = found or [Source("train", config)]
    mixing = d.phases or d.temperature != 1 or found[0].count or found[0].replay
    if len(found) == 1 and mixing:
        raise ConfigError(
            "phases, temperature, count and replay mix several data.sources, but there is one"
        )
    names = [s.name for s in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"data.sources: two are called {twice[0]!r}; set their 'name'")
    if sum(s.replay for s in found) >= 1:
        raise ConfigError("data.sources: the replay shares add up to 1 or more")
    return found


def _source(config, i, entry) -> Source:
    what, keys = f"data.sources[{i}]", ("path", "name", *Source._fields[2:], *OWN)
    _check_keys(what, entry, keys)
    if not entry.get("path"):
        raise ConfigError(f"{what} has no 'path': a file, a glob or a hub data set id")
    name = entry.get("name") or Path(entry["path"].split(",")[0]).name.split(".")[0]
    if not re.fullmatch(r"[\w-]+", name):
        raise ConfigError(f"{what}: set a 'name' of letters, digits, _ and -; {name!r} is none")
    source = Source(name, _alone(config, what, entry), entry.get("weight"))
    source = source._replace(count=entry.get("count", 0), replay=entry.get("replay", 0.0))
    given = [k for k in ("weight", "count", "replay") if getattr(source, k)]
    if len(given) > 1:
        raise ConfigError(f"{what} has {given[0]} and {given[1]}; a source has one of them")
    amounts = {"weight": source.weight or 0, "count": source.count, "replay": source.replay}
    _check_amounts(what, amounts)
    return source


def _alone(config, what, entry):
    """The config as it would be if this entry's rows were all of data.train."""
    alone = config.copy_and_resolve_references()
    alone.data.sources, alone.data.phases, alone.data.train = (), (), entry["path"]
    own = {k: v for k, v in entry.items() if k in OWN}
    for key, value in own.items():
        inner = value.items() if isinstance(value, Mapping) else [("", value)]
        for part, part_value in inner:
            try:
                config_lib.override(alone, f"data.{key}.{part}".rstrip("."), str(part_value))
            except ConfigError as e:
                raise ConfigError(f"{what}: {str(e).removeprefix('--config.')}") from None
    return alone


def _check_keys(what, entry, known):
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{what} is {entry!r}; expected a dict with {', '.join(known)}")
    for key in entry:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1, 0.4)
            hint = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(known)}"
            raise ConfigError(f"{what} has an unknown key {key!r}; {hint}")


def _check_amounts(what, amounts):
    for name, value in amounts.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
            raise ConfigError(f"{what}: {name}={value!r}; expected a number, 0 or more")


class Phase(NamedTuple):
    """What each source gives in a cycle."""

    until: str  # the duration at which it ends; "" = with the run
    amounts: np.ndarray  # float64 [sources]: tokens, or documents where counted
    counted: np.ndarray  # bool [sources]


def phases(config, sources, stores) -> list[Phase]:
    """The phases of data.phases, or the one that the sources describe. Raises: ConfigError.

    A cycle has as many tokens as the sources with a weight hold together, divided by the weights;
    in addition the counted documents; and of replay sources what makes their share. Sources without
    a weight share these tokens by (their own tokens) ** (1 / data.temperature), so at temperature 1
    a cycle is every document once.
    """
    entries = config.data.phases or ({},)
    return [_phase(config, i, entry, sources, stores) for i, entry in enumerate(entries)]


def _phase(config, i, entry, sources, stores):
    what, temperature = f"data.phases[{i}]", config.data.temperature
    last = i == max(len(config.data.phases), 1) - 1
    _check_keys(what, entry, ("until", "weights", "counts"))
    if last == ("until" in entry):
        raise ConfigError(f"{what}: every phase but the last has an 'until', such as '30%'")
    tokens = np.array([store.lengths.sum(dtype=np.int64) for store in stores])
    mean = tokens / [len(store) for store in stores]
    plain = [s for s in sources if not s.replay]
    weights, counts = entry.get("weights"), entry.get("counts")
    if weights is None and counts is None:
        counts = {s.name: s.count for s in plain if s.count}
        weights = {s.name: s.weight for s in plain if not s.count}
        what = "data.sources" if not config.data.phases else what
    weights, counts = dict(weights or {}), dict(counts or {})
    for name in (*weights, *counts):
        _check_keys(what, {name: 0}, [s.name for s in plain])
    if len(unset := [name for name, w in weights.items() if w is None]) == len(weights):
        if temperature <= 0:
            raise ConfigError(f"data.temperature={temperature}; expected more than 0")
        by_name = {s.name: t for s, t in zip(sources, tokens, strict=True)}
        weights = {name: float(by_name[name]) ** (1 / temperature) for name in weights}
    elif unset:
        raise ConfigError(f"{what}: {unset[0]!r} has no weight, but others do; give all or none")
    elif temperature != 1:
        raise ConfigError(
            f"data.temperature={temperature} makes weights out of sizes, but {what} sets weights"
        )
    _check_amounts(what, weights | counts)
    column = lambda values: np.array([float(values.get(s.name, 0)) for s in sources])  # noqa: E731
    weight, count = column(weights), column(counts)
    if not (weight + count).any():
        raise ConfigError(f"{what}: no source but those for replay gives anything")
    amounts = tokens[weight > 0].sum() * weight / max(weight.sum(), 1e-300)
    replay = np.array([s.replay for s in sources])
    total = (amounts + count * mean).sum() / (1 - replay.sum())
    # Whole tokens: what a source holds is then met exactly, without the next document.
    amounts = np.rint(amounts + replay * total)
    return Phase(entry.get("until", ""), np.where(count > 0, count, amounts), count > 0)


# ---- the rows ------------------------------------------------------------------------------


def name_seed(name: str) -> int:
    """A number that belongs to a source's name: what it gives doesn't depend on the others."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "big")


class Joined:
    """Stores one after the other, without a copy."""

    def __init__(self, stores):
        self.stores = list(stores)
        self.lengths = np.concatenate([store.lengths for store in self.stores])
        self.starts = np.append(0, np.cumsum([len(store) for store in self.stores]))

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, i: int):
        s = int(self.owner(i))
        return self.stores[s][int(i - self.starts[s])]

    def owner(self, docs):
        """Which store documents belong to."""
        return np.searchsorted(self.starts, docs, side="right") - 1


class Cycle(NamedTuple):
    first: int  # row
    given: np.ndarray  # int [sources]: documents given before it
    plan: Plan


@dataclass
class Place:
    """Where a mixture stands between two cycles."""

    row: int
    cycle: int
    phase: int
    queues: list[np.ndarray]  # of each source: documents shuffled, not yet given
    passes: np.ndarray  # int [sources]: shuffles begun
    debt: np.ndarray  # float [sources]: still owed, in the phase's unit; below 0: given too much
    given: np.ndarray  # int [sources]: documents


KEPT = 1 << 20  # documents in the cycles kept; of the newest two, all


class Mixture(Rows):
    """`Rows` of several sources. Batches have `sources` too: int32 [B, S], each token's source.

    per_epoch is the number of rows of the first phase's cycle. Cycles are planned in order, from
    the first: about a second for a million documents, at a resumption too.
    """

    def __init__(
        self,
        stores: dict,
        length: int,
        packing: str = "bfd",
        seed: int = 0,
        total_rows: int | None = None,
        *,
        phases: list[Phase],
        ends=(),
    ):
        """ends: the rows at which the phases end, all but the last's; they may be set later."""
        self.names, self.phases, self.ends = tuple(stores), phases, tuple(ends)
        self._seeds = [name_seed(name) for name in stores]
        self._cycles, self._held, self._place = [], 0, None
        super().__init__(Joined(stores.values()), length, packing, seed, total_rows)

    def _count_rows(self):
        """Plan a cycle of each phase, to know its number of rows and of documents."""
        self._rows, self._docs = [], []
        for phase in range(len(self.phases)):
            place = self._start()
            place.phase = phase
            docs = self._draw(place, 1.0)
            self._rows.append(len(self._pack(place, docs)))
            self._docs.append(self._tally(docs))
        return self._rows[0]

    def mean(self, values) -> float:
        """The mean over all rows; until the phases' ends are known, over the phases."""
        parts = np.split(np.asarray(values), self.store.starts[1:-1])
        means = np.array([part.mean() for part in parts])
        per_row = [docs @ means / n for docs, n in zip(self._docs, self._rows, strict=True)]
        known = len(self.ends) == len(self.phases) - 1
        spans = np.diff([0, *self.ends, self.total]) if known else None
        return float(np.average(per_row, weights=spans))

    def shares(self, phase: int) -> np.ndarray:
        """float [sources]: of the tokens of a phase."""
        parts = np.split(self.store.lengths, self.store.starts[1:-1])
        tokens = self._docs[phase] * [part.mean() for part in parts]
        return tokens / tokens.sum()

    def describe(self) -> list[str]:
        """A line for each phase, with the shares of its tokens."""
        lines = []
        for i, phase in enumerate(self.phases):
            shares = zip(self.names, self.shares(i), strict=True)
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
        cycle = self._cycle(r)
        return cycle.plan.row(r - cycle.first)

    def batch(self, indices) -> Batch:
        batch = super().batch(indices)
        batch["sources"] = np.zeros_like(batch["segments"])
        for b, r in enumerate(indices):
            if r < self.total:
                docs, start, stop = np.array(self.pieces(int(r))).T
                owners = np.repeat(self.store.owner(docs), stop - start)
                batch["sources"][b, : len(owners)] = owners
        return batch

    def _cycle(self, r) -> Cycle:
        with self._lock:
            if not self._cycles or r < self._cycles[0].first:
                self._cycles, self._held, self._place = [], 0, self._start()
            while r >= self._place.row:
                self._cycles.append(self._next(self._place))
                self._held += len(self._cycles[-1].plan.doc)
                while self._held > KEPT and len(self._cycles) > 2:
                    self._held -= len(self._cycles.pop(0).plan.doc)
            return self._cycles[bisect_right(self._cycles, r, key=lambda c: c.first) - 1]

    def _start(self):
        n = len(self.names)
        zeros = np.zeros(n, int)
        queues = [np.zeros(0, int)] * n
        return Place(0, 0, 0, queues, zeros.copy(), np.zeros(n), zeros.copy())

    def _next(self, place) -> Cycle:
        """Plan the cycle at `place`, and move `place` behind it."""
        if place.phase < len(self.ends) and place.row == self.ends[place.phase]:
            place.phase, place.debt = place.phase + 1, np.zeros_like(place.debt)
        left = math.inf
        if place.phase < len(self.ends):
            left = self.ends[place.phase] - place.row
        whole = self._rows[place.phase]
        docs = self._draw(place, min(1.0, left / whole))
        packed = self._pack(place, docs)
        while len(packed) < left < whole:  # the last part of a phase came out short
            docs = np.append(docs, self._draw(place, (left - len(packed)) / whole))
            packed = self._pack(place, docs)
        if len(packed) > left:
            packed = take_rows(packed, np.arange(left))
            self._put_back(place, np.delete(docs, packed.doc))
        packed = replace(packed, doc=docs[packed.doc])
        cycle = Cycle(place.row, place.given, packed)
        place.row, place.cycle = place.row + len(packed), place.cycle + 1
        place.given = place.given + self._begun(packed)
        return cycle

    def _pack(self, place, docs) -> Plan:
        """The plan of docs; its `doc` are places in docs, as one may be there twice."""
        lengths = self.store.lengths[docs]
        return shuffled_plan(lengths, self.length, self.packing, [self.seed, place.cycle])

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

    def _put_back(self, place, docs):
        owner = self.store.owner(docs)
        for s, queue in enumerate(place.queues):
            place.queues[s] = np.append(docs[owner == s], queue)

    def _shuffle(self, s, n) -> np.ndarray:
        """All documents of source s, in the order of its n-th pass."""
        seed = np.random.SeedSequence([self.seed, self._seeds[s], int(n)])
        docs = np.arange(self.store.starts[s], self.store.starts[s + 1])
        return np.random.Generator(np.random.Philox(seed)).permutation(docs)

    def _begun(self, plan) -> np.ndarray:
        """int [sources]: documents that begin in a plan."""
        return self._tally(plan.doc[plan.start == 0])

    def _tally(self, docs) -> np.ndarray:
        return np.bincount(self.store.owner(docs), minlength=len(self.names))

    def __getstate__(self):
        return super().__getstate__() | {"_cycles": [], "_held": 0, "_place": None}
