"""Evaluation on held-out data: python -m train.evaluate --workdir=DIR [--json=FILE].

Language models: bits per byte, all nats of every held-out document (the first token and the end
included) over its raw UTF-8 bytes. Vision: accuracy. Both: the routing of every expert layer, over
all tokens that were read: windows of text overlap by half, so most of a long document counts twice.
Several processes (see `train.cluster`) score each its rows; all get the sums, the first prints.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags

from emoe_jax.models.stack import layer_names
from emoe_jax.sharding import replicated
from train import cli, cluster, notice, tables
from train.data.text import TextData
from train.run import Run, load_trained
from train.step import layer_metrics

Tree = Any
Scalars = dict[str, float]
Rows = list[dict[str, Any]]


class Evaluator(NamedTuple):
    """The functions of an evaluation, compiled ahead of time.

    Attributes:
        step: (params, router, batch, key) to sums over the batch, see `step.Steps`.
        metrics: (what the expert layers tell, summed over all batches; the number of batches) to
            routing metrics, see `step.layer_metrics`.
    """

    step: Callable[[Tree, Tree, Tree, jax.Array], Tree]
    metrics: Callable[[Tree, np.generic], Tree]


def heldout(run: Run) -> Iterator[dict[str, np.ndarray]]:
    """This process's part of the held-out batches."""
    return run.data.heldout_batches(run.eval_batch, rows=run.rows(run.eval_batch))


def compile_evaluate(run: Run) -> Evaluator:
    """The evaluation, compiled for the shapes of the held-out batches."""
    batch = run.abstract_batch(next(heldout(run)), run.eval_batch)
    inputs = run.abstract["params"], run.abstract["router"], batch, jax.eval_shape(run.key)
    step = jax.jit(run.steps.evaluate, out_shardings=replicated(run.mesh)).lower(*inputs)
    sums = jax.eval_shape(run.steps.evaluate, *inputs)
    metrics = jax.jit(layer_metrics).lower(sums["aux"], jax.ShapeDtypeStruct((), np.float32))
    return Evaluator(cluster.compile_together(step), metrics.compile())


def evaluate(run: Run, evaluator: Evaluator, state: Tree) -> tuple[Scalars, Rows]:
    """Scores all held-out data.

    Args:
        run: the run.
        evaluator: from `compile_evaluate`.
        state: holds `params` and `router`.

    Returns:
        Scalars by slash names: `eval/loss` (nats per target or image), `eval/bits_per_byte` or
        `eval/accuracy`, and those of routing; and the routing table, one row an expert layer.

    Raises:
        notice.Interrupted: the run is to end, see `train.notice`.
    """
    key = run.key()
    total: Any = None
    batches = 0
    for batch in heldout(run):
        notice.check()
        placed = run.to_devices(batch, run.eval_batch)
        part = evaluator.step(state["params"], state["router"], placed, key)
        # float64: a float32 sum over many batches would lose digits of the result.
        part = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), jax.device_get(part))
        total = part if total is None else jax.tree.map(np.add, total, part)
        batches += 1
    sums = {name: float(value) for name, value in total["sums"].items()}
    data = run.data
    expected = data.heldout_targets if isinstance(data, TextData) else data.heldout_images
    if sums["count"] != expected:
        raise RuntimeError(f"scored {sums['count']:.0f} held-out targets, there are {expected}")
    scalars = {"eval/loss": sums["loss"] / sums["count"]}
    if isinstance(run.data, TextData):
        scalars["eval/bits_per_byte"] = sums["loss"] / math.log(2) / run.data.heldout_bytes
    else:
        scalars["eval/accuracy"] = sums["correct"] / sums["count"]
    aux = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), total["aux"])
    rows = routing_rows(run, jax.device_get(evaluator.metrics(aux, np.float32(batches))))
    for row in rows:
        named = {k: v for k, v in row.items() if k not in ("layer", "load")}
        scalars |= {f"eval/router/{row['layer']}/{k}": float(v) for k, v in named.items()}
    return scalars, rows


def routing_rows(run: Run, metrics: dict[str, dict[str, Any]]) -> Rows:
    """One row a measured expert layer: its name, its scalars, and `load`, the list of shares."""
    rows = []
    names_of = layer_names(run.config.model)
    for place in metrics:
        for repeat, name in enumerate(names_of[place]):
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
    """Evaluates a checkpoint of a run."""
    args = flags.FLAGS
    workdir = pathlib.Path(args.workdir)
    run, state, step = load_trained(workdir, cli.overrides(args.override), args.step)
    scalars, rows = evaluate(run, compile_evaluate(run), state)
    if not cluster.is_first():
        return
    print_evaluation(run, scalars, rows, step)
    if args.json:
        result = {"layer": "all", "step": step} | scalars
        tables.write_json(args.json, [result, *rows])


if __name__ == "__main__":
    cli.define_trained_run()
    flags.DEFINE_string("json", "", "File to write the table to.")
    cli.run(main)
