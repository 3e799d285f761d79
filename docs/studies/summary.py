"""Tables and bars of docs/routing.md: python docs/studies/summary.py FOLDER/CELL.json...

Prints, for each file that `docs/studies/study.sh` wrote, a table of all variants and what becomes
of each bar that `whitened` is measured by. Differences are to `whitened`, seed by seed.
"""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

Row = dict[str, Any]
Table = dict[tuple[str, str], Row]

OURS = "whitened"
RIVALS = ("switch", "loss_free", "expert_choice")
"""Whose losses and experts ours are compared with; the last is in studies of images alone."""


def read(file: pathlib.Path) -> Table:
    """The summary rows of a study, by variant and metric.

    Raises:
        ValueError: differences are not to `whitened`.
    """
    rows = [row for row in json.loads(file.read_text())["rows"] if row["table"] != "runs"]
    if any(row["baseline"] != OURS for row in rows):
        raise ValueError(f"{file} has differences to another baseline; make it with {OURS}")
    return {(row["variant"], row["metric"]): row for row in rows}


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
        "less that of `whitened` [95 % t]",
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


def bars(table: Table) -> list[str]:
    """What becomes of the bars, a line each."""

    def value(name: str, metric: str) -> float:
        return float(table[name, metric]["mean"])

    def met(good: bool) -> str:
        return "met" if good else "MISSED"

    rivals = [name for name in RIVALS if (name, "loss") in table]
    best = min(rivals, key=lambda name: value(name, "loss"))
    row = table[best, "loss"]
    # The row is of rival less ours.
    ends = [-100 * row[key] / row["mean"] for key in ("difference_t_high", "difference_t_low")]
    vio, worst = value(OURS, "max_vio"), value(OURS, "max_vio_worst")
    batch = table["loss_free", "batch_max_vio"]
    low, high = -batch["difference_t_high"], -batch["difference_t_low"]
    drops = [100 * value(OURS, name) for name in ("batch_drop_at_capacity", "drop_at_capacity")]
    alike = [name for name in rivals if value(name, "similarity") <= value(OURS, "similarity")]
    swap = [name for name in rivals if value(name, "swap_cost") >= value(OURS, "swap_cost")]
    return [
        f"- MaxVio held out {vio:.3f} (0.05), worst layer {worst:.3f} (0.15): "
        f"{met(vio <= 0.05 and worst <= 0.15)}",
        f"- dead experts at an evaluation: {met(value(OURS, 'dead') == 0)}",
        f"- MaxVio of batches less that of loss_free {-batch['difference']:+.3f} "
        f"[{low:+.3f}, {high:+.3f}] (0): {met(batch['difference'] >= 0)}",
        f"- loss less that of {best}, the best rival: [{ends[0]:+.2f}, {ends[1]:+.2f}] % of it "
        f"(1): {met(ends[1] <= 1)}",
        f"- similarity of outputs below each rival's: {met(not alike)} {', '.join(alike)}".rstrip(),
        f"- swap cost above each rival's: {met(not swap)} {', '.join(swap)}".rstrip(),
        f"- beyond capacity 1.25: {drops[0]:.2f} % in batches, {drops[1]:.2f} % held out (0.1): "
        f"{met(max(drops) <= 0.1)}",
    ]


if __name__ == "__main__":
    for path in map(pathlib.Path, sys.argv[1:]):
        study = read(path)
        print(f"### {path.stem}", "", *lines(study), "", *bars(study), "", sep="\n")
