"""Evaluation: python -m train.evaluate --workdir=DIR [--train_batches=N] [--json=FILE].

Language models: bits per byte, all nats of every held-out document (the first token and the end
included) over its raw UTF-8 bytes. Vision: accuracy. Both: the loss, and the routing of every
expert layer, over all tokens that were read: windows of held-out text overlap by half, so most of a
long document counts twice. Several processes (see `train.cluster`) score each its rows; all get the
sums, the first prints.

With --train_batches on batches of the training data in place of held-out data, drawn with a seed of
their own and cut or augmented as in training: for routing, which may be even on one and not on the
other. Their losses are not comparable: training rows have no context before them, images may be
mixed.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags

from emoe_jax.config import require
from emoe_jax.models.stack import layer_names
from emoe_jax.sharding import replicated
from train import cli, cluster, notice, tables
from train.data.shards import derive_seed
from train.data.text import TextData
from train.run import Run, load_trained
from train.step import layer_metrics

Tree = Any
Scalars = dict[str, float]
Rows = list[dict[str, Any]]

DRAWN = 0xE7A1
"""What tells the seed of training batches that are evaluated from that of training's."""


class Evaluator(NamedTuple):
    """The functions of an evaluation, compiled ahead of time.

    Attributes:
        step: (params, router, batch, key) to sums over the batch, see `step.Steps`.
        metrics: (what the expert layers tell, summed over all batches; the number of batches) to
            routing metrics, see `step.layer_metrics`.
        train_batches: how many batches of `training` it scores; 0 is all held-out data.
    """

    step: Callable[[Tree, Tree, Tree, jax.Array], Tree]
    metrics: Callable[[Tree, np.generic], Tree]
    train_batches: int = 0


def heldout(run: Run) -> Iterator[dict[str, np.ndarray]]:
    """This process's part of the held-out batches."""
    return run.data.heldout_batches(run.eval_batch, rows=run.rows(run.eval_batch))


def training(run: Run, batches: int) -> Iterator[dict[str, np.ndarray]]:
    """This process's part of so many batches of training, drawn with a seed of their own.

    Raises:
        ValueError: the data's shards do not divide the rows of an evaluation batch.
    """
    size, shards = run.eval_batch, run.data.config.shards
    require(
        size % shards == 0,
        f"a batch of the evaluation has {size} rows (batch={run.config.batch} over accumulate="
        f"{run.config.accumulate}), which data.shards={shards} does not divide; evaluate with"
        " --override=accumulate=1",
    )
    seed = derive_seed(run.config.seed, DRAWN)
    stream = run.data.train_iterator(size, seed=seed, rows=run.rows(size))
    try:
        for _ in range(batches):
            yield next(stream)
    finally:
        stream.close()


def _batches(run: Run, train_batches: int) -> Iterator[dict[str, np.ndarray]]:
    return training(run, train_batches) if train_batches else heldout(run)


def compile_evaluate(run: Run, train_batches: int = 0) -> Evaluator:
    """The evaluation, compiled for the shapes of the batches; `train_batches` as in `Evaluator`."""
    with cluster.Compiler() as compiler:
        return begin_evaluate(run, compiler, train_batches)()


def begin_evaluate(
    run: Run, compiler: cluster.Compiler, train_batches: int = 0
) -> Callable[[], Evaluator]:
    """Begins to compile the evaluation; returns what waits for it."""
    batch = run.abstract_batch(next(_batches(run, train_batches)), run.eval_batch)
    inputs = run.abstract["params"], run.abstract["router"], batch, jax.eval_shape(run.key)
    step = jax.jit(run.steps.evaluate, out_shardings=replicated(run.mesh))
    wait_for_step = compiler.begin(step.lower(*inputs))
    sums = jax.eval_shape(run.steps.evaluate, *inputs)
    metrics = jax.jit(layer_metrics)
    wait_for_metrics = compiler.begin(
        metrics.lower(sums["aux"], jax.ShapeDtypeStruct((), np.float32))
    )
    return lambda: Evaluator(wait_for_step(), wait_for_metrics(), train_batches)


def evaluate(run: Run, evaluator: Evaluator, state: Tree) -> tuple[Scalars, Rows]:
    """Scores all held-out data, or the batches of training for which the evaluator was made.

    Args:
        run: the run.
        evaluator: from `compile_evaluate`.
        state: holds `params` and `router`.

    Returns:
        Scalars by slash names: `eval/loss` (nats per target or image), of held-out data
        `eval/bits_per_byte` or `eval/accuracy`, and those of routing; and the routing table, one
        row an expert layer.

    Raises:
        notice.Interrupted: the run is to end, see `train.notice`.
    """
    key = run.key()
    total: Any = None
    batches = 0
    for batch in _batches(run, evaluator.train_batches):
        notice.check()
        placed = run.to_devices(batch, run.eval_batch)
        part = evaluator.step(state["params"], state["router"], placed, key)
        # float64: a float32 sum over many batches would lose digits of the result.
        part = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), jax.device_get(part))
        total = part if total is None else jax.tree.map(np.add, total, part)
        batches += 1
    sums = {name: float(value) for name, value in total["sums"].items()}
    scalars = {"eval/loss": sums["loss"] / sums["count"]}
    if not evaluator.train_batches:
        scalars |= _of_heldout(run, sums)
    aux = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), total["aux"])
    rows = routing_rows(run, jax.device_get(evaluator.metrics(aux, np.float32(batches))))
    for row in rows:
        named = {k: v for k, v in row.items() if k not in ("layer", "load")}
        scalars |= {f"eval/router/{row['layer']}/{k}": float(v) for k, v in named.items()}
    return scalars, rows


def _of_heldout(run: Run, sums: Scalars) -> Scalars:
    """The task's own measure, once it is sure that all was scored."""
    data = run.data
    expected = data.heldout_targets if isinstance(data, TextData) else data.heldout_images
    if sums["count"] != expected:
        raise RuntimeError(f"scored {sums['count']:.0f} held-out targets, there are {expected}")
    if not isinstance(data, TextData):
        return {"eval/accuracy": sums["correct"] / sums["count"]}
    return {"eval/bits_per_byte": sums["loss"] / math.log(2) / data.heldout_bytes}


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


def print_evaluation(
    run: Run, scalars: Scalars, rows: Rows, step: int, train_batches: int = 0
) -> None:
    """Prints the result and the routing table; `train_batches` as in `Evaluator`."""
    loss = f"loss {scalars['eval/loss']:.4f} nats"
    if train_batches:
        where = f"{train_batches} batches of training"
        print(f"step {step}: {loss} on {where}")
    else:
        where = "held-out data"
        print(f"step {step}: held out {_heldout_result(run, scalars, loss)}")
    # Tokens that no statistics can hold are news, and none of them is not.
    hidden = {"load"} | {k for k in ("left_out",) if not any(row.get(k) for row in rows)}
    shown = [{k: v for k, v in row.items() if k not in hidden} for row in rows]
    for row, full in zip(shown, rows, strict=True):
        row["largest load"] = max(full["load"])
        row["smallest load"] = min(full["load"])
    if shown:
        tables.print_table(f"Routing on {where}, router {run.config.model.moe.router}", shown)


def _heldout_result(run: Run, scalars: Scalars, loss: str) -> str:
    if isinstance(run.data, TextData):
        bits = scalars["eval/bits_per_byte"]
        return f"{bits:.4f} bits per byte ({loss}) on {run.data.heldout_bytes:,} bytes"
    accuracy = 100 * scalars["eval/accuracy"]
    return f"{accuracy:.2f} % accuracy ({loss}) on {run.data.heldout_images:,} images"


def main(argv: list[str]) -> None:
    """Evaluates a checkpoint of a run."""
    args = flags.FLAGS
    count = args.train_batches
    require(count >= 0, f"--train_batches={count} is below zero; 0 means the held-out data")
    workdir = pathlib.Path(args.workdir)
    cluster.check_same({"train_batches": count})
    run, state, step = load_trained(workdir, cli.overrides(args.override), args.step)
    scalars, rows = evaluate(run, compile_evaluate(run, count), state)
    if not cluster.is_first():
        return
    print_evaluation(run, scalars, rows, step, count)
    if args.json:
        on = f"{count} batches of training" if count else "held-out data"
        result = {"layer": "all", "step": step, "on": on} | scalars
        tables.write_json(args.json, [result, *rows])


if __name__ == "__main__":
    cli.define_trained_run()
    flags.DEFINE_integer(
        "train_batches", 0, "Evaluate on so many batches of training in place of the held-out data."
    )
    flags.DEFINE_string("json", "", "File to write the table to.")
    cli.run(main)
