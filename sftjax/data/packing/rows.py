"""Rows by index, planned from lengths; batches of them.

A row's content is a function of (store, length, packing, seed, row index) and of nothing else, so every host reads its
own rows, the number of steps is known before training, and resuming is an index.
"""

import functools
import math
import multiprocessing
import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from threading import Lock, Thread
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from sftjax.data.packing.pack import CAUSAL, Batch, Examples, Layout, RowPlan, blank_batch, plan
from sftjax.errors import DataError

if TYPE_CHECKING:
    import grain


class Store(Examples, Protocol):
    """Examples by index with their lengths; token_store.TokenStore, where they are in files."""

    lengths: np.ndarray  # int [documents], the number of tokens of each


class Rows:
    """The stream of packed rows over all epochs, by index: `rows[r]` -> Batch row of arrays [S].

    Each epoch has a shuffle and so a packing of its own, drawn from (seed, epoch). Best-fit decreasing makes a number
    of rows that depends on the lengths alone: every epoch has `per_epoch` of them. From `total` on, rows are blank, so
    that a last batch can be full.
    """

    def __init__(
        self,
        store: Store,
        length: int,
        packing: str = "bfd",
        seed: int = 0,
        *,
        epochs: float = 1,
        shuffle: bool = True,
        layout: Layout = CAUSAL,
    ) -> None:
        """Plan rows of `length` tokens, as `pack` does, of what a store holds.

        seed: of the order of examples, and of rows; without `shuffle` it is the store's. epochs: those of `total` at
        first, also a fraction; it may be set later.
        """
        self.store, self.length, self.packing = store, length, packing
        self.seed, self.shuffle, self.layout = seed, shuffle, layout
        self._plans, self._lock = dict[int, RowPlan](), Lock()
        longest = int(max(store.lengths, default=0))
        if longest > length and packing in ("bfd", "none"):
            raise DataError(
                f"a document of {longest} tokens is longer than a row of {length}",
                f"build the store with max_length={length}, or set data.packing to bfd_split or wrapped",
                kind="setting",
            )
        self.per_epoch = self._count_rows()
        self.total = math.ceil(epochs * self.per_epoch - 1e-9)

    def _count_rows(self):
        return len(self._plan(0))

    def __len__(self) -> int:
        return self.total

    @property
    def efficiency(self) -> float:
        """The share of an epoch's cells that hold a token rather than padding."""
        return self.mean(self.store.lengths) / self.length

    def __getitem__(self, r: int) -> Batch:
        return {k: v[0] for k, v in self.batch([r]).items()}

    def mean(self, values: np.ndarray) -> float:
        """The mean over rows of the sum of values [documents] over each row's documents."""
        return float(np.sum(values)) / max(self.per_epoch, 1)

    def batch(self, indices: Sequence[int]) -> Batch:
        """The rows of these indices as arrays [B, S]; blank from `total` on."""
        batch = blank_batch(len(indices), self.length, self.layout)
        for b, r in enumerate(indices):
            if r < 0:
                raise IndexError(f"row {r}")
            if r < self.total:
                self.layout.fill({k: v[b, ...] for k, v in batch.items()}, self.store, self.pieces(int(r)))
        return batch

    def pieces(self, r: int) -> list[tuple[int, int, int]]:
        """The (document, start, stop) of row r."""
        epoch, row = divmod(r, self.per_epoch)
        return self._plan(epoch).row(row)

    def _plan(self, epoch) -> RowPlan:
        with self._lock:
            if epoch not in self._plans:
                # Two, because prefetching reads across the border of two epochs.
                self._plans = dict(list(self._plans.items())[-1:])
                self._plans[epoch] = self._make_plan(epoch)
            return self._plans[epoch]

    def _make_plan(self, epoch):
        lengths = np.asarray(self.store.lengths)
        if not self.shuffle:
            return plan(lengths, self.length, self.packing)
        return shuffled_plan(lengths, self.length, self.packing, [self.seed, epoch])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_plans": {}, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=Lock())


class Buckets(Rows):
    """`Rows` without packing, ordered so that a batch has documents of like length.

    A batch's width is one of `widths`, so a training step compiles once for each. In every epoch the batches come in a
    new order, and only those at the border of two widths hold documents of both. Like any row, a batch is a function of
    its index.
    """

    def __init__(
        self, store: Store, length: int, seed: int = 0, *, widths: Sequence[int], batch_size: int, **options: Any
    ) -> None:
        """Order the rows; the other arguments are those of `Rows`.

        widths: tokens in a row, ascending, up to `length`, which is the last one.
        batch_size: rows in a batch; batch b has the rows [b * batch_size, (b + 1) * batch_size).
        """
        self.widths, self.batch_size = np.array([*widths, length]), batch_size
        if self.widths[0] < 1 or (np.diff(self.widths) <= 0).any():
            raise DataError(
                f"data.buckets={tuple(widths)}: expected ascending lengths below {length}, the "
                "length of a row (data.max_length)",
                kind="setting",
            )
        super().__init__(store, length, "none", seed, **options)

    @property
    def efficiency(self) -> float:
        """The share of cells that hold a token, where each row is as wide as it needs."""
        lengths = np.asarray(self.store.lengths)
        return float(lengths.sum() / self.widths[np.searchsorted(self.widths, lengths)].sum())

    def batch(self, indices: Sequence[int]) -> Batch:
        """Some rows of one batch, as wide as the whole batch needs."""
        first = int(indices[0]) // self.batch_size * self.batch_size
        rows = range(first, min(first + self.batch_size, self.total))
        longest = max((stop for r in rows for _, _, stop in self.pieces(r)), default=1)
        width = self.widths[np.searchsorted(self.widths, longest)]
        fields = self.layout.spec(len(indices), int(width))  # of images not as many as tokens
        return {key: values[:, : fields[key].shape[1]] for key, values in super().batch(indices).items()}

    def _make_plan(self, epoch) -> RowPlan:
        plan = super()._make_plan(epoch)  # row r is one document, and ends at plan.stop[r]
        order = np.argsort(np.searchsorted(self.widths, plan.stop), kind="stable")
        first = -epoch * len(order) % self.batch_size  # rows of a batch that has begun before
        whole = first + (len(order) - first) // self.batch_size * self.batch_size
        batches = order[first:whole].reshape(-1, self.batch_size)
        if self.shuffle:
            batches = np.random.default_rng([self.seed, epoch]).permutation(batches)
        return take_rows(plan, np.concatenate([order[:first], batches.ravel(), order[whole:]]))


def shuffled_plan(lengths: np.ndarray, length: int, packing: str, seed: list[int]) -> RowPlan:
    """`plan` of documents in an order drawn from `seed`, its rows in another one."""
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed)))
    order = rng.permutation(len(lengths))  # breaks the ties of equal lengths
    packed = plan(lengths[order], length, packing)
    return take_rows(replace(packed, doc=order[packed.doc]), rng.permutation(len(packed)))


def take_rows(packed: RowPlan, rows: np.ndarray) -> RowPlan:
    """The rows of a plan at the indices `rows`, in that order."""
    sizes = np.diff(packed.offsets)[rows]
    offsets = np.append(0, np.cumsum(sizes))
    within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], sizes)
    pieces = np.repeat(packed.offsets[:-1][rows], sizes) + within
    return RowPlan(packed.doc[pieces], packed.start[pieces], packed.stop[pieces], offsets)


def loader(
    rows: Rows,
    batch_size: int,
    *,
    local: Sequence[int] | None = None,
    start_step: int = 0,
    stop_step: int | None = None,
    workers: int = 0,
    prefetch: int = 2,
) -> "grain.DatasetIterator":
    """Batches in order, read ahead by threads, or by `workers` processes.

    Step b is the global rows [b * batch_size, (b + 1) * batch_size); this process reads those at the places `local`
    within them, so that all processes together read what one would.

    local: None = all of them. start_step: nothing before it is read. stop_step: one past the last; default as many as
    hold all rows, the last one padded. workers: 0 = threads of this process. prefetch: batches read ahead, by each
    worker where there are any. Returns: a grain iterator of Batch, numpy [local rows, S], with get_state, set_state.
    """
    import grain

    if stop_step is None:
        stop_step = -(-rows.total // batch_size)
    local = range(batch_size) if local is None else local
    if not local or min(local) < 0 or max(local) >= batch_size:
        raise ValueError(f"local rows {local} are not within a batch of {batch_size}")
    steps = grain.MapDataset.range(start_step, max(stop_step, start_step))
    batches = steps.map(functools.partial(_read, rows=rows, batch_size=batch_size, local=local))
    batches = batches.to_iter_dataset(grain.ReadOptions(num_threads=min(prefetch, 4), prefetch_buffer_size=prefetch))
    if workers:
        from absl import flags

        if not flags.FLAGS.is_parsed():  # Grain reads them when it starts processes
            flags.FLAGS.mark_as_parsed()
        batches = batches.mp_prefetch(grain.MultiprocessingOptions(workers, prefetch), _serve)
    return iter(batches)


def _serve(worker: int, workers: int) -> None:
    """In a worker process: a stop is for the run, which still needs batches; we end with it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    run = multiprocessing.parent_process()
    if run is not None:
        Thread(target=_end_with, args=(run,), daemon=True).start()


def _end_with(process):
    process.join()
    os._exit(0)


def _read(step, rows, batch_size, local) -> Batch:
    """The batch of a step. No closure: worker processes get it pickled."""
    return rows.batch([int(step) * batch_size + at for at in local])
