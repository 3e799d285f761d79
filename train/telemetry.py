"""What a run tells while it trains: scalars, loads, alarms."""

from __future__ import annotations

import collections
import contextlib
import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from emoe_jax.basis import drift, orthonormality_error
from emoe_jax.metrics import dead_experts, max_violation
from emoe_jax.sharding import replicated
from train import cluster
from train.config import AlarmConfig
from train.evaluate import routing_rows
from train.flops import flops_per_unit, peak_flops
from train.logs import RunLog
from train.run import Run
from train.step import routers_of

Tree = Any
Row = dict[str, Any]

LOGGER = logging.getLogger(__name__)

WINDOW = 100
"""Steps over which running loads are taken, and the usual loss."""

SETTLED = 20
"""Losses from which on there is a usual one."""

LEAST_SPREAD = 1e-3
"""Of losses, as a share of their median: where they hardly differ, rounding is no spike."""


class Meter:
    """Turns the metrics of steps into scalars, histograms and progress.

    Args:
        run: the run.
        step: steps done so far.
        state: the training state after them.
    """

    def __init__(self, run: Run, step: int, state: Tree) -> None:
        self.run = run
        length = run.units_per_step // run.config.batch if run.unit == "tokens" else _tokens(run)
        self.flops = flops_per_unit(run.config.model, run.abstract["params"], length)
        peak = peak_flops(jax.devices()[0].device_kind)
        # The formula counts the gradients of all weights: no utilisation where some have none.
        frozen = bool(run.config.optim.trainable)
        self.peak = None if peak is None or frozen else peak * jax.device_count()
        self.step, self.time = step, time.perf_counter()
        self.window: collections.deque[dict[str, Any]] = collections.deque(maxlen=WINDOW)
        self.alarms = Alarms(run.config.alarm)
        self.spikes = Spikes(run.config.alarm.loss_spike)
        self.losses: list[tuple[int, Any]] = []
        self.reference = _copy(_bases(state))
        self.drift = {
            place: self._compile(drift, basis, basis) for place, basis in self.reference.items()
        }
        # The step leaves it out for bases that are running state.
        self.orthonormality = {
            place: self._compile(orthonormality_error, router["basis"])
            for place, router in routers_of(state["router"]).items()
            if "basis" in router
        }

    def _compile(self, function: Callable[..., Any], *args: Any) -> Any:
        jitted = jax.jit(function, out_shardings=replicated(self.run.mesh))
        return cluster.compile_together(jitted.lower(*args))

    @contextlib.contextmanager
    def left_out(self) -> Iterator[None]:
        """Leaves what happens inside out of the rate."""
        began = time.perf_counter()
        yield
        self.time += time.perf_counter() - began

    def see(self, step: int, metrics: Tree) -> None:
        """Takes the loss of a step, and its loads into the window; does not wait for them."""
        self.losses.append((step, metrics["loss"]))
        self.window.append({place: layer["load"] for place, layer in metrics["router"].items()})

    def saved(self, state: Tree) -> None:
        """A checkpoint was written: drift is counted from here."""
        self.reference = _copy(_bases(state))

    def log(self, step: int, metrics: Tree, state: Tree, log: RunLog) -> None:
        """Writes scalars, arrays and progress of a step.

        Args:
            step: steps done.
            metrics: of the last of them.
            state: the training state after it.
            log: of the run.
        """
        now = time.perf_counter()
        rate = (step - self.step) * self.run.units_per_step / max(now - self.time, 1e-9)
        self.step, self.time = step, now
        mfu = None if self.peak is None else rate * self.flops / self.peak
        metrics = jax.device_get(metrics)
        rows = self._rows(metrics["router"], state)
        scalars = {f"train/{k}": v for k, v in metrics.items() if k != "router"}
        scalars[f"train/{self.run.unit}_per_second"] = rate
        if mfu is not None:
            scalars["train/mfu"] = mfu
        for row in rows:
            scalars |= {f"router/{row['layer']}/{k}": v for k, v in row.items() if _is_scalar(v)}
        scalars |= self.alarms.check(step, rows, settled=len(self.window) == WINDOW)
        scalars |= self.spikes.check(jax.device_get(self.losses))
        self.losses.clear()
        log.write(step, {name: float(value) for name, value in scalars.items()})
        log.histograms(step, {f"router/{r['layer']}/load": np.asarray(r["load"]) for r in rows})
        arrays = {f"{r['layer']}/{k}": v for r in rows for k, v in r.items() if isinstance(v, list)}
        log.arrays(step, {name: np.asarray(values) for name, values in arrays.items()})
        worst = max((row["max_vio"] for row in rows), default=None)
        log.progress(step, loss=float(metrics["loss"]), rate=rate, mfu=mfu, max_vio=worst)

    def _rows(self, metrics: Tree, state: Tree) -> list[Row]:
        """The rows of `evaluate.routing_rows`, with what is known beyond the step."""
        fresh = jax.device_get([loads for loads in self.window if not _on_host(loads)])
        old = [loads for loads in self.window if _on_host(loads)]
        self.window.clear()
        self.window.extend(old + fresh)
        mean = jax.tree.map(lambda *each: np.mean(each, axis=0), *self.window)
        more: Tree = {
            place: {
                "max_vio_window": max_violation(load),
                "dead_window": dead_experts(load),
            }
            for place, load in mean.items()
        }
        now = _bases(state)
        kept = routers_of(state["router"])
        for place, row in more.items():
            if place in self.drift:
                row["drift"] = self.drift[place](self.reference[place], now[place])
            if place in self.orthonormality:
                row["orthonormality_error"] = self.orthonormality[place](now[place])
            if "spectrum" in kept.get(place, {}):
                row["spectrum"] = kept[place]["spectrum"]
        more = jax.device_get(more)
        return routing_rows(self.run, {p: layer | more[p] for p, layer in metrics.items()})


class Alarms:
    """Compares layers with thresholds, and says when one is crossed."""

    def __init__(self, config: AlarmConfig) -> None:
        self.limits = {
            "dead_window": float(config.dead),
            "max_vio_window": config.max_vio,
            "orthonormality_error": config.orthonormality,
            "drop_fraction": config.drops,
            "left_out": config.left_out,
        }
        self.on: set[tuple[str, str]] = set()

    def check(self, step: int, rows: list[Row], *, settled: bool = True) -> dict[str, float]:
        """How many layers are above each threshold, as scalars; logs each crossing once.

        Args:
            step: steps done.
            rows: a row for each layer.
            settled: whether the window is full; what is taken over it is left alone before.
        """
        limits = {k: v for k, v in self.limits.items() if settled or not k.endswith("_window")}
        above = {
            (name, row["layer"]): row[name]
            for name, limit in limits.items()
            for row in rows
            if name in row and not row[name] <= limit  # NaN is above too
        }
        for name, layer in sorted(above.keys() - self.on):
            LOGGER.warning(
                "alarm at step %d: %s of %s is %.4g, above %g",
                *(step, name, layer, above[name, layer], self.limits[name]),
            )
        for name, layer in sorted(self.on - above.keys()):
            LOGGER.warning(
                "alarm over at step %d: %s of %s is no longer above %g",
                *(step, name, layer, self.limits[name]),
            )
        self.on = set(above)
        counts = collections.Counter(name for name, _ in above)
        return {f"alarm/{name}": float(counts[name]) for name in limits if rows}


class Spikes:
    """Tells losses that leap out of those of the last steps.

    A loss is a spike above m + factor · s, with m the median of the finite losses of the last
    `WINDOW` steps and s their spread, 1.4826 times the median distance from m: the deviation where
    they are normal, and hardly moved by the spikes themselves. While losses fall, m lies above
    them and s holds the fall, so that a start is no spike. Steps that are skipped are none either.
    """

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.window: collections.deque[float] = collections.deque(maxlen=WINDOW)
        self.on = False

    def check(self, losses: list[tuple[int, Any]]) -> dict[str, float]:
        """How many of some steps' losses are spikes, as a scalar; logs where a row of them begins.

        Args:
            losses: (step, loss) of the steps since the last time.
        """
        count = 0
        for step, loss in ((step, float(loss)) for step, loss in losses if np.isfinite(loss)):
            limit = self.limit()
            if loss > limit and not self.on:
                LOGGER.warning("alarm at step %d: loss is %.4g, above %.4g", step, loss, limit)
            self.on = loss > limit
            count += self.on
            self.window.append(loss)
        return {"alarm/loss_spike": float(count)}

    def limit(self) -> float:
        """Above which the next loss is a spike; infinity before there are `SETTLED` losses."""
        if len(self.window) < SETTLED:
            return math.inf
        middle = statistics.median(self.window)
        spread = 1.4826 * statistics.median(abs(loss - middle) for loss in self.window)
        return middle + self.factor * max(spread, LEAST_SPREAD * abs(middle))


def _on_host(loads: dict[str, Any]) -> bool:
    return all(isinstance(load, np.ndarray) for load in loads.values())


def _is_scalar(value: Any) -> bool:
    return isinstance(value, float)


def _tokens(run: Run) -> int:
    """Tokens of one image, routed or not."""
    return int(run.abstract["params"]["position"].shape[0])


def _bases(state: Tree) -> dict[str, jax.Array]:
    """The bases [repeats,D,R] of eigenbasis routers, by place, wherever they are kept."""
    both = routers_of(state["params"]), routers_of(state["router"])
    return {p: router["basis"] for part in both for p, router in part.items() if "basis" in router}


def _copy(tree: Tree) -> Tree:
    """Arrays of their own: those of the state are donated to the next step."""
    return jax.tree.map(jnp.copy, tree)
