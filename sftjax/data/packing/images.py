"""The rows of a batch of images, which are decoded as they are read: in the loader's workers."""

from collections.abc import Sequence

import numpy as np

from sftjax.data.packing.pack import Batch, Examples, FixedRows
from sftjax.data.records.images import pixels


class ImageRows(FixedRows):
    """One image a row: its file's bytes, weights [1] and targets [1] become pixels and the two."""

    def __init__(self, side: int, channels: int) -> None:
        """side: height and width of the images; channels: 1 or 3."""
        image = ("image", (side, side, channels), np.uint8)
        super().__init__((image, ("weights", (1,), np.float32), ("targets", (1,), np.int32)))

    def fill(self, row: Batch, examples: Examples, pieces: Sequence[tuple[int, int, int]]) -> None:
        """Decode the one image of a row."""
        [(i, _, _)] = pieces
        data, row["weights"][...], row["targets"][...] = examples[i]
        row["image"][...] = pixels(data.tobytes(), *row["image"].shape[1:])
