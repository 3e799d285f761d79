"""Timing of compiled programs in turn, so that a load that comes and goes falls on all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

Row = dict[str, Any]
Step = Callable[..., Any]


def interleave(programs: dict[Any, Step], rounds: dict[Any, int]) -> dict[Any, list[float]]:
    """Times programs in turn, one run of each a round, after one run of each that is not timed.

    Args:
        programs: what to run, by name.
        rounds: in how many rounds each takes part, from the first on.

    Returns:
        Seconds of each run, by name.
    """
    times: dict[Any, list[float]] = {name: [] for name in programs}
    for program in programs.values():
        jax.block_until_ready(program())
    for turn in range(max(rounds.values())):
        for name, program in programs.items():
            if turn < rounds[name]:
                start = time.perf_counter()
                jax.block_until_ready(program())
                times[name].append(time.perf_counter() - start)
    return times


def milliseconds(part: str, times: Sequence[float]) -> Row:
    """Median, least and most of a list of seconds, as `<part>_ms`, `_ms_min` and `_ms_max`."""
    return {
        f"{part}_ms": 1e3 * statistics.median(times),
        f"{part}_ms_min": 1e3 * min(times),
        f"{part}_ms_max": 1e3 * max(times),
    }


def against(part: str, times: Sequence[float], base: Sequence[float]) -> Row:
    """`milliseconds`, and the ratio to another program's times in the same rounds.

    Returns:
        Beside the milliseconds `<part>_ratio`, the median of the rounds' ratios, and
        `<part>_ratio_of_min`, of the least times.
    """
    ratios = [mine / other for mine, other in zip(times, base, strict=False)]
    return milliseconds(part, times) | {
        f"{part}_ratio": statistics.median(ratios),
        f"{part}_ratio_of_min": min(times) / min(base),
    }


def shown(row: Row, part: str) -> str:
    """Milliseconds as printed: median (least-most)."""
    middle, least, most = (row[f"{part}_ms{end}"] for end in ("", "_min", "_max"))
    return f"{middle:.0f} ({least:.0f}-{most:.0f})"
