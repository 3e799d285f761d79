"""How a global batch is shared among processes, and how seeds are derived from seeds."""

import functools

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
