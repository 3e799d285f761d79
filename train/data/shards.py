"""How global batches are put together from shards, how seeds are derived, an epoch's order.

A global batch is the same whatever the number of processes: row r of B comes from data shard
r // (B // shards), and each process reads the rows that its devices hold.
"""

import functools
from collections.abc import Callable
from typing import Any

import grain
import numpy as np


def check_rows(batch: int, rows: np.ndarray | None) -> np.ndarray:
    """Checks which rows of a global batch are wanted.

    Args:
        batch: B, rows of the global batch.
        rows: Rows, ascending; None: all of them.

    Returns:
        The rows.

    Raises:
        ValueError: If there are none, or they are not ascending rows of the batch.
    """
    if batch < 1:
        raise ValueError(f"batch={batch} must be at least 1")
    rows = np.arange(batch) if rows is None else np.asarray(rows)
    if not rows.size or rows[0] < 0 or rows[-1] >= batch or (np.diff(rows) < 1).any():
        raise ValueError(f"rows={rows.tolist()} must be ascending rows of a batch of {batch}")
    return rows


class GlobalBatches:
    """Some rows of an endless sequence of global batches; an iterator of dicts of arrays.

    A global batch holds the batches of all data shards one after another. Only the shards that the
    rows come from are opened, and so read.

    Args:
        open_shard: Opens the batches of a shard, each of B // shards rows.
        batch: B, rows of the global batch.
        shards: Data shards.
        rows: Rows wanted, as in `check_rows`.

    Raises:
        ValueError: If the shards do not divide the batch, or there are no such rows.
    """

    def __init__(
        self,
        open_shard: Callable[[int], grain.DatasetIterator],
        *,
        batch: int,
        shards: int,
        rows: np.ndarray | None,
    ) -> None:
        rows = check_rows(batch, rows)
        if batch % shards:
            raise ValueError(
                f"batch={batch} is not a multiple of data.shards={shards}; change one of them"
            )
        shard, row = np.divmod(rows, batch // shards)
        self._parts = {int(i): (open_shard(int(i)), row[shard == i]) for i in np.unique(shard)}

    def __iter__(self) -> "GlobalBatches":
        """Returns itself."""
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        """Returns the rows of the next global batch."""
        parts = [_take(next(batches), rows) for batches, rows in self._parts.values()]
        if len(parts) == 1:
            return parts[0]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def get_state(self) -> dict[str, Any]:
        """Returns the position in each shard that is read, by its number; JSON-serialisable."""
        return {str(shard): batches.get_state() for shard, (batches, _) in self._parts.items()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues with the batch that follows a position.

        Args:
            state: Positions by shard; those of shards that are not read here are left aside.

        Raises:
            ValueError: If a shard has no position.
        """
        missing = [shard for shard in self._parts if str(shard) not in state]
        if missing:
            raise ValueError(
                f"the position in the data lacks shards {missing}; it has {sorted(state)}"
            )
        for shard, (batches, _) in self._parts.items():
            batches.set_state(state[str(shard)])

    def close(self) -> None:
        """Stops the threads."""
        for batches, _ in self._parts.values():
            batches.close()


def _take(batch: dict[str, np.ndarray], rows: np.ndarray) -> dict[str, np.ndarray]:
    """Returns some rows of a batch."""
    if len(rows) == len(next(iter(batch.values()))):
        return batch
    return {name: leaf[rows] for name, leaf in batch.items()}


def check_seed(seed: int) -> None:
    """Refuses a seed that cannot be hashed.

    Args:
        seed: The seed of a run.

    Raises:
        ValueError: If it is negative.
    """
    if seed < 0:
        raise ValueError(f"seed={seed} must not be negative")


@functools.lru_cache(maxsize=4096)
def derive_seed(*parts: int) -> int:
    """Hashes non-negative integers into one seed below 2**32.

    grain shuffles epoch e by seed + e, so nearby seeds would share epochs were they used as given.

    Args:
        parts: A seed, and what tells its uses apart.

    Returns:
        The derived seed.
    """
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint32)[0])


def shuffled_indices(count: int, seed: int) -> grain.MapDataset:
    """Returns an endless dataset of indices below count, every epoch in an order of its own.

    It is `grain.MapDataset.range(count).shuffle(seed).repeat()` with the permutation of an epoch
    held in memory. grain computes each index with a cipher over at least 16 bits, and walks until
    it falls below count: measured 15 ms an index for 2 elements and 0.2 ms for 200, which would
    bind a run on a small data set.

    Args:
        count: Number of elements; their permutation must fit in memory.
        seed: Seed, non-negative.

    Returns:
        Random access: position i belongs to epoch i // count.
    """

    def look_up(position: int, _: int) -> int:
        epoch, place = divmod(position, count)
        return int(_epoch_order(count, seed, epoch)[place])

    return grain.MapDataset.range(count).repeat().map_with_index(look_up)


@functools.lru_cache(maxsize=8)
def _epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """Returns the permutation of one epoch."""
    return np.random.default_rng((seed, epoch)).permutation(count)
