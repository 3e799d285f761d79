"""How a global batch is shared among processes, how seeds are derived, an epoch's order."""

import functools

import grain
import numpy as np


def rows_per_process(batch: int, process_index: int, process_count: int) -> int:
    """Divides a global batch among processes.

    Args:
        batch: Rows of the global batch.
        process_index: This process.
        process_count: Processes that share the batch.

    Returns:
        Rows of this process.

    Raises:
        ValueError: If the processes do not divide the batch, or the index is out of range.
    """
    if not 0 <= process_index < process_count:
        raise ValueError(
            f"process_index={process_index} must lie between 0 and process_count - 1 = "
            f"{process_count - 1}"
        )
    if batch < 1 or batch % process_count:
        raise ValueError(
            f"batch={batch} must be a positive multiple of the {process_count} processes that "
            "share it"
        )
    return batch // process_count


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
