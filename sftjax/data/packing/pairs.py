"""Rows of pairs: a source in one array, and its target in another, under the same segment."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sftjax.data.packing.pack import Batch, Examples, Field

NONE = -1  # no token: what fills up the shorter one of a pair


@dataclass(frozen=True)
class PairRows:
    """Rows of `source` tokens of sources beside `target` tokens of targets, or as many per width.

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
