"""Pieces, packed rows and windows: every position once, in an order of its own."""

import grain
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from train.data import packing


@settings(deadline=None)
@given(length=st.integers(1, 100), size=st.integers(1, 20), offset=st.integers(1, 20))
def test_pieces_partition_a_document(length: int, size: int, offset: int) -> None:
    offset = 1 + offset % size
    count = packing.count_pieces(length, size)
    bounds = [packing.piece_bounds(length, size, piece, offset) for piece in range(count)]
    assert [i for begin, end in bounds for i in range(begin, end)] == list(range(length))
    assert all(end - begin <= size for begin, end in bounds)
    assert sum(begin == end for begin, end in bounds) <= 1
    if length <= size:
        assert bounds == [(0, length)]


def test_every_epoch_visits_every_target_once_with_its_own_cuts() -> None:
    documents = [np.arange(0, 50, dtype=np.int32), np.arange(50, 55, dtype=np.int32)]
    joined = packing.TokenisedDocuments.join(documents, 8, seed=1)
    # 49 positions: 7 pieces and one for the offset; 4 positions: one piece.
    count = int(joined.pieces[-1])
    assert count == 8 + 1
    firsts = set()
    for epoch in range(4):
        cuts = [joined.cut(epoch * count + piece, piece) for piece in range(count)]
        pairs = np.concatenate([cut["piece"] for cut in cuts if cut is not None])
        np.testing.assert_array_equal(pairs[:, 0], [*range(49), *range(50, 54)])
        np.testing.assert_array_equal(pairs[:, 1], pairs[:, 0] + 1)
        assert cuts[0] is not None
        firsts.add(len(cuts[0]["piece"]))
    assert len(firsts) > 1


def test_packed_rows_are_shuffled_in_training_only() -> None:
    pieces = [{"piece": np.full((4, 2), i, np.int32)} for i in range(64)]
    source = grain.MapDataset.source(pieces).to_iter_dataset()
    orders = [
        [int(row["piece"][0, 0]) for row in packing.pack(source, 4, seed=seed, shuffle=shuffle)]
        for seed, shuffle in ((0, False), (0, True), (1, True))
    ]
    assert orders[0] == list(range(64))
    assert sorted(orders[1]) == sorted(orders[2]) == orders[0]
    assert orders[0] != orders[1] != orders[2]


def _rows(documents: int, **keys: int) -> list[tuple[int, ...]]:
    """Takes a shard's part of two epochs of documents that fill a row each."""
    arrays = [np.arange(9 * i, 9 * i + 9, dtype=np.int32) for i in range(documents)]
    joined = packing.TokenisedDocuments.join(arrays, 8, keys.pop("seed"))
    iterator = iter(packing.memory_rows(joined, **keys))
    share = 2 * documents // keys["shards"]
    return [tuple(next(iterator)["piece"][:, 0].tolist()) for _ in range(share)]


def test_shards_hold_disjoint_halves_of_every_epoch() -> None:
    # 512 documents of one row: 256 rows, one packing, for each of two shards and epochs.
    halves = [_rows(512, seed=5, shard=i, shards=2) for i in range(2)]
    for epoch in (slice(0, 256), slice(256, 512)):
        first, second = set(halves[0][epoch]), set(halves[1][epoch])
        assert len(first) == len(second) == 256
        assert not first & second


def test_epochs_and_seeds_differ() -> None:
    one = _rows(256, seed=5, shard=0, shards=1)
    assert one == _rows(256, seed=5, shard=0, shards=1)
    assert sorted(one[:256]) == sorted(one[256:])
    assert one[:256] != one[256:]
    assert one != _rows(256, seed=7, shard=0, shards=1)


@settings(deadline=None)
@given(length=st.integers(1, 90), size=st.integers(2, 20), stride=st.integers(1, 20))
def test_windows_score_each_position_once(length: int, size: int, stride: int) -> None:
    stride = 1 + stride % size
    windows = packing.window_bounds(length, size, stride)
    scored = [i for _, end, first in windows for i in range(first, end)]
    assert scored == list(range(length))
    for begin, end, first in windows:
        assert end - begin <= size
        assert first == 0 or first - begin >= size - stride
