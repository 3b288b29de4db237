"""The rows of a batch of images, which are decoded as they are read: in the loader's workers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from sftjax.data.packing.pack import Batch, Examples, Field
from sftjax.data.records.images import pixels


@dataclass(frozen=True)
class ImageRows:
    """One image a row: its file's bytes, weights [1] and targets [1] become pixels and the two.

    side: height and width of the images; channels: 1 or 3.
    """

    side: int
    channels: int
    fixed: ClassVar[bool] = True
    shifted: ClassVar[bool] = False

    def spec(self, rows: int, width: int) -> dict[str, Field]:
        """Image uint8 [rows, side, side, channels]; weights and targets [rows, 1]."""
        shape = (rows, self.side, self.side, self.channels)
        return {
            "image": Field(shape, np.uint8, ("batch", None, None, None)),
            "weights": Field((rows, 1), np.float32, ("batch", None)),
            "targets": Field((rows, 1), np.int32, ("batch", None)),
        }

    def fill(self, row: Batch, examples: Examples, pieces: Sequence[tuple[int, int, int]]) -> None:
        """Decode the one image of a row."""
        [(i, _, _)] = pieces
        data, row["weights"][...], row["targets"][...] = examples[i]
        row["image"][...] = pixels(data.tobytes(), self.side, self.channels)

    def trained(self, example: tuple[np.ndarray, ...]) -> int:
        """1: an image is one target."""
        return 1
