"""Tables of docs/routing.md and docs/studies: python -m docs.studies.summary FOLDER/CELL.json...

Prints what becomes of each bar that `whitened` is measured by in files that `docs/studies/study.sh`
wrote, and for each file a table of all variants. Differences are to `whitened`, seed by seed, with
Student's 95 % intervals. A bar is met by the mean over seeds unless it names an interval.

With --between=METRIC,A,B it prints METRIC of variant A less that of variant B instead, one line a
file; both are named as in the tables, metrics as in `train.comparison.FAMILIES`. --seeds=0,1,2
leaves all other seeds out.
"""

from __future__ import annotations

import argparse
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from scipy.special import stdtr, stdtrit

from emoe_jax.config import require
from train.comparison import LEVEL, compare
from train.outcome import read_results

Row = dict[str, Any]
Table = dict[tuple[str, str], Row]

OURS, CONTROL = "whitened", "softmax_offset"
RIVALS = ("switch", "loss_free", "loss_free_softmax", "expert_choice")
"""Whose losses and experts the bars compare ours with; the last is in studies of images alone."""


def read(path: str, baseline: str = OURS, seeds: Sequence[int] = ()) -> Table:
    """The summary of a study's runs, by variant and metric; of some seeds, or of all."""
    results = [run for run in read_results(path) if not seeds or run["seed"] in seeds]
    return {(row["variant"], row["metric"]): row for row in compare(results, baseline)}


def lines(table: Table) -> list[str]:
    """The table of a cell in Markdown, a line a variant."""
    names = list(dict.fromkeys(variant for variant, _ in table))

    def mean(name: str, metric: str, digits: int = 3, scale: float = 1.0) -> str:
        row = table.get((name, metric))
        return "" if row is None else f"{row['mean'] * scale:.{digits}f}"

    head = (
        "router",
        "seeds",
        "held-out loss",
        "less that of `whitened`",
        "MaxVio (worst layer)",
        "of batches",
        "dead, held out (in a batch)",
        "beyond capacity 1.25, %: batches, held out",
        "similarity",
        "swap cost, nats",
    )
    out = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    for name in names:
        loss = table[name, "loss"]
        difference = ""
        if math.isfinite(loss.get("difference_t_low", math.nan)):  # no interval of one pair
            ends = f"{loss['difference_t_low']:+.4f}, {loss['difference_t_high']:+.4f}"
            difference = f"{loss['difference']:+.4f} [{ends}]"
        drops = (mean(name, f"{kind}drop_at_capacity", 2, 100) for kind in ("batch_", ""))
        cells = (
            f"`{name}`",
            str(loss["runs"]),
            f"{loss['mean']:.4f}",
            difference,
            f"{mean(name, 'max_vio')} ({mean(name, 'max_vio_worst')})",
            mean(name, "batch_max_vio"),
            f"{mean(name, 'dead', 1)} ({mean(name, 'batch_dead', 1)})",
            ", ".join(drops),
            mean(name, "similarity"),
            mean(name, "swap_cost"),
        )
        out.append("| " + " | ".join(cells) + " |")
    floors = f"{mean(OURS, 'max_vio_floor')} and {mean(OURS, 'batch_max_vio_floor')}"
    before = f"{mean(OURS, 'similarity_untrained')} and {mean(OURS, 'swap_cost_untrained')}"
    return [*out, "", f"Floors of MaxVio: {floors}. Untrained, similarity and swap cost: {before}."]


def difference(table: Table, name: str, metric: str, scale: float = 1.0) -> list[float]:
    """Ours less that of another: mean, and the ends of the interval."""
    row = table[name, metric]
    ends = row["difference"], row["difference_t_high"], row["difference_t_low"]
    return [-scale * end for end in ends]


def in_percent(table: Table, name: str) -> str:
    """Our loss less that of another, in percent of the latter."""
    mean, low, high = difference(table, name, "loss", 100 / table[name, "loss"]["mean"])
    return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}] %"


def p_value(row: Row) -> float:
    """Returns p of Student's paired test that a difference is zero; NaN of a single pair."""
    freedom = row["pairs"] - 1
    half = (row["difference_t_high"] - row["difference_t_low"]) / 2
    if not half > 0:
        return math.nan
    t = abs(row["difference"]) / half * float(stdtrit(freedom, 0.5 + LEVEL / 2))
    return float(2 * stdtr(freedom, -t))


def holm(values: Sequence[float]) -> list[float]:
    """P values of several tests, corrected for how many they are (Holm 1979); NaN is no test."""
    tests = [number for number, value in enumerate(values) if not math.isnan(value)]
    corrected, least = list(values), 0.0
    for rank, number in enumerate(sorted(tests, key=values.__getitem__)):
        least = max(least, min(1.0, (len(tests) - rank) * values[number]))
        corrected[number] = least
    return corrected


def rivals_of(table: Table) -> list[str]:
    """The rivals that have all seeds that ours has: means over other seeds are not compared."""
    whole = table[OURS, "loss"]["runs"]
    return [name for name in RIVALS if table.get((name, "loss"), {}).get("pairs") == whole]


class Bar(NamedTuple):
    """A bar, what was measured, and whether it is met; the control has none."""

    what: str
    measured: str
    met: bool | None = None


def bars(table: Table) -> list[Bar]:
    """What becomes of the bars."""

    def value(name: str, metric: str) -> float:
        return float(table[name, metric]["mean"])

    def names(which: list[str]) -> str:
        return ", ".join(f"not of {name}" for name in which) or "all"

    rivals = rivals_of(table)
    best = min(rivals, key=lambda name: value(name, "loss"))
    share = difference(table, best, "loss", 100 / value(best, "loss"))
    vio, worst = value(OURS, "max_vio"), value(OURS, "max_vio_worst")
    mean, low, high = difference(table, "loss_free", "batch_max_vio")
    drops = [100 * value(OURS, name) for name in ("batch_drop_at_capacity", "drop_at_capacity")]
    alike = [name for name in rivals if value(name, "similarity") <= value(OURS, "similarity")]
    swap = [name for name in rivals if value(name, "swap_cost") >= value(OURS, "swap_cost")]
    dead = value(OURS, "dead")
    found = [
        Bar(
            "MaxVio held out, worst layer (0.05, 0.15)",
            f"{vio:.3f}, {worst:.3f}",
            vio <= 0.05 and worst <= 0.15,
        ),
        Bar("dead experts at an evaluation (0)", f"{dead:.1f}", dead == 0),
        Bar(
            "MaxVio of batches less that of loss_free (0)",
            f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]",
            mean <= 0,
        ),
        Bar(
            "loss less the best rival's (upper end 1 %)",
            f"{in_percent(table, best)}, {best}",
            share[2] <= 1,
        ),
        Bar("similarity below each rival's", names(alike), not alike),
        Bar("swap cost above each rival's", names(swap), not swap),
        Bar(
            "beyond capacity 1.25 in batches, held out (0.1 %)",
            f"{drops[0]:.2f}, {drops[1]:.2f} %",
            max(drops) <= 0.1,
        ),
    ]
    if (CONTROL, "loss") in table:
        found.insert(0, Bar(f"loss less that of {CONTROL}", in_percent(table, CONTROL)))
    return found


def verdict(bar: Bar) -> str:
    """A line of a list."""
    ends = {None: "", True: ": met", False: ": MISSED"}
    return f"- {bar.what}: {bar.measured}{ends[bar.met]}"


def overview(cells: Mapping[str, Table]) -> list[str]:
    """The bars of all cells in one table in Markdown, a column a cell; what is missed is bold."""
    found = {cell: {bar.what: bar for bar in bars(table)} for cell, table in cells.items()}
    whats = list(dict.fromkeys(what for each in found.values() for what in each))

    def shown(bar: Bar | None) -> str:
        if bar is None:
            return ""
        return f"**{bar.measured}**" if bar.met is False else bar.measured

    seeds = [str(table[OURS, "loss"]["runs"]) for table in cells.values()]
    rows = [["bar", *cells], ["---"] * (1 + len(cells)), ["seeds", *seeds]]
    rows += [[what, *(shown(found[cell].get(what)) for cell in cells)] for what in whats]
    pairs = [table.get((CONTROL, "loss")) for table in cells.values()]
    values = [p_value(row) if row else math.nan for row in pairs]
    both = zip(values, holm(values), strict=True)
    shares = ["" if math.isnan(p) else f"{p:.3f} ({q:.3f})" for p, q in both]
    rows.append([f"p of the difference to {CONTROL}'s loss (Holm, over cells)", *shares])
    return ["| " + " | ".join(row) + " |" for row in rows]


def between(cells: Mapping[str, Table], metric: str, name: str, other: str) -> list[str]:
    """What a metric of one variant is less that of another, a line a cell."""
    out = []
    for cell, table in cells.items():
        for variant in (name, other):
            has = ", ".join(key[0] for key in table if key[1] == metric) or "no variant"
            known = (variant, metric) in table
            require(known, f"{cell} has no {metric} of {variant}; it has that of {has}")
        row = table[name, metric]
        paired = "difference_t_low" in row
        require(paired, f"{cell}: {name} and {other} are one variant, or share no seed")
        ends = f"{row['difference_t_low']:+.4f}, {row['difference_t_high']:+.4f}"
        what = f"{row['difference']:+.4f} [{ends}], {row['pairs']} seeds"
        out.append(f"{cell}: {metric} of {name} less that of {other}: {what}")
    return out


def main() -> None:
    """Prints the overview and each cell, or a difference."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", help="results of cells")
    parser.add_argument("--between", default="", metavar="METRIC,A,B")
    parser.add_argument("--seeds", default="", metavar="N,N...")
    args = parser.parse_args()
    if not re.fullmatch(r"(\d+(,\d+)*)?", args.seeds):
        parser.error(f"--seeds={args.seeds} is no list of numbers such as 0,1,2")
    seeds = [int(seed) for seed in args.seeds.split(",") if seed]
    if args.between and args.between.count(",") != 2:
        parser.error(f"--between={args.between} is not METRIC,A,B, such as loss,whitened,switch")
    baseline = args.between.split(",")[2] if args.between else OURS
    cells = {pathlib.Path(path).stem: read(path, baseline, seeds) for path in args.files}
    if args.between:
        try:
            print(*between(cells, *args.between.split(",")), sep="\n")
        except ValueError as error:
            parser.error(str(error))
        return
    for cell, table in cells.items():
        if (OURS, "loss") not in table:
            parser.error(f"{cell} has no run of {OURS} with these seeds")
    print(*overview(cells), sep="\n")
    for cell, table in cells.items():
        print("", f"### {cell}", "", *lines(table), "", *map(verdict, bars(table)), sep="\n")


if __name__ == "__main__":
    main()
