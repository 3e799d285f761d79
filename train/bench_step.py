"""Benchmark `step`: the whole training step of an experiment, and what stands beside it in a run.

- The step as it trains, with its model FLOP utilisation where the device's peak is known.
- What routing telemetry costs: the same step where no routing metrics are asked for, so that the
  compiler leaves out whatever only they need; and the time that writing a logged step takes.
- The data pipeline alone: batches read and placed on the devices one after the other, once those
  that its threads had ready are gone.
- The memory that the compiled step takes, against parameters, optimizer and kept activations by the
  formulas of `train.planning.memory`.

All of it is timed in turn, one of each a round.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import statistics
import tempfile
import time
from typing import Any

import jax

from emoe_jax import sharding
from train import cluster
from train.config import ExperimentConfig
from train.data.packing import BINS
from train.logs import RunLog
from train.loop import compile_train
from train.planning.memory import predict, weigh
from train.run import Run, build
from train.telemetry import Meter
from train.timing import Row, against, milliseconds

Tree = Any

PARTS = ("step", "bare", "log", "data")

AHEAD = 8
"""Batches of images that are read ahead, at most."""


def step(config: ExperimentConfig, repeats: int) -> list[Row]:
    """Times the training step of an experiment on the devices at hand.

    Args:
        config: the experiment.
        repeats: rounds.

    Returns:
        One row: milliseconds (median, least and most over rounds) of a step (`step_`), of one
        without routing metrics (`bare_`), of writing a logged step (`log_`) and of a batch where
        nothing was ready before (`data_`); `telemetry`, the share of a step that routing metrics
        and logs take at the configuration's `log_every`; `data_factor`, a step over a batch; tokens
        or images `per_second`; `mfu`, of devices whose peak is known; bytes of one device:
        `peak_bytes` of the compiled step, `counted_bytes` by formula, and their ratio
        `memory_ratio`.

    Raises:
        ValueError: the experiment is impossible.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = build(config, pathlib.Path(folder))
        with contextlib.closing(_Trial(run, pathlib.Path(folder), total=repeats + 1)) as trial:
            trial.round()  # not timed
            rounds = [trial.round() for _ in range(repeats)]
    times = {part: [each[part] for each in rounds] for part in PARTS}
    row: Row = {"experiment": config.task, "rounds": repeats}
    return [row | _times(run, times, trial.meter) | _memory(run, trial.compiled["step"])]


class _Trial:
    """The two compiled steps, each with a state of its own, and what a run does beside them."""

    def __init__(self, run: Run, folder: pathlib.Path, total: int) -> None:
        config = run.config
        self.run, self.number = run, 0
        self.batches = run.data.train_iterator(
            config.batch, seed=config.seed, rows=run.rows(config.batch)
        )
        example = next(self.batches)
        self.compiled = {"step": compile_train(run, example), "bare": _bare(run, example)}
        self.states = {name: run.init() for name in self.compiled}
        self.metrics: Tree = None
        self.meter = Meter(run, 0, self.states["step"])
        self.log = RunLog(folder, total_steps=total, unit=run.unit, enabled=cluster.is_first())

    def round(self) -> dict[str, float]:
        """Seconds of each part, each done once."""
        self.number += 1
        batch, seconds = self._read()
        times = {"data": seconds}
        # By turns one of them comes first.
        for name in sorted(self.compiled, reverse=bool(self.number % 2)):
            compiled = self.compiled[name]
            began = time.perf_counter()
            self.states[name], metrics = compiled(self.states[name], batch, self.run.key())
            jax.block_until_ready((self.states[name], metrics))
            times[name] = time.perf_counter() - began
            self.metrics = metrics if name == "step" else self.metrics
        began = time.perf_counter()
        for _ in range(self.run.config.log_every):
            self.meter.see(self.number, self.metrics)
        self.meter.log(self.number, self.metrics, self.states["step"], self.log)
        return times | {"log": time.perf_counter() - began}

    def _read(self) -> tuple[Tree, float]:
        """A batch on the devices, and the seconds of one where the pipeline sets the pace."""
        count = cycle(self.run.config)
        for _ in range(count):  # what was ready
            next(self.batches)
        began = time.perf_counter()
        for _ in range(count):
            batch = self.run.to_devices(next(self.batches), self.run.config.batch)
        jax.block_until_ready(batch)
        return batch, (time.perf_counter() - began) / count

    def close(self) -> None:
        """Ends the data pipeline and the log."""
        self.batches.close()
        self.log.close()


def cycle(config: ExperimentConfig) -> int:
    """Batches after which a pipeline has none left that was ready.

    Rows of texts are packed `BINS` at a time in each shard of the data.
    """
    if config.task != "lm":
        return AHEAD
    return -(-BINS * config.data.shards // config.batch)


def _bare(run: Run, example: Tree) -> Any:
    """The training step without routing metrics, compiled."""

    def bare(state: Tree, batch: Tree, key: jax.Array) -> tuple[Tree, Tree]:
        state, metrics = run.steps.train(state, batch, key)
        return state, {name: value for name, value in metrics.items() if name != "router"}

    return compile_train(dataclasses.replace(run, steps=run.steps._replace(train=bare)), example)


def _times(run: Run, times: dict[str, list[float]], meter: Meter) -> Row:
    row: Row = {"unit": run.unit}
    for part in PARTS:
        row |= milliseconds(part, times[part])
    whole = statistics.median(times["step"])
    metrics = 1 - 1 / against("step", times["step"], times["bare"])["step_ratio"]
    logs = statistics.median(times["log"]) / (run.config.log_every * whole)
    row |= {"telemetry": metrics + logs, "telemetry_in_step": metrics, "telemetry_logs": logs}
    row["data_factor"] = whole / statistics.median(times["data"])
    row["per_second"] = run.units_per_step / whole
    if meter.peak is not None:
        row["mfu"] = row["per_second"] * meter.flops / meter.peak
    return row


def _memory(run: Run, compiled: Any) -> Row:
    """Bytes of one device: by the compiler, and counted; see `step`."""
    stats = compiled.memory_analysis()
    if stats is None:  # a backend that does not tell
        return {}
    peak = stats.argument_size_in_bytes + stats.temp_size_in_bytes
    peak += stats.output_size_in_bytes - stats.alias_size_in_bytes
    mesh = {axis: run.mesh.shape[axis] for axis in sharding.AXES}
    memory = predict(run.config, weigh(run.config), mesh)
    counted = memory.parameters + memory.optimizer + memory.activations
    return {"peak_bytes": peak, "counted_bytes": counted, "memory_ratio": peak / counted}
