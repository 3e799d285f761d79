"""Rates of the hardware at hand, fitted to measured steps; and how well the model orders meshes.

A step's time is taken to be a sum of products, memory traffic, bytes moved and collectives, each
with a rate that is not negative: that sum is fitted to measured times, relative errors weighing
alike. One number per term is all that is fitted, on other configurations than are judged by it.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from scipy.optimize import nnls
from scipy.stats import spearmanr

from emoe_jax import sharding
from emoe_jax.config import LMConfig, require
from train.config import ExperimentConfig
from train.planning.cost import Cost, Rates, predict
from train.planning.memory import weigh
from train.planning.program import abstract_batch, trace_step
from train.planning.search import meshes
from train.planning.topology import Topology, mesh_on
from train.run import make_program

Row = dict[str, Any]

MESHES = 8
"""Most meshes that are ranked."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """A configuration, what the model counts of it, and how long its step took."""

    config: ExperimentConfig
    cost: Cost
    seconds: float


def features(cost: Cost) -> np.ndarray:
    """Seconds of a step at the chip's peaks by term, and its collectives: [4]."""
    chip = cost.topology.chip
    moving = sum(flow.seconds for flow in cost.flows)
    count = sum(flow.count for flow in cost.flows)
    return np.array([cost.products / chip.flops, cost.traffic / chip.hbm, moving, count])


def fit(measured: Sequence[Measured]) -> Rates:
    """Rates by non-negative least squares on relative errors.

    A term that does not show in the measurements gets a rate that makes it nothing.

    Raises:
        ValueError: fewer measurements than terms.
    """
    require(
        len(measured) >= 4,
        f"{len(measured)} measured step(s) cannot fit 4 rates; measure at least 4 configurations",
    )
    terms = np.stack([features(each.cost) for each in measured])
    seconds = np.array([each.seconds for each in measured])
    weights, _ = nnls(terms / seconds[:, None], np.ones(len(seconds)))
    products, memory, links, latency = (float(weight) for weight in weights)
    least = 1e-9
    return Rates(
        products=1 / max(products, least),
        memory=1 / max(memory, least),
        links=1 / max(links, least),
        latency=latency,
    )


def projected(cost: Cost, rates: Rates) -> float:
    """Seconds of a step by the fitted sum."""
    weights = np.array([1 / rates.products, 1 / rates.memory, 1 / rates.links, rates.latency])
    return float(features(cost) @ weights) + rates.fixed


def measure(configs: Sequence[ExperimentConfig], topology: Topology, rounds: int) -> list[Measured]:
    """Runs the training step of each configuration on the devices at hand, in turn.

    Tokens are drawn at random: no data are read. Every round runs each program once, and the
    median counts, so that a load that comes and goes falls on all.
    """
    steps = [_Step(config, topology) for config in configs]
    times: list[list[float]] = [[] for _ in steps]
    for _ in range(rounds + 1):
        for step, taken in zip(steps, times, strict=True):
            taken.append(step.run())
    return [
        Measured(
            step.config,
            predict(step.config, weigh(step.config), topology),
            statistics.median(taken[1:]),
        )
        for step, taken in zip(steps, times, strict=True)
    ]


class _Step:
    """A compiled training step with its state and a batch."""

    def __init__(self, config: ExperimentConfig, topology: Topology) -> None:
        assert isinstance(config.model, LMConfig)
        self.config = config
        mesh = mesh_on(topology, config.mesh)
        program = make_program(config, mesh)
        self.compiled = trace_step(config, program, mesh).lower().compile()
        self.state, self.key = _draw_state(program.abstract), jax.random.key(config.seed)
        self.batch = _draw(config, abstract_batch(config, mesh))

    def run(self) -> float:
        """Seconds of one step."""
        began = time.perf_counter()
        self.state, metrics = self.compiled(self.state, self.batch, self.key)
        jax.block_until_ready((self.state, metrics))
        return time.perf_counter() - began


def _draw_state(abstract: Any) -> Any:
    """A state of small random numbers, without compiling the program that would draw it."""
    draw = np.random.default_rng(0)

    def fill(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        zero = getattr(path[0], "key", None) != "params"
        array = np.zeros(leaf.shape) if zero else draw.normal(0.0, 0.02, leaf.shape)
        return jax.device_put(array.astype(leaf.dtype), leaf.sharding)

    return jax.tree_util.tree_map_with_path(fill, abstract)


def _draw(config: ExperimentConfig, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> Any:
    """A batch of random tokens, each row one document."""
    draw = np.random.default_rng(0)
    assert isinstance(config.model, LMConfig)
    batch: dict[str, np.ndarray] = {}
    for name, leaf in shapes.items():
        if name in ("tokens", "targets"):
            batch[name] = draw.integers(0, config.model.vocab_size, leaf.shape).astype(np.int32)
        elif name == "rows":
            batch[name] = np.arange(leaf.shape[0], dtype=np.int32)
        else:
            fill = np.arange(leaf.shape[1]) if name == "positions" else np.ones(leaf.shape[1])
            batch[name] = np.broadcast_to(fill, leaf.shape).astype(np.int32)
    return {name: jax.device_put(leaf, shapes[name].sharding) for name, leaf in batch.items()}


def compare(measured: Sequence[Measured], rates: Rates) -> list[Row]:
    """Projected and measured step times."""
    return [
        {
            **{axis: getattr(each.config.mesh, axis) for axis in sharding.AXES},
            "accumulate": each.config.accumulate,
            "exchange": each.config.model.moe.exchange,
            "projected_s": projected(each.cost, rates),
            "measured_s": each.seconds,
            "ratio": projected(each.cost, rates) / each.seconds,
        }
        for each in measured
    ]


def spearman(rows: Sequence[Row]) -> float:
    """Rank correlation of projected and measured times."""
    columns = ([row[name] for row in rows] for name in ("projected_s", "measured_s"))
    return float(spearmanr(*columns).statistic)


def write_rates(file: pathlib.Path, rates: Rates, device: str) -> None:
    """Keeps fitted rates."""
    tree = {"device": device, "rates": dataclasses.asdict(rates)}
    file.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")


def read_rates(file: pathlib.Path) -> Rates:
    """Rates that `write_rates` kept.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else.
    """
    if not file.is_file():
        raise FileNotFoundError(
            f"--rates={file}: no such file; --calibrate --workdir=DIR writes one"
        )
    try:
        return Rates(**json.loads(file.read_text(encoding="utf-8"))["rates"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"--rates={file} holds no rates: {error}") from error


def measured_steps(workdir: pathlib.Path, unit: str) -> tuple[float, float]:
    """Units a second of a finished run, and the spread of it: median, and median deviation.

    The first tenth of what was logged is left out.

    Raises:
        FileNotFoundError: the folder holds no metrics.
        ValueError: they hold no rates.
    """
    file = workdir / "metrics.jsonl"
    if not file.is_file():
        raise FileNotFoundError(f"--workdir={workdir} holds no metrics.jsonl; train there first")
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    rates = [
        line[f"train/{unit}_per_second"] for line in lines if f"train/{unit}_per_second" in line
    ]
    require(bool(rates), f"{file} holds no train/{unit}_per_second")
    kept = rates[len(rates) // 10 :]
    middle = statistics.median(kept)
    return middle, statistics.median(abs(rate - middle) for rate in kept)


def scaled(rates: Rates, factor: float) -> Rates:
    """Rates with every time multiplied by a factor: what one measured run can tell."""
    return Rates(
        products=rates.products / factor,
        memory=rates.memory / factor,
        links=rates.links / factor,
        latency=rates.latency * factor,
        fixed=rates.fixed * factor,
    )


def split(
    config: ExperimentConfig, topology: Topology
) -> tuple[list[ExperimentConfig], list[ExperimentConfig]]:
    """Configurations to be ranked, and others on which rates are fitted.

    Ranked is the configuration on all meshes of the topology's devices that divide it and its
    batch, at most `MESHES`, evenly picked. Fitted is on half the batch and twice the experts'
    hidden width, on the same meshes: no configuration is both.
    """
    all_meshes = meshes(weigh(config), topology.devices)
    legal = [
        mesh
        for mesh in all_meshes
        if (config.batch // 2) % (mesh.data * mesh.fsdp * mesh.expert * config.accumulate) == 0
    ]
    require(
        len(legal) >= 8,
        f"only {len(legal)} meshes of {topology.name} divide the model and half of"
        f" batch={config.batch}, and 8 are needed; choose sizes with more divisors",
    )
    step = max(len(legal) / MESHES, 1.0)
    picked = [legal[int(n * step)] for n in range(min(MESHES, len(legal)))]
    ranked = [dataclasses.replace(config, mesh=mesh) for mesh in picked]
    moe = dataclasses.replace(config.model.moe, hidden=2 * config.model.moe.hidden)
    other = dataclasses.replace(
        config, batch=config.batch // 2, model=dataclasses.replace(config.model, moe=moe)
    )
    return ranked, [dataclasses.replace(other, mesh=mesh) for mesh in picked]
