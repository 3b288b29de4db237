"""How images become patches, and whole rows of them."""

import numpy as np
import pytest
from vision_language import png

from sftjax.data import DataError
from sftjax.data.packing.images import ImageTextRows, Patches
from sftjax.data.records.images import pixels


def test_images_of_any_size_stay_within_the_limits():
    sizes = [(1, 5000), (5000, 1), (1, 1), (1, 10**7), (3000, 4000), (16, 16), (17, 15), (256, 256), (260, 250)]
    for p, low, high in ((16, 256, 3600), (4, 6, 20), (14, 1, 1), (16, 5, 5)):
        own = Patches(256, p, 3, (low, high))
        for height, width in sizes:
            rows, columns = (n // p for n in own._size(height, width))
            assert own._size(height, width) == (rows * p, columns * p)
            assert 1 <= rows * columns <= high and min(rows, columns) >= 1, (height, width)
    own = Patches(256, 16, 3, (4, 3600))
    assert own._size(160, 320) == (160, 320)  # of whole patches, within the limits: as it is
    assert own._size(100, 100) == (96, 96)  # of 6 x 6 patches as it fills


def test_an_image_is_its_patches_by_row_and_column():
    own = Patches(8, 4, 3, (1, 100))
    cut = own.of(png(8, 12))
    assert cut.shape == (2, 3, 4, 4, 3)
    whole = pixels(png(8, 12), lambda h, w: (h, w), 3)
    np.testing.assert_array_equal(np.swapaxes(cut, 1, 2).reshape(8, 12, 3), whole)
    np.testing.assert_array_equal(cut[1, 2], whole[4:8, 8:12])
    assert own.of(png(1, 5000)).shape[:2] == (1, 1)  # it fills no patch


def test_pieces_of_texts_are_refused():
    data = np.frombuffer(png(8, 8), np.uint8)
    example = (np.full(6, 7, np.int32), np.ones(6, np.float32), data, np.array([len(data)], np.int32))
    layout = ImageTextRows(patches=Patches(8, 4, 3))
    row = {k: np.zeros(f.shape[1:], f.dtype) for k, f in layout.spec(1, 8).items()}
    layout.fill(row, [example], [(0, 0, 6)])
    assert row["patches"].any((1, 2, 3)).sum() == 4
    with pytest.raises(DataError, match="texts with images are not cut"):
        layout.fill(row, [example], [(0, 0, 5)])
