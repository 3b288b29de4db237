"""How a tensor in a file and a parameter hold the same numbers, in one notation for both ways.

"(n h) d -> d n h": the file's first dimension is heads x head width. Of several parameters in one tensor, `part` says
which of a letter's places are this one's, as {letter: (offset, size in the file)}: the keys of a fused "(n h) d" begin
at head N of N + 2K. A letter that is not on the right has one place: "(n c h) d -> d n h" with {"c": (1, 3)} is the
second of three interleaved parts.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from sftjax.hf.safetensors_io import Reader

BLOCK_BYTES = 2 * 2**20  # read, checked and converted at a time


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the dimensions of a tensor in a file become those of a parameter, and back."""

    text: str
    part: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)

    @property
    def groups(self) -> list[list[str]]:
        """Letters of each file dimension."""
        found = re.findall(r"\(([^)]*)\)|(\w+)", self.text.split("->")[0])
        return [(a or b).split() for a, b in found]

    @property
    def letters(self) -> list[str]:
        """Letter of each dimension of the parameter."""
        return self.text.split("->")[1].split()

    def _sizes(self, shape) -> dict[str, int]:
        """{letter: places in the file} for a parameter of this shape."""
        sizes = dict(zip(self.letters, shape, strict=True))
        return sizes | {letter: size for letter, (_, size) in self.part.items()}

    def file_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of the tensor in the file, for a parameter of this shape."""
        sizes = self._sizes(shape)
        return tuple(math.prod(sizes[x] for x in g) for g in self.groups)

    def _view(self, shape, index) -> tuple[list[int], tuple[slice, ...]]:
        """(how many places each letter has in the file, those of parameter[index])."""
        sizes = self._sizes(shape)
        places = {letter: slice(start, start + 1) for letter, (start, _) in self.part.items()}
        for letter, size, i in zip(self.letters, shape, index, strict=True):
            (start, stop, _), (offset, _) = i.indices(size), self.part.get(letter, (0, 0))
            places[letter] = slice(start + offset, stop + offset)
        flat = [a for g in self.groups for a in g]
        return [sizes[a] for a in flat], tuple(places[a] for a in flat)

    def read(self, reader: Reader, name: str, shape: Sequence[int], index: Sequence[slice]) -> np.ndarray:
        """parameter[index] (slices) of the tensor `name`, reading only what it needs."""
        sizes, places = self._view(shape, index)
        return self._turn(reader.read(name, places, sizes))

    def _turn(self, x):
        """An array with a dimension for each letter of the file -> the parameter's order."""
        flat = [a for g in self.groups for a in g]
        lone = tuple(i for i, a in enumerate(flat) if a not in self.letters)
        left = [a for a in flat if a in self.letters]
        return np.squeeze(x, lone).transpose([left.index(a) for a in self.letters])

    def write(self, out: np.ndarray, x: np.ndarray) -> None:
        """Put the parameter x into its places of the file's tensor `out`, a contiguous array."""
        sizes, places = self._view(x.shape, [slice(None)] * x.ndim)
        self._turn(out.reshape(sizes)[places])[...] = x

    def blocks(
        self, shape: Sequence[int], index: tuple[slice, ...], dtype: np.dtype
    ) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
        """Cut `index` into (index of a block, its place in the result) along the file's rows."""
        if self.groups[0][0] not in self.letters:  # one row of the file's
            yield index, (slice(None),) * len(index)
            return
        axis = self.letters.index(self.groups[0][0])
        start, stop, _ = index[axis].indices(shape[axis])
        rows = max(1, BLOCK_BYTES * shape[axis] // (math.prod(shape) * dtype.itemsize))
        for a in range(start, stop, rows):
            b = min(a + rows, stop)
            place = (slice(None),) * axis + (slice(a - start, b - start),)
            yield (*index[:axis], slice(a, b), *index[axis + 1 :]), place
