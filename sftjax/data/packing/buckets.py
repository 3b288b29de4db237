"""Rows of one document each, in batches as wide as the smallest of a few lengths that will do."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from sftjax.data.packing.pack import Batch, RowPlan
from sftjax.data.packing.rows import Rows, Store, take_rows
from sftjax.errors import DataError


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
