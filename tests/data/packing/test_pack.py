import numpy as np
import pytest

from sftjax.data import make_batch, pack, shift
from sftjax.data.packing.pack import pad_to_multiple, plan


def docs_of(*token_lists):
    return [(np.array(t, np.int32), np.ones(len(t), np.float32)) for t in token_lists]


def packed_tokens(docs, capacity, strategy):
    rows = pack([len(d) for d in docs], capacity, strategy)
    return [[t for doc, start, stop in row for t in docs[doc][start:stop]] for row in rows]


def sizes(docs, capacity, strategy):
    rows = pack([len(d) for d in docs], capacity, strategy)
    return [[stop - start for _, start, stop in row] for row in rows]


P2 = [[1, 2, 3, 4, 5], [6, 7], [8, 9, 10, 11], [12]]


@pytest.mark.parametrize(
    "case, strategy, capacity, docs, rows, lengths",
    [
        (
            "P1", "bfd", 4, [[1, 2, 3], [4, 5, 6, 7], [8]],
            [[4, 5, 6, 7], [1, 2, 3, 8]], [[4], [3, 1]],
        ),
        ("P2", "bfd", 4, P2, [[1, 2, 3, 4], [8, 9, 10, 11], [6, 7, 12]], [[4], [4], [2, 1]]),
        (
            "P3", "bfd_split", 4, P2,
            [[1, 2, 3, 4], [8, 9, 10, 11], [6, 7, 5, 12]], [[4], [4], [2, 1, 1]],
        ),
        ("P5", "bfd", 4, [[1, 2], [], [3, 4, 5], [], [6]], [[3, 4, 5, 6], [1, 2]], [[3, 1], [2]]),
        (
            "P7", "wrapped", 3, [[1, 2, 3], [4, 5, 6, 7], [8]],
            [[1, 2, 3], [4, 5, 6], [7, 8]], [[3], [3], [1, 1]],
        ),
        ("none", "none", 3, [[1, 2], [], [3, 4, 5, 6]], [[1, 2], [3, 4, 5]], [[2], [3]]),
    ],
)  # fmt: skip
def test_cases(case, strategy, capacity, docs, rows, lengths):
    assert packed_tokens(docs, capacity, strategy) == rows
    assert sizes(docs, capacity, strategy) == lengths


def test_weights_are_wrapped_with_their_tokens():  # P7's mask column
    docs = docs_of([1, 2, 3], [4, 5, 6, 7], [8])
    masks = [[0, 1, 1], [0, 0, 1, 1], [1]]
    rows = pack([3, 4, 1], 3, "wrapped")
    assert [[masks[d][i] for d, a, b in row for i in range(a, b)] for row in rows] == [
        [0, 1, 1],
        [0, 0, 1],
        [1, 1],
    ]
    batch = make_batch(docs, 3, rows)
    np.testing.assert_array_equal(batch["tokens"], [[1, 2, 3], [4, 5, 6], [7, 8, 0]])
    np.testing.assert_array_equal(batch["positions"], [[0, 1, 2], [0, 1, 2], [0, 0, 0]])
    np.testing.assert_array_equal(batch["segments"], [[1, 1, 1], [1, 1, 1], [1, 2, 0]])


def test_documents_go_on_in_the_next_row():  # P10, of torchtune: 4 cells of the last row stay empty
    docs = [list(range(n)) for n in (7, 10, 9)]
    assert sizes(docs, 10, "wrapped") == [[7, 3], [7, 3], [6]]
    batch = make_batch(docs_of(*docs), 10, pack([7, 10, 9], 10, "wrapped"))
    np.testing.assert_array_equal(batch["positions"][0], [0, 1, 2, 3, 4, 5, 6, 0, 1, 2])
    np.testing.assert_array_equal(batch["segments"][2], [1, 1, 1, 1, 1, 1, 0, 0, 0, 0])


@pytest.mark.parametrize("strategy", ["bfd", "none"])
def test_weights_follow_their_tokens(strategy):  # P12
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 20, 40)
    docs = [(rng.integers(1, 999, n), rng.integers(0, 2, n) / 2) for n in lengths]
    rows = pack(lengths, 32, strategy)
    batch = make_batch(docs, 32, rows)
    assert set(batch) == {"tokens", "targets", "weights", "positions", "segments"}
    for r, row in enumerate(rows):
        for segment, (doc, *_) in enumerate(row, 1):
            cells, (targets, weights) = batch["segments"][r] == segment, shift(*docs[doc])
            np.testing.assert_array_equal(batch["targets"][r, cells], targets)
            np.testing.assert_array_equal(batch["weights"][r, cells], weights)
    assert (batch["weights"] > 0).sum() == sum((w[1:] > 0).sum() for _, w in docs)


def one_by_one(lengths, capacity):
    """Best-fit decreasing as one would write it down: a document at a time, queues of rows."""
    rows, waiting = [], []
    for doc in sorted(range(len(lengths)), key=lambda i: -min(lengths[i], capacity)):
        size = min(lengths[doc], capacity)
        if not size:
            continue
        fits = [(room, n, row) for n, (room, row) in enumerate(waiting) if room >= size]
        if fits:
            room, n, row = min(fits)
            del waiting[n]
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append((doc, 0, size))
        waiting.append((room - size, row))
    return rows


def test_bfd_needs_no_more_rows_than_best_fit_decreasing():
    saved = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        capacity = int(rng.integers(1, 60))
        lengths = rng.integers(0, capacity + 5, int(rng.integers(0, 150))).tolist()
        rows, classic = pack(lengths, capacity, "bfd"), one_by_one(lengths, capacity)
        assert len(rows) <= len(classic)
        saved += len(classic) - len(rows)
    assert saved > 0


def test_bfd_packs_documents_that_are_all_short_of_a_row_almost_full():
    lengths = np.clip(np.random.default_rng(0).normal(195, 60, 6500).astype(int), 78, 550)
    rows = pack(lengths, 2048, "bfd")
    assert lengths.sum() / (2048 * len(rows)) > 0.997  # best-fit decreasing: 0.991


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped", "none"])
def test_every_token_is_placed_once_and_no_row_overflows(strategy):
    lengths = np.random.default_rng(0).integers(0, 90, 500)
    rows = pack(lengths, 64, strategy)
    seen = [(d, t) for row in rows for d, a, b in row for t in range(a, b)]
    cut = strategy in ("bfd", "none")
    expected = np.minimum(lengths, 64).sum() if cut else lengths.sum()
    assert len(set(seen)) == len(seen) == expected
    assert max(sum(b - a for _, a, b in row) for row in rows) <= 64
    assert all(a < b for row in rows for _, a, b in row)


def test_nothing_to_pack():
    for strategy in ("bfd", "bfd_split", "wrapped", "none"):
        assert pack([], 4, strategy) == pack([0, 0], 4, strategy) == []


def test_a_million_documents_are_packed_tightly():  # in how long: benchmarks/packing.py
    lengths = np.random.default_rng(0).lognormal(5.2, 0.8, 1_000_000).astype(int) + 1
    rows = plan(lengths, 2048, "bfd")
    assert np.minimum(lengths, 2048).sum() / (len(rows) * 2048) > 0.999


def test_bad_arguments():
    with pytest.raises(ValueError, match="data.packing='best': expected one of bfd, bfd_split"):
        pack([1], 4, "best")
    with pytest.raises(ValueError, match="at least 1 token, but the capacity is 0"):
        pack([1], 0)


def test_shift_stays_inside_the_document():
    targets, weights = shift([5, 6, 7, 8], [0, 0, 1, 0.5])
    assert targets.tolist() == [6, 7, 8, 0]
    assert weights.tolist() == [0, 1, 0.5, 0]
    assert (targets.dtype, weights.dtype) == (np.int32, np.float32)
    assert [a.tolist() for a in shift([], [])] == [[], []]
    assert [a.tolist() for a in shift([3], [1])] == [[0], [0]]


def test_padded_batch():  # C1
    batch = make_batch(docs_of([1, 2, 3], [4, 5]))
    np.testing.assert_array_equal(batch["tokens"], [[1, 2, 3], [4, 5, 0]])
    np.testing.assert_array_equal(batch["targets"], [[2, 3, 0], [5, 0, 0]])
    np.testing.assert_array_equal(batch["weights"], [[1, 1, 0], [1, 0, 0]])
    np.testing.assert_array_equal(batch["segments"], [[1, 1, 1], [1, 1, 0]])
    assert {k: v.dtype for k, v in batch.items()} == {
        **dict.fromkeys(["tokens", "targets", "positions", "segments"], np.dtype(np.int32)),
        "weights": np.dtype(np.float32),
    }


def test_padding_free_batch():  # C2: the first token of a document is never a target
    batch = make_batch(docs_of([1, 2, 3], [4, 5]), 5, [[(0, 0, 3), (1, 0, 2)]])
    np.testing.assert_array_equal(batch["tokens"], [[1, 2, 3, 4, 5]])
    np.testing.assert_array_equal(batch["positions"], [[0, 1, 2, 0, 1]])
    np.testing.assert_array_equal(batch["targets"], [[2, 3, 0, 5, 0]])
    np.testing.assert_array_equal(batch["weights"], [[1, 1, 0, 1, 0]])
    np.testing.assert_array_equal(batch["segments"], [[1, 1, 1, 2, 2]])


def test_pad_to_multiple():  # C4
    rows = [[(0, 0, 3), (1, 0, 2)]]
    batch = make_batch(docs_of([1, 2, 3], [4, 5]), pad_to_multiple(5, 4), rows)
    np.testing.assert_array_equal(batch["tokens"], [[1, 2, 3, 4, 5, 0, 0, 0]])
    np.testing.assert_array_equal(batch["positions"], [[0, 1, 2, 0, 1, 0, 0, 0]])
    assert pad_to_multiple(8, 4) == 8


def test_a_real_token_equal_to_the_pad_is_trained():  # C6
    batch = make_batch(docs_of([1, 0, 3], [4, 0]), 4)
    np.testing.assert_array_equal(batch["tokens"], [[1, 0, 3, 0], [4, 0, 0, 0]])
    np.testing.assert_array_equal(batch["weights"], [[1, 1, 0, 0], [1, 0, 0, 0]])
    np.testing.assert_array_equal(batch["segments"], [[1, 1, 1, 0], [1, 1, 0, 0]])


def test_given_weights_are_taken_as_they_are():  # C7
    docs = [([1, 2, 3], [0, 0.25, 2]), ([4, 5], [0, 0])]
    batch = make_batch(docs, 3)
    np.testing.assert_array_equal(batch["weights"], [[0.25, 2, 0], [0, 0, 0]])


def test_a_piece_of_a_document_is_shifted_inside_the_piece():
    docs = docs_of([1, 2, 3, 4, 5])
    batch = make_batch(docs, 3, [[(0, 0, 3)], [(0, 3, 5)]])
    np.testing.assert_array_equal(batch["targets"], [[2, 3, 0], [5, 0, 0]])
    np.testing.assert_array_equal(batch["weights"], [[1, 1, 0], [1, 0, 0]])
    np.testing.assert_array_equal(batch["positions"], [[0, 1, 2], [0, 1, 0]])


def test_a_row_that_does_not_fit():
    with pytest.raises(ValueError, match="row 1 has 3 tokens, but length is 2; raise the length"):
        make_batch(docs_of([1, 2], [3, 4, 5]), 2)
