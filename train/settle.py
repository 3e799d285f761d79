"""Passes forward before and after training, which move the routers' running state alone."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from emoe_jax.routers import router_class
from train import cluster, notice
from train.data.shards import derive_seed
from train.run import Run

Tree = Any

LOGGER = logging.getLogger(__name__)

CALIBRATION, SETTLING = 0xCA11, 0x5E77
"""What tells the seeds of the batches before and after training from that of training's."""


def begin_forward(
    run: Run, example: dict[str, np.ndarray], compiler: cluster.Compiler, *, resumed: bool
) -> Callable[[], Any]:
    """Begins to compile the pass that moves the routers' running state alone.

    Args:
        run: the run.
        example: a batch of training, for its shapes.
        compiler: compiles it.
        resumed: whether the run goes on from a checkpoint, and so is calibrated already.

    Returns:
        What waits for it, and returns what `calibrate` and `settle` take: None where there is
        nothing to do for them.
    """
    config = run.config
    wanted = config.settling > 0 or (config.calibrate > 0 and not resumed)
    if not (wanted and router_class(config.model.moe.router).CALIBRATES):
        return lambda: None
    if not run.abstract["router"]:
        return lambda: None
    places = jax.tree.map(lambda leaf: leaf.sharding, run.abstract["router"])
    step = jax.jit(run.steps.calibrate, out_shardings=places, donate_argnums=1)
    batch, key = run.abstract_batch(example, config.batch), jax.eval_shape(run.key)
    given = run.abstract["params"], run.abstract["router"], batch, key, np.float32(0)
    return compiler.begin(step.lower(*given))


def calibrate(run: Run, forward: Any, state: Tree) -> Tree:
    """The state whose routers have seen a few batches, where that is of use to them.

    The batches are drawn with a seed of their own: no step routes by statistics of its own batch.
    """
    return _pass_forward(run, forward, state, CALIBRATION, np.zeros(run.config.calibrate))


def settle(run: Run, forward: Any, state: Tree) -> Tree:
    """The state whose routers have come to rest: weights no longer move, so noise averages out.

    A run that is asked to end stops early: what there is then is the mean over fewer batches.
    """
    return _pass_forward(run, forward, state, SETTLING, 2.0 + np.arange(run.config.settling))


def _pass_forward(run: Run, forward: Any, state: Tree, purpose: int, progress: np.ndarray) -> Tree:
    """Passes batches of a seed of their own forward, one for each `progress` of an update [N]."""
    if forward is None:
        return state
    config = run.config
    seed = derive_seed(config.seed, purpose)
    batches = run.data.train_iterator(config.batch, seed=seed, rows=run.rows(config.batch))
    for number, share in enumerate(progress):
        if notice.requested():
            LOGGER.warning("asked to end: %d of %d settling batches", number, len(progress))
            break
        batch = run.to_devices(next(batches), config.batch)
        given = state["params"], state["router"], batch, jax.random.fold_in(run.key(), number)
        state = state | {"router": forward(*given, np.float32(share))}
    batches.close()
    return state
