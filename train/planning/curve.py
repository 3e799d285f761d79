"""Scaling over slices of one chip: more devices with as much work each, or with the same in all."""

from __future__ import annotations

import dataclasses
from typing import Any

from train.config import ExperimentConfig
from train.planning.cost import Rates, predict
from train.planning.memory import weigh
from train.planning.search import search
from train.planning.topology import Topology, parse

SLICES = {
    3: ("2x2x2", "2x2x4", "4x4x4", "4x4x8", "8x8x8", "8x8x16", "16x16x16", "16x16x24"),
    2: ("2x4", "4x4", "8x8", "16x16"),
    0: ("8x1", "8x2", "8x4", "8x8", "8x16", "8x32", "8x64", "8x128"),
}
"""Shapes by the number of physical dimensions; 0 is GPUs."""

IMBALANCES = (0.0, 0.5, 1.0, 2.0)
"""Values of MaxVio."""

Row = dict[str, Any]


def slices(topology: Topology) -> list[Topology]:
    """Slices of the topology's chip, rising."""
    if topology.chip.platform == "cpu":
        return [parse(f"cpu:{2**n}") for n in range(4)]
    return [parse(f"{topology.chip.name}:{shape}") for shape in SLICES[topology.chip.dims]]


def scaling(config: ExperimentConfig, topology: Topology, rates: Rates) -> list[Row]:
    """Projected step time, MFU and share of the exchange on each slice.

    Weak: the batch per device is that of the configuration on the given topology. Strong: the whole
    batch is. On each slice the best `data`, `fsdp` and microbatches by the model are taken, with as
    many devices on `expert` as configured. Imbalance is judged on that way, buffers as they are.
    """
    # Into how many streams the data are dealt has no part in a step, but must divide the batch.
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, shards=1))
    share = max(config.batch // topology.devices, 1)
    rows: list[Row] = []
    for place in slices(topology):
        for kind in ("weak", "strong"):
            batch = share * place.devices if kind == "weak" else config.batch
            rows += _rows(dataclasses.replace(config, batch=batch), place, rates, kind)
    return rows


def _rows(config: ExperimentConfig, place: Topology, rates: Rates, kind: str) -> list[Row]:
    """A row for each imbalance; none where nothing fits."""
    remat = config.model.remat
    exchange = config.model.moe.exchange.replace("auto", "all_to_all")

    def kept(way: ExperimentConfig) -> bool:
        moe, mesh = way.model.moe, way.mesh
        same = way.model.remat == remat and moe.exchange in (exchange, "auto")
        same = same and moe.buffer_factor == config.model.moe.buffer_factor
        return same and mesh.expert == config.mesh.expert and mesh.tensor == 1

    try:
        found = search(config, place, rates, keep=kept)
    except ValueError:  # the batch divides on no mesh of so many devices
        return []
    if not found:
        return []
    best = found[0]
    weights, rows = weigh(config), []
    for max_vio in IMBALANCES:
        cost = predict(best.config, weights, place, max_vio)
        seconds, parts = cost.seconds(rates), cost.parts(rates)
        mesh = best.config.mesh
        rows.append(
            {
                "kind": kind,
                "topology": place.name,
                "devices": place.devices,
                "max_vio": max_vio,
                "batch": config.batch,
                "fsdp": mesh.fsdp,
                "expert": mesh.expert,
                "data": mesh.data,
                "accumulate": best.config.accumulate,
                "rounds": cost.rounds,
                "buffer_factor_for_one_round": round(
                    1 + max_vio * mesh.expert / config.model.moe.experts, 3
                ),
                "memory_GB": best.memory.total / 1e9,
                "seconds": seconds,
                "mfu": cost.mfu(seconds),
                "exchange_share": parts.get("exchange", 0.0) / seconds,
            }
        )
    return rows
