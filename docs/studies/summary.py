"""Tables and bars of docs/routing.md: python -m docs.studies.summary FOLDER/CELL.json...

Prints, for each file that `docs/studies/study.sh` wrote, a table of all variants and what becomes
of each bar that `whitened` is measured by. Differences are to `whitened`, seed by seed, with
Student's 95 % intervals. A bar is met by the mean over seeds unless it names an interval.
"""

from __future__ import annotations

import pathlib
import sys
from typing import Any

from train.comparison import compare
from train.outcome import read_results

Row = dict[str, Any]
Table = dict[tuple[str, str], Row]

OURS, CONTROL = "whitened", "softmax_offset"
RIVALS = ("switch", "loss_free", "expert_choice")
"""Whose losses and experts the bars compare ours with; the last is in studies of images alone."""


def read(path: str) -> Table:
    """The summary of a study's runs, by variant and metric."""
    return {(row["variant"], row["metric"]): row for row in compare(read_results(path), OURS)}


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
        if "difference" in loss:
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


def bars(table: Table) -> list[str]:
    """What becomes of the bars, a line each; the control has a line of its own."""

    def value(name: str, metric: str) -> float:
        return float(table[name, metric]["mean"])

    def met(good: bool) -> str:
        return "met" if good else "MISSED"

    rivals = [name for name in RIVALS if (name, "loss") in table]
    best = min(rivals, key=lambda name: value(name, "loss"))
    share = difference(table, best, "loss", 100 / value(best, "loss"))
    vio, worst = value(OURS, "max_vio"), value(OURS, "max_vio_worst")
    mean, low, high = difference(table, "loss_free", "batch_max_vio")
    drops = [100 * value(OURS, name) for name in ("batch_drop_at_capacity", "drop_at_capacity")]
    alike = [name for name in rivals if value(name, "similarity") <= value(OURS, "similarity")]
    swap = [name for name in rivals if value(name, "swap_cost") >= value(OURS, "swap_cost")]
    control = [f"{in_percent(table, CONTROL)}"] if (CONTROL, "loss") in table else []
    return [
        f"- MaxVio held out {vio:.3f} (0.05), worst layer {worst:.3f} (0.15): "
        f"{met(vio <= 0.05 and worst <= 0.15)}",
        f"- dead experts at an evaluation: {met(value(OURS, 'dead') == 0)}",
        f"- MaxVio of batches less that of loss_free {mean:+.3f} [{low:+.3f}, {high:+.3f}] (0): "
        f"{met(mean <= 0)}",
        f"- loss less that of {best}, the best rival: {in_percent(table, best)} (upper end 1): "
        f"{met(share[2] <= 1)}",
        *(f"- loss less that of {CONTROL}, the control: {line}" for line in control),
        f"- similarity of outputs below each rival's: {met(not alike)} {', '.join(alike)}".rstrip(),
        f"- swap cost above each rival's: {met(not swap)} {', '.join(swap)}".rstrip(),
        f"- beyond capacity 1.25: {drops[0]:.2f} % in batches, {drops[1]:.2f} % held out (0.1): "
        f"{met(max(drops) <= 0.1)}",
    ]


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    for path in sys.argv[1:]:
        study = read(path)
        print(f"### {pathlib.Path(path).stem}", "", *lines(study), "", *bars(study), "", sep="\n")
