"""Token documents to fixed rows: pieces for training, windows for scoring, first-fit packing.

A document of n tokens t_1..t_n has L = n + 1 positions: inputs BOS, t_1..t_n and targets
t_1..t_n, EOS. Both are slices of one array BOS, t_1..t_n, EOS.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np
from grain import experimental as grain_experimental

from train.data.shards import derive_seed, shuffled_indices

BINS = 256
"""Rows that are packed together. More bins leave less padding and cost more to restore."""

_READ = grain.ReadOptions(num_threads=4, prefetch_buffer_size=64)
_NO_THREADS = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)


def count_pieces(length: int, sequence_length: int) -> int:
    """Returns how many pieces a document of L positions is cut into at most."""
    if length <= sequence_length:
        return 1
    return -(-length // sequence_length) + 1


def piece_bounds(length: int, sequence_length: int, piece: int, offset: int) -> tuple[int, int]:
    """Returns the positions [begin, end) of one piece of a document.

    A document that fits is one piece. A longer one is cut at offset, offset + S, offset + 2S, and
    so on; the last of its pieces may be empty.

    Args:
        length: L, positions of the document.
        sequence_length: S, most positions of a piece.
        piece: Which piece, from 0 to `count_pieces` - 1.
        offset: Where the first cut falls, from 1 to S.

    Returns:
        The begin and the end.
    """
    if length <= sequence_length:
        return 0, length
    begin = offset + (piece - 1) * sequence_length
    return max(0, min(begin, length)), min(begin + sequence_length, length)


@dataclasses.dataclass(frozen=True, eq=False)
class TokenisedDocuments:
    """Tokenised documents in memory, addressed by piece.

    Attributes:
        ids: [sum of (L + 1)] int32, the documents one after another, each BOS, tokens, EOS.
        starts: [documents + 1] where each begins in `ids`.
        pieces: [documents + 1] number of the first piece of each.
        sequence_length: S.
        seed: Seeds the order of the pieces, the offset of the cuts and the order of the rows.
    """

    ids: np.ndarray
    starts: np.ndarray
    pieces: np.ndarray
    sequence_length: int
    seed: int

    @classmethod
    def join(
        cls, documents: Sequence[np.ndarray], sequence_length: int, seed: int
    ) -> "TokenisedDocuments":
        """Joins documents, each [L + 1] int32 and framed by BOS and EOS."""
        sizes = [len(document) for document in documents]
        counts = [count_pieces(size - 1, sequence_length) for size in sizes]
        return cls(
            np.concatenate(documents),
            np.concatenate([[0], np.cumsum(sizes)]),
            np.concatenate([[0], np.cumsum(counts)]),
            sequence_length,
            seed,
        )

    def cut(self, index: int, piece: int) -> dict[str, np.ndarray] | None:
        """Cuts one piece out; None where this epoch's offset leaves it empty.

        Args:
            index: Position in the endless sequence of pieces, which tells the epoch.
            piece: Number of the piece among all documents'.

        Returns:
            "piece" [n, 2] int32: tokens and targets.
        """
        epoch = index // int(self.pieces[-1])
        document = int(np.searchsorted(self.pieces, piece, side="right")) - 1
        start = int(self.starts[document])
        length = int(self.starts[document + 1]) - start - 1
        offset = 1 + derive_seed(self.seed, epoch, document) % self.sequence_length
        begin, end = piece_bounds(
            length, self.sequence_length, piece - int(self.pieces[document]), offset
        )
        if begin == end:
            return None
        tokens = self.ids[start + begin : start + end]
        targets = self.ids[start + begin + 1 : start + end + 1]
        return {"piece": np.stack([tokens, targets], -1)}


def memory_rows(documents: TokenisedDocuments, *, shard: int, shards: int) -> grain.IterDataset:
    """Endless packed rows of documents in memory; every epoch is shuffled and cut anew.

    Args:
        documents: The documents of all shards.
        shard: Of every `shards` pieces this one takes one.
        shards: Shards that the pieces are dealt out to.

    Returns:
        Rows as `pack` gives them.
    """
    pieces = (
        shuffled_indices(int(documents.pieces[-1]), documents.seed)
        .map_with_index(documents.cut)
        .slice(slice(shard, None, shards))
        .to_iter_dataset(_NO_THREADS)
    )
    return pack(pieces, documents.sequence_length, seed=documents.seed, shuffle=True)


@dataclasses.dataclass(frozen=True)
class _CutDocument(grain_experimental.FlatMapTransform):
    """Cuts (offset, ids) into all its pieces."""

    sequence_length: int

    def flat_map(self, element: tuple[int, np.ndarray]) -> list[dict[str, np.ndarray]]:
        offset, ids = element
        length = len(ids) - 1
        bounds = [
            piece_bounds(length, self.sequence_length, piece, offset)
            for piece in range(count_pieces(length, self.sequence_length))
        ]
        pairs = np.stack([ids[:-1], ids[1:]], -1)
        return [{"piece": pairs[begin:end]} for begin, end in bounds if begin < end]


def streamed_rows(
    texts: Sequence[str],
    tokenise: Any,
    *,
    sequence_length: int,
    seed: int,
    shard: int,
    shards: int,
) -> grain.IterDataset:
    """Endless packed rows of documents that are read and tokenised as they are needed.

    The pieces of one document follow each other; the order of documents and the offsets of the
    cuts change every epoch. Documents without text are left out.

    Args:
        texts: Documents; random access.
        tokenise: Maps a text to ids [L + 1] int32, framed by BOS and EOS.
        sequence_length: S.
        seed: Seed.
        shard: Of every `shards` documents this one takes one.
        shards: Shards that the documents are dealt out to.

    Returns:
        Rows as `pack` gives them.
    """

    def prepare(index: int, text: str) -> tuple[int, np.ndarray] | None:
        return (1 + derive_seed(seed, index) % sequence_length, tokenise(text)) if text else None

    documents = (
        grain.MapDataset.source(texts)
        .shuffle(seed)
        .repeat()
        .map_with_index(prepare)
        .slice(slice(shard, None, shards))
        .to_iter_dataset(_READ)
    )
    pieces = grain_experimental.FlatMapIterDataset(documents, _CutDocument(sequence_length))
    return pack(pieces, sequence_length, seed=seed, shuffle=True)


def pack(
    pieces: grain.IterDataset, sequence_length: int, *, seed: int, shuffle: bool
) -> grain.IterDataset:
    """Packs pieces into rows, each piece whole and in the first row that has room.

    Args:
        pieces: Dicts of "piece" [n, channels] with n ≤ S.
        sequence_length: S.
        seed: Seeds the order of the rows.
        shuffle: Whether the rows that are packed together are shuffled.

    Returns:
        Dicts of "piece" [S, channels], "piece_segment_ids" [S] (1, 2, … in the order of arrival, 0
        for padding) and "piece_positions" [S] (from 0 in each piece).
    """
    return grain_experimental.FirstFitPackIterDataset(
        pieces,
        length_struct={"piece": sequence_length},
        num_packing_bins=BINS,
        seed=seed,
        shuffle_bins=shuffle,
    )


def named_rows(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Turns a batch of packed rows into the arrays that a model reads.

    Args:
        batch: What `pack` yields, batched: "piece" [B, S, 2 or 3].

    Returns:
        `tokens`, `targets`, `segments`, `positions` [B, S] int32 and, where there is a third
        channel, `scored` [B, S] bool.
    """
    piece = batch["piece"]
    rows = {
        "tokens": np.ascontiguousarray(piece[..., 0]),
        "targets": np.ascontiguousarray(piece[..., 1]),
        "segments": batch["piece_segment_ids"],
        "positions": batch["piece_positions"],
    }
    if piece.shape[-1] == 3:
        rows["scored"] = piece[..., 2] != 0
    return rows


def window_bounds(length: int, sequence_length: int, stride: int) -> list[tuple[int, int, int]]:
    """Returns the overlapping windows in which each position of a document is scored once.

    Args:
        length: L, positions of the document.
        sequence_length: S, most positions of a window.
        stride: Positions from one window's begin to the next one's; S - stride is the context that
            every window but the first has before its first scored position.

    Returns:
        For each window its begin, its end and the first position that it scores.
    """
    windows = []
    begin = scored = 0
    while scored < length:
        end = min(begin + sequence_length, length)
        windows.append((begin, end, scored))
        begin, scored = begin + stride, end
    return windows


def heldout_rows(
    documents: Sequence[np.ndarray], *, batch: int, sequence_length: int, stride: int
) -> grain.IterDataset:
    """Batches that score every target of the documents exactly once, always in the same order.

    Args:
        documents: Each [L + 1] int32, framed by BOS and EOS.
        batch: B.
        sequence_length: S.
        stride: As in `window_bounds`.

    Returns:
        Batches as `named_rows` gives them, `scored` included; the last is padded with empty rows.
    """
    windows = [
        (document, *bounds)
        for document, ids in enumerate(documents)
        for bounds in window_bounds(len(ids) - 1, sequence_length, stride)
    ]

    def cut(window: tuple[int, int, int, int]) -> dict[str, np.ndarray]:
        document, begin, end, scored = window
        ids = documents[document]
        mask = np.arange(begin, end, dtype=np.int32) >= scored
        channels = [ids[begin:end], ids[begin + 1 : end + 1], mask.astype(np.int32)]
        return {"piece": np.stack(channels, -1)}

    pieces = grain.MapDataset.source(windows).map(cut).to_iter_dataset(_NO_THREADS)
    padded = functools.partial(grain_experimental.batch_and_pad, batch_size=batch)
    return (
        pack(pieces, sequence_length, seed=0, shuffle=False)
        .batch(batch, batch_fn=padded)
        .map(named_rows)
    )
