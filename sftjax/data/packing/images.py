"""Rows of images, and of texts with images, whose files are decoded as rows are read: in the loader's workers."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from sftjax.data.packing.pack import Batch, Examples, Field, FixedRows, TokenRows
from sftjax.data.records.images import pixels
from sftjax.errors import DataError


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


class Patches(NamedTuple):
    """How an image becomes patches: its middle square of `side`, or all of it in `limits`[0] to [1] patches."""

    side: int
    patch: int
    channels: int
    limits: tuple[int, ...] = ()
    each: int = 1  # patches of a token

    @property
    def most(self) -> int:
        """The most patches of an image."""
        return self.limits[1] if self.limits else (self.side // self.patch) ** 2

    def of(self, data: bytes, where: str = "") -> np.ndarray:
        """uint8 [height, width, P, P, C] of an image's file: its patches by row and column. Raises: DataError."""
        image, p = pixels(data, self._size if self.limits else self.side, self.channels, where), self.patch
        rows, columns = image.shape[0] // p, image.shape[1] // p
        return np.swapaxes(image.reshape(rows, p, columns, p, self.channels), 1, 2)

    def tokens(self, data: bytes, where: str = "") -> int:
        """Of an image's file. Raises: DataError."""
        return int(np.prod(self.of(data, where).shape[:2])) // self.each

    def _size(self, height, width):
        """(height, width) as the image is read: in as many patches as it fills, within the limits.

        The scale is the largest, to 1e-5, at which the patches that the image touches are no more; as of SigLIP 2's
        processor in transformers, in Phi-4's form, which leaves images between the limits at their size.
        """
        p = self.patch
        most = min(max((height // p) * (width // p), self.limits[0], 1), self.limits[1])
        low, high, step = 1e-6, 100.0, 1e-5
        grid = lambda scale: [max(1, int(np.ceil(n * scale / p))) for n in (height, width)]  # noqa: E731
        while high - low >= step:
            middle = (low + high) / 2
            low, high = (middle, high) if np.prod(grid(middle)) <= most else (low, middle)
        return tuple(n * p for n in grid(low))

    def fields(self, rows: int, cells: int) -> dict[str, Field]:
        """The arrays of the images of `rows` rows of `cells` patches: of images of any size also which is whose."""
        p: dict[str, Any] = {"patches": (np.uint8, (self.patch, self.patch, self.channels))}
        p |= {"patch_segments": (np.int32, ()), "patch_places": (np.int32, (4,))} if self.limits else {}
        return {k: Field((rows, cells, *x), kind, ("batch", None, *[None] * len(x))) for k, (kind, x) in p.items()}

    def batch(self, rows: Sequence[Sequence[bytes]], cells: int) -> Batch:
        """The arrays of the images of each row."""
        out: Batch = {k: np.zeros(f.shape, f.dtype) for k, f in self.fields(len(rows), cells).items()}
        for r, images in enumerate(rows):
            self.fill({k: v[r] for k, v in out.items()}, images)
        return out

    def fill(self, row: Batch, images: Sequence[bytes]) -> None:
        """Write the images one after the other into a row."""
        at = 0
        for n, data in enumerate(images, 1):
            found = self.of(data)
            height, width = found.shape[:2]
            cells = slice(at, at + height * width)
            row["patches"][cells] = found.reshape(-1, *found.shape[2:])
            if self.limits:
                y, x = np.divmod(np.arange(height * width), width)
                row["patch_segments"][cells] = n
                row["patch_places"][cells] = np.stack([y, x, np.full_like(y, height), np.full_like(y, width)], -1)
            at = cells.stop

    def cells(self, tokens: float) -> int:
        """The patches for which there is room where a row has at most so many tokens of images; never none."""
        return max(int(tokens), 1) if self.limits else max(int(tokens * self.each / self.most), 1) * self.most


def files(images: np.ndarray, sizes: np.ndarray) -> list[bytes]:
    """The file of each image, of the bytes of all and how many each has."""
    stops = np.cumsum(sizes)
    return [images[stop - n : stop].tobytes() for stop, n in zip(stops, sizes, strict=True)]


@dataclass(frozen=True)
class ImageTextRows(TokenRows):
    """TokenRows of examples (tokens, weights, images, sizes); see `files`. Their images are decoded as rows are read.

    An image is cut into patches; the n-th image token of a row is that of its n-th patch, or square of patches. share:
    the most of an example's tokens that are of images, which says for how many patches a row has room.
    """

    share: float = 1.0
    patches: Patches = field(default_factory=lambda: Patches(0, 1, 3))

    def spec(self, rows: int, width: int) -> dict[str, Field]:
        """Those of TokenRows, with the patches of images; see models.vision_language."""
        cells = self.patches.cells(width * self.share + 1e-6)
        return super().spec(rows, width) | self.patches.fields(rows, cells)

    def fill(self, row: Batch, examples: Examples, pieces: Sequence[tuple[int, int, int]]) -> None:
        """Write the pieces, which are whole examples, into a row, and their images."""
        whole: dict[int, Any] = {doc: examples[doc] for doc, _, _ in pieces}
        for doc, start, stop in pieces:
            if (start, stop) != (0, len(whole[doc][0])):
                raise DataError(
                    f"tokens {start} to {stop} of {len(whole[doc][0])}: texts with images are not cut",
                    kind="image_slots",
                )
        super().fill(row, {doc: arrays[:2] for doc, arrays in whole.items()}, pieces)
        self.patches.fill(row, [data for doc, _, _ in pieces for data in files(*whole[doc][2:])])
