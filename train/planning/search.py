"""Every way to run a configuration on a topology, ranked by the cost model."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from emoe_jax.config import EXCHANGES, REMAT, moe_layers, require
from emoe_jax.sharding import AXES, MeshConfig
from train.config import ExperimentConfig
from train.planning.cost import PEAK, Cost, Rates, predict
from train.planning.memory import Memory, Weights, weigh
from train.planning.memory import predict as predict_memory
from train.planning.topology import Topology, abstract_shape

BUFFERS = (1.0, 1.25, 1.5, 2.0)
"""Values of `moe.buffer_factor` that are tried."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way, with what the model says of it.

    Attributes:
        config: the experiment, changed.
        memory: of a device.
        cost: of a step.
        seconds: projected.
    """

    config: ExperimentConfig
    memory: Memory
    cost: Cost
    seconds: float

    @property
    def fits(self) -> bool:
        """Whether the modelled memory is there."""
        return self.memory.total <= self.cost.topology.chip.memory

    def settings(self) -> dict[str, Any]:
        """The keys that a search varies."""
        return settings(self.config)


def settings(config: ExperimentConfig) -> dict[str, Any]:
    """The keys that a search varies, as the command line names them."""
    moe = config.model.moe
    return {f"mesh.{axis}": getattr(config.mesh, axis) for axis in AXES} | {
        "accumulate": config.accumulate,
        "model.remat": config.model.remat,
        "moe.exchange": moe.exchange,
        "moe.buffer_factor": moe.buffer_factor,
    }


def judge(
    config: ExperimentConfig,
    weights: Weights,
    topology: Topology,
    rates: Rates,
    max_vio: float = 0.0,
) -> Candidate:
    """What the model says of one configuration."""
    mesh = abstract_shape(topology, config.mesh)
    config = dataclasses.replace(config, mesh=MeshConfig(**mesh))
    memory = predict_memory(config, weights, mesh)
    cost = predict(config, weights, topology, max_vio)
    return Candidate(config, memory, cost, cost.seconds(rates))


def search(
    config: ExperimentConfig,
    topology: Topology,
    rates: Rates = PEAK,
    max_vio: float = 0.0,
    keep: Callable[[ExperimentConfig], bool] = lambda _: True,
) -> list[Candidate]:
    """All ways that fit by the model, the fastest first.

    Args:
        config: the experiment; its mesh, microbatches, remat, exchange and buffers are varied.
        topology: the devices.
        rates: see `cost.Rates`.
        max_vio: see `cost.predict`.
        keep: leaves out configurations before they are judged.

    Raises:
        ValueError: no way is legal: the batch or the model does not divide.
    """
    weights = weigh(config)
    ways = [way for way in legal(config, weights, topology) if keep(way)]
    require(
        bool(ways),
        f"no mesh of {topology.devices} devices divides the model and batch={config.batch}; choose"
        f" a batch that is a multiple of a divisor of {topology.devices}",
    )
    capacity = topology.chip.memory
    found = []
    for way in ways:
        mesh = {axis: getattr(way.mesh, axis) for axis in AXES}
        memory = predict_memory(way, weights, mesh)
        if memory.total <= capacity:
            cost = predict(way, weights, topology, max_vio)
            found.append(Candidate(way, memory, cost, cost.seconds(rates)))
    return sorted(found, key=lambda each: (each.seconds, each.memory.total))


def legal(
    config: ExperimentConfig, weights: Weights, topology: Topology
) -> Iterator[ExperimentConfig]:
    """Every legal configuration on the topology."""
    moe = config.model.moe
    for mesh in meshes(weights, topology.devices):
        if config.model.moe.experts % mesh.expert:
            continue
        parts = mesh.data * mesh.fsdp * mesh.expert
        spread = mesh.expert > 1 and any(moe_layers(config.model))
        for accumulate, remat in itertools.product(_microbatches(config.batch, parts), REMAT):
            model = dataclasses.replace(config.model, remat=remat)
            for exchange, factor in _exchanges(moe.exchange, moe.buffer_factor, spread):
                layer = dataclasses.replace(moe, exchange=exchange, buffer_factor=factor)
                yield dataclasses.replace(
                    config,
                    mesh=mesh,
                    accumulate=accumulate,
                    model=dataclasses.replace(model, moe=layer),
                )


def meshes(weights: Weights, devices: int) -> list[MeshConfig]:
    """Meshes of so many devices that divide every dimension they split."""
    largest = weights.common
    found = []
    for fsdp, expert, tensor in itertools.product(*(divisors(devices),) * 3):
        fixed = fsdp * expert * tensor
        sizes = {"fsdp": fsdp, "expert": expert, "tensor": tensor}
        if devices % fixed == 0 and all(largest[axis] % sizes[axis] == 0 for axis in sizes):
            found.append(MeshConfig(devices // fixed, **sizes))
    return found


@functools.cache
def divisors(number: int) -> tuple[int, ...]:
    """All of them, rising."""
    return tuple(n for n in range(1, number + 1) if number % n == 0)


def _microbatches(batch: int, parts: int) -> list[int]:
    """Powers of two into which each shard's part of a batch can be cut."""
    if batch % parts:
        return []
    share = batch // parts
    return [2**n for n in range(share.bit_length()) if share % 2**n == 0]


def _exchanges(name: str, factor: float, spread: bool) -> Sequence[tuple[str, float]]:
    """Ways to exchange and room for it; what is configured where nothing is exchanged."""
    if not spread:
        return [(name, factor)]
    limited = [way for way in EXCHANGES if way not in ("auto", "all_gather")]
    ways = [(way, room) for way in limited for room in BUFFERS]
    return [*ways, ("all_gather", factor)]


def smallest_change(
    config: ExperimentConfig, topology: Topology, found: Sequence[Candidate]
) -> tuple[dict[str, Any], Candidate] | None:
    """Of the ways that fit the one that changes the fewest keys, and of those the fastest.

    Returns:
        The keys to set, and the way; None where nothing fits.
    """
    mesh = MeshConfig(**abstract_shape(topology, config.mesh))
    now = settings(dataclasses.replace(config, mesh=mesh))
    now["moe.exchange"] = now["moe.exchange"].replace("auto", "all_to_all")

    def changed(each: Candidate) -> dict[str, Any]:
        then = each.settings()
        then["moe.exchange"] = then["moe.exchange"].replace("auto", "all_to_all")
        return {key: value for key, value in then.items() if value != now[key]}

    if not found:
        return None
    # A mesh axis is always paid for by another, so that one change of the mesh is one change.
    best = min(
        found,
        key=lambda each: (
            len({key.partition(".")[0] if key[:4] == "mesh" else key for key in changed(each)}),
            each.seconds,
        ),
    )
    return changed(best), best
