"""Benchmark `checkpoints`: what asynchronous checkpoints cost a run.

A run is trained on in halves of rounds, each of as many steps as lie between two checkpoints: one
half saves in its middle, as `train.loop` does, the other does not. A half begins with nothing in
the background; a save that is not complete at its end is waited for, and counts. The halves change
places from round to round, and the overhead is the median of the rounds' ratios. That of the time
which the process's threads have spent on processors stands beside it: what other programs do at the
same time hardly changes it, and where they leave no core idle it is what checkpoints cost.
"""

from __future__ import annotations

import pathlib
import statistics
import tempfile
import time
from typing import Any

import jax

from emoe_jax.checkpoint import Checkpoints
from train.config import ExperimentConfig
from train.loop import compile_train
from train.provenance import identity
from train.run import CHECKPOINTS, Run, build
from train.timing import Row, milliseconds

Tree = Any


def checkpoints(config: ExperimentConfig, every: int, repeats: int) -> list[Row]:
    """Times training with and without checkpoints.

    Args:
        config: the experiment.
        every: steps between checkpoints.
        repeats: rounds.

    Returns:
        One row: milliseconds of a step without (`plain_`) and with checkpoints (`saving_`), each
        median, least and most over rounds; `overhead` and its least and most, the ratio of both of
        a round minus 1; `processor_overhead`, the same of processor time; `call_ms`, the median
        time for which `Checkpoints.save` stops the steps; `bytes`, of the arrays.

    Raises:
        ValueError: the experiment is impossible.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = build(config, pathlib.Path(folder))
        trial = _Trial(run, pathlib.Path(folder) / CHECKPOINTS, every)
        with trial.checkpoints:
            trial.half(saving=True)  # compiles the digests
            trial.calls.clear()
            rounds = [_round(trial, saving_first=bool(number % 2)) for number in range(repeats)]
        trial.batches.close()
    return [_row(trial, rounds)]


class _Trial:
    """A run that can be taken some steps further, with checkpoints or without."""

    def __init__(self, run: Run, folder: pathlib.Path, every: int) -> None:
        # A half begins and ends in the middle between two checkpoints.
        self.run, self.every, self.step = run, every, every // 2
        self.checkpoints = Checkpoints(folder, every=every, keep_last=2, keep_best=0)
        config = run.config
        self.batches = run.data.train_iterator(
            config.batch, seed=config.seed, rows=run.rows(config.batch)
        )
        self.compiled = compile_train(run, next(self.batches))
        self.state = run.init()
        self.bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(self.state))
        self.calls: list[float] = []

    def half(self, *, saving: bool) -> tuple[float, float]:
        """Seconds, and processor seconds, a step of the next `every` steps."""
        run, key, meta = self.run, self.run.key(), identity(self.run.config)
        jax.block_until_ready(self.state)
        began, spent = time.perf_counter(), time.process_time()
        for _ in range(self.every):
            batch = run.to_devices(next(self.batches), run.config.batch)
            self.state, _ = self.compiled(self.state, batch, key)
            self.step += 1
            position = self.batches.get_state()
            if saving:
                self._save(position, meta)
        jax.block_until_ready(self.state)
        self.checkpoints.wait()
        taken = time.perf_counter() - began, time.process_time() - spent
        return taken[0] / self.every, taken[1] / self.every

    def _save(self, position: Tree, meta: Tree) -> None:
        """As the loop does; the step in progress is waited for before the call is timed."""
        if self.step % self.every == 0:
            jax.block_until_ready(self.state)
        began = time.perf_counter()
        if self.checkpoints.save(self.step, self.state, data_state=position, meta=meta):
            self.calls.append(time.perf_counter() - began)


def _round(trial: _Trial, *, saving_first: bool) -> tuple[tuple[float, float], ...]:
    """What both halves took: plain, saving."""
    times = {saving: trial.half(saving=saving) for saving in (saving_first, not saving_first)}
    return times[False], times[True]


def _row(trial: _Trial, rounds: list[tuple[tuple[float, float], ...]]) -> Row:
    plain, saving = ([half[0] for half in halves] for halves in zip(*rounds, strict=True))
    ratios, processor = ([after[i] / before[i] - 1 for before, after in rounds] for i in range(2))
    row: Row = {"every": trial.every, "bytes": trial.bytes, "rounds": len(rounds)}
    row |= milliseconds("plain", plain) | milliseconds("saving", saving)
    return row | {
        "overhead": statistics.median(ratios),
        "overhead_min": min(ratios),
        "overhead_max": max(ratios),
        "processor_overhead": statistics.median(processor),
        "processor_overhead_min": min(processor),
        "processor_overhead_max": max(processor),
        "call_ms": 1e3 * statistics.median(trial.calls),
    }
