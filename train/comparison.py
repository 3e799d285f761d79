"""The arithmetic of a comparison: intervals over seeds, paired differences, tables.

Runs of one seed start from the same weights and see the same batches, so variants are compared seed
by seed: what the seed alone decides cancels in the difference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.special import stdtrit

from emoe_jax.config import require
from emoe_jax.routers.offset import curvature

Rows = list[dict[str, Any]]

BOOTSTRAP_PAIRS = 5
"""Fewest differences whose bootstrap interval is printed."""

LEVEL = 0.95
RESAMPLES = 10_000

FAMILIES: dict[str, dict[str, str]] = {
    "Task, held-out data": {
        "loss": "loss (nats)",
        "bits_per_byte": "bits per byte",
        "accuracy": "accuracy",
    },
    "Balance over the held-out data": {
        "max_vio": "MaxVio, mean of layers",
        "max_vio_worst": "MaxVio, worst layer",
        "max_vio_floor": "noise floor",
        "dead": "most dead experts at an evaluation from step 50 on",
    },
    "Balance of single batches in training": {
        "batch_max_vio": "MaxVio from step 50 on",
        "early_max_vio": "MaxVio of steps 1 to 50",
        "batch_max_vio_floor": "noise floor",
        "batch_dead": "most dead experts in a batch from step 50 on",
    },
    "Assignments dropped (share)": {
        "batch_drop_at_capacity": "beyond moe.capacity_factor (default 1.25), batches from step 50",
        "drop_at_capacity": "beyond moe.capacity_factor (default 1.25), held out",
        "drop_fraction": "at the buffer in use, held out",
    },
    "Difference between experts, held-out data": {
        "similarity": "similarity of outputs",
        "similarity_worst": "similarity, worst layer",
        "similarity_untrained": "similarity, untrained",
        "swap_cost": "cost of a swap (nats)",
        "swap_cost_untrained": "cost of a swap, untrained",
    },
    "Cost": {
        "seconds": "seconds of training",
        "rate": "tokens or images a second",
    },
}
"""The metrics by table, in the order in which they are shown, with what they are called there."""


class Interval(NamedTuple):
    """A mean and the ends of its interval; NaN where too few values give none."""

    mean: float
    low: float
    high: float


def t_interval(values: Sequence[float]) -> Interval:
    """Student's 95 % interval of the mean.

    Args:
        values: one a seed.

    Raises:
        ValueError: there are no values.
    """
    n = len(values)
    require(n > 0, "a mean needs at least one value")
    mean = float(np.mean(values))
    if n < 2:
        return Interval(mean, math.nan, math.nan)
    spread = float(np.std(values, ddof=1)) / math.sqrt(n)
    half = float(stdtrit(n - 1, 0.5 + LEVEL / 2)) * spread
    return Interval(mean, mean - half, mean + half)


def bootstrap_interval(
    values: Sequence[float], resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Percentile bootstrap 95 % interval of the mean (Efron, Annals of Statistics 7, 1979).

    With few seeds it is too short: its half width is about 1.96 sqrt((n-1)/n) standard errors,
    where Student's is 2.78 for n = 5. The tables lead with the latter.

    Args:
        values: one a seed, for example paired differences.
        resamples: how many samples are drawn, with replacement, of as many values.
        seed: of the draws: the same values give the same interval.

    Raises:
        ValueError: there are no values.
    """
    n = len(values)
    require(n > 0, "a mean needs at least one value")
    mean = float(np.mean(values))
    if n < 2:
        return Interval(mean, math.nan, math.nan)
    picks = np.random.default_rng(seed).integers(n, size=(resamples, n))
    means = np.mean(np.asarray(values, np.float64)[picks], axis=1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(mean, float(low), float(high))


def noise_floor(experts: int, chosen: int, tokens: float) -> float:
    """Expected MaxVio of a fair random assignment: every token to K of E experts, all sets alike.

    Loads over their mean are nearly normal with variance (E - K)/(T K), and sum to E. So they are
    independent normals of variance E (E - K)/((E - 1) T K) less their mean, and the largest lies as
    far above 1 as the largest of E such normals is expected to: that of E standard ones is E times
    the mean density of one at the largest of the others, by parts, which is `curvature(E, 1)`.

    Args:
        experts: E.
        chosen: K.
        tokens: T, independent of each other.
    """
    E, K, T = experts, chosen, tokens
    if E == K:  # every expert takes every token
        return 0.0
    return curvature(E, 1) * math.sqrt(E * (E - K) / ((E - 1) * T * K))


def compare(results: Sequence[Mapping[str, Any]], baseline: str) -> Rows:
    """Means over seeds, and differences to the baseline, of all metrics of all variants.

    Args:
        results: one a run: `variant`, `seed`, and `metrics` by name, None where a run has none.
        baseline: the variant to which the others are compared.

    Returns:
        A row for each variant and metric that a run of it has: `table`, `variant`, `metric`,
        `runs`, `mean`, `low` and `high` (Student's interval); and, but for the baseline's own rows,
        of the differences to the baseline seed by seed `pairs`, `difference`, `difference_low` and
        `difference_high` (bootstrap), `difference_t_low` and `difference_t_high` (Student) and
        `difference_share`, the difference over the baseline's mean in the same seeds.
    """
    values: dict[tuple[str, str], dict[int, float]] = {}
    for result in results:
        for name, value in result["metrics"].items():
            if value is not None:
                by_seed = values.setdefault((result["variant"], name), {})
                by_seed[result["seed"]] = float(value)
    variants = list(dict.fromkeys(result["variant"] for result in results))
    rows = []
    for table, metrics in FAMILIES.items():
        for variant in variants:
            for name in metrics:
                if mine := values.get((variant, name)):
                    row = {"table": table, "variant": variant, "metric": name}
                    # Floors are the same for all.
                    alone = variant == baseline or name.endswith("_floor")
                    others = {} if alone else values.get((baseline, name), {})
                    rows.append(row | _summary(mine, others))
    return rows


def _summary(mine: Mapping[int, float], others: Mapping[int, float]) -> dict[str, Any]:
    mean, low, high = t_interval([mine[seed] for seed in sorted(mine)])
    row: dict[str, Any] = {"runs": len(mine), "mean": mean, "low": low, "high": high}
    seeds = sorted(mine.keys() & others.keys())
    if not seeds:
        return row
    differences = [mine[seed] - others[seed] for seed in seeds]
    drawn, student = bootstrap_interval(differences), t_interval(differences)
    base = float(np.mean([others[seed] for seed in seeds]))
    return row | {
        "pairs": len(seeds),
        "difference": drawn.mean,
        "difference_low": drawn.low,
        "difference_high": drawn.high,
        "difference_t_low": student.low,
        "difference_t_high": student.high,
        "difference_share": drawn.mean / base if base else math.nan,
    }


def shown(rows: Sequence[Mapping[str, Any]], baseline: str, notes: Mapping[str, str]) -> Rows:
    """The rows of `compare` as they are printed: one table a metric.

    Args:
        rows: from `compare`.
        baseline: the variant that differences are to.
        notes: what is to be said of a variant, behind its name.

    Returns:
        `title` and `rows` of each table.
    """
    tables = []
    for table, metrics in FAMILIES.items():
        for name, title in metrics.items():
            chosen = [row for row in rows if (row["table"], row["metric"]) == (table, name)]
            lines = [_line(row, baseline, notes) for row in chosen]
            if lines:
                tables.append({"title": f"{table}: {title}", "rows": lines})
    return tables


def _line(row: Mapping[str, Any], baseline: str, notes: Mapping[str, str]) -> dict[str, str]:
    name = row["variant"]
    line = {
        "variant": f"{name} ({notes[name]})" if name in notes else name,
        "runs": str(row["runs"]),
        "mean [95 % t]": _bracket(row["mean"], row["low"], row["high"]),
    }
    if "difference" not in row:
        return line
    student = row["difference"], row["difference_t_low"], row["difference_t_high"]
    drawn = _ends(row["difference_low"], row["difference_high"], "+")
    return line | {
        f"minus {baseline}, paired [95 % t]": _bracket(*student, "+"),
        # Drawn from few values it is too short.
        "[95 % bootstrap]": drawn if row["pairs"] >= BOOTSTRAP_PAIRS else "",
        "in %": "" if math.isnan(share := row["difference_share"]) else f"{100 * share:+.2f}",
    }


def _bracket(mean: float, low: float, high: float, sign: str = "") -> str:
    return f"{mean:{sign}.4g} {_ends(low, high, sign)}".strip()


def _ends(low: float, high: float, sign: str) -> str:
    if math.isnan(low) and math.isnan(high):
        return ""
    return f"[{low:{sign}.4g}, {high:{sign}.4g}]"
