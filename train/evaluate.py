"""Evaluation on held-out data: python -m train.evaluate --workdir=DIR [--json=FILE].

Language models: bits per byte, all nats of every held-out document (the first token and the end
included) over its raw UTF-8 bytes. Vision: accuracy. Both: the routing of every expert layer.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from absl import flags

from emoe_jax.models.stack import layer_names
from train import cli, tables
from train.data.text import TextData
from train.run import Run, load_trained
from train.step import layer_metrics

Tree = Any
Evaluate = Callable[[Tree, Tree, Tree, jax.Array], Tree]
Scalars = dict[str, float]
Rows = list[dict[str, Any]]


def heldout(run: Run) -> Iterator[dict[str, np.ndarray]]:
    """This process's part of the held-out batches."""
    return run.data.heldout_batches(
        run.eval_batch, process_index=jax.process_index(), process_count=jax.process_count()
    )


def compile_evaluate(run: Run) -> Evaluate:
    """The evaluation step, compiled ahead of time for the shapes of the held-out batches."""
    batch = run.abstract_batch(next(heldout(run)))
    state = run.abstract
    key = jax.eval_shape(run.key)
    step = jax.jit(run.steps.evaluate)
    return step.lower(state["params"], state["router"], batch, key).compile()


def evaluate(run: Run, step: Evaluate, state: Tree) -> tuple[Scalars, Rows]:
    """Scores all held-out data.

    Args:
        run: the run.
        step: from `compile_evaluate`.
        state: holds `params` and `router`.

    Returns:
        Scalars by slash names: `eval/loss` (nats per target or image), `eval/bits_per_byte` or
        `eval/accuracy`, and those of routing; and the routing table, one row an expert layer.
    """
    total: Any = None
    batches = 0
    for batch in heldout(run):
        part = step(state["params"], state["router"], run.to_devices(batch), run.key())
        part = jax.device_get(part)
        total = part if total is None else jax.tree.map(np.add, total, part)
        batches += 1
    sums = {name: float(value) for name, value in total["sums"].items()}
    scalars = {"eval/loss": sums["loss"] / sums["count"]}
    if isinstance(run.data, TextData):
        scalars["eval/bits_per_byte"] = sums["loss"] / math.log(2) / run.data.heldout_bytes
    else:
        scalars["eval/accuracy"] = sums["correct"] / sums["count"]
    rows = routing_rows(run, jax.device_get(layer_metrics(total["aux"], batches)))
    for row in rows:
        named = {k: v for k, v in row.items() if k not in ("layer", "load")}
        scalars |= {f"eval/router/{row['layer']}/{k}": float(v) for k, v in named.items()}
    return scalars, rows


def routing_rows(run: Run, metrics: dict[str, dict[str, Any]]) -> Rows:
    """One row an expert layer: its name, its scalars, and `load`, the list of shares."""
    rows = []
    for place, names in layer_names(run.config.model).items():
        for repeat, name in enumerate(names):
            row: dict[str, Any] = {"layer": name}
            for key, value in metrics[place].items():
                array = np.asarray(value)[repeat]
                row[key] = array.tolist() if array.ndim else float(array)
            rows.append(row)
    return sorted(rows, key=lambda row: str(row["layer"]))


def print_evaluation(run: Run, scalars: Scalars, rows: Rows, step: int) -> None:
    """Prints the result and the routing table."""
    if isinstance(run.data, TextData):
        result = f"{scalars['eval/bits_per_byte']:.4f} bits per byte"
        on = f"{run.data.heldout_bytes:,} bytes"
    else:
        result = f"{100 * scalars['eval/accuracy']:.2f} % accuracy"
        on = f"{run.data.heldout_images:,} images"
    print(f"step {step}: held out {result} (loss {scalars['eval/loss']:.4f} nats) on {on}")
    shown = [{k: v for k, v in row.items() if k != "load"} for row in rows]
    for row, full in zip(shown, rows, strict=True):
        row["largest load"] = max(full["load"])
        row["smallest load"] = min(full["load"])
    if shown:
        tables.print_table(f"Routing on held-out data, router {run.config.model.moe.router}", shown)


def main(argv: list[str]) -> None:
    """Evaluates the newest checkpoint of a run."""
    workdir = pathlib.Path(flags.FLAGS.workdir)
    run, state, step = load_trained(workdir, {})
    scalars, rows = evaluate(run, compile_evaluate(run), state)
    print_evaluation(run, scalars, rows, step)
    if flags.FLAGS.json:
        result = {"layer": "all", "step": step} | scalars
        tables.write_json(flags.FLAGS.json, [result, *rows])


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
    flags.DEFINE_string("json", "", "File to write the table to.")
    cli.run(main)
