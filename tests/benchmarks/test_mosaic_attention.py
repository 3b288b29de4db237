"""benchmarks/mosaic_attention.py: the ranges of keys that its kernels are given."""

import itertools

import numpy as np
import pytest

from benchmarks import mosaic_attention
from sftjax.ops import attention
from sftjax.ops.attention.asked import Where

# Three documents and padding; five documents.
SEGMENTS = np.repeat([[1, 2, 3, 0, 0], [1, 2, 3, 4, 5]], [7, 1, 9, 2, 5], axis=1).astype(np.int32)


@pytest.mark.parametrize("causal, window", list(itertools.product((True, False), (0, 5))))
def test_ranges_are_what_the_reference_lets_a_query_see(causal, window):
    at = np.arange(SEGMENTS.shape[1])
    starts = np.insert(SEGMENTS[:, 1:] != SEGMENTS[:, :-1], 0, True, axis=1)
    positions = at - np.maximum.accumulate(np.where(starts, at, 0), axis=1)
    first, end = (np.asarray(x)[..., None] for x in mosaic_attention.ranges(SEGMENTS, window))
    seen = (first <= at) & (at < end)
    if causal:  # which the kernels do themselves
        seen &= at <= at[:, None]
    where = Where(SEGMENTS, SEGMENTS, positions, positions)
    real = SEGMENTS > 0
    wanted = np.asarray(attention.mask(where, causal, window))
    assert np.array_equal(seen[real], wanted[real]) and 0 < wanted[real].mean() < 0.5
