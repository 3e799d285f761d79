"""A plan as tables of rows: what is printed, written as JSON and drawn."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from typing import Any

from train.planning import hlo
from train.planning.compiler import Compiled
from train.planning.cost import Rates
from train.planning.memory import Memory, Weights
from train.planning.operations import Products
from train.planning.search import Candidate, settings
from train.planning.topology import abstract_shape
from train.planning.wires import exchange_rate, link_load, ring_rate

Row = dict[str, Any]


def summary(
    judged: Candidate, weights: Weights, compiled: Compiled | None, rates: Rates, hidden: float
) -> list[Row]:
    """What a reader wants first; every time in it is projected."""
    cost, config = judged.cost, judged.config
    seconds = cost.seconds(rates, hidden)
    total = compiled.total if compiled else judged.memory.total
    facts: Row = {
        "topology": cost.topology.name,
        "devices": cost.devices,
        **settings(config),
        "parameters": weights.count,
        "active parameters": weights.active,
        "tokens or images a step": cost.units,
        "memory a device, GB": total / 1e9,
        "memory from": _source(compiled),
        "memory there, GB": cost.topology.chip.memory / 1e9,
        "fits": fits(judged, compiled),
        "model FLOPs a step": cost.model_flops,
        "model FLOPs a token or image": cost.model_flops / cost.units,
        "projected seconds a step": seconds,
        "projected MFU": cost.mfu(seconds),
        "projected tokens or images a second": cost.units / seconds,
        "bound by": cost.bound(rates),
    }
    return [{"fact": name, "value": value} for name, value in facts.items()]


def _source(compiled: Compiled | None) -> str:
    if compiled is None:
        return "formula"
    return "memory_analysis" if compiled.analysis else "the compiler's buffer assignment"


def fits(judged: Candidate, compiled: Compiled | None) -> bool:
    """Whether a step has room: by the compiler where there is one, by the formula otherwise."""
    if compiled is None:
        return judged.fits
    return compiled.limit is None and compiled.total <= judged.cost.topology.chip.memory


def memory_rows(memory: Memory, compiled: Compiled | None) -> list[Row]:
    """Memory by part: the formula's, and how it divides what the compiler says.

    Parameters, optimizer, activations, gradients and buffers have the same sizes in both; the rest
    of what the compiler needs is its scratch.
    """
    rows: list[Row] = []
    parts = dataclasses.asdict(memory)
    known = sum(size for name, size in parts.items() if name != "scratch")
    for name, size in parts.items():
        row: Row = {"part": name, "formula_GB": size / 1e9}
        if compiled:
            mine = size if name != "scratch" else compiled.total - known
            row["compiled_GB"] = mine / 1e9
        rows.append(row)
    total: Row = {"part": "all", "formula_GB": memory.total / 1e9}
    if compiled:
        total |= {
            "compiled_GB": compiled.total / 1e9,
            "formula_ratio": memory.total / compiled.total,
        }
    return [*rows, total]


def flow_rows(judged: Candidate, found: list[hlo.Collective] | None, rates: Rates) -> list[Row]:
    """Collectives by purpose and axes: the formula's bytes and the schedule's, and their time."""
    merged: dict[tuple[str, str], Row] = {}

    def row_of(purpose: str, axes: tuple[str, ...]) -> Row:
        name = "+".join(axes)
        return merged.setdefault((purpose, name), {"purpose": purpose, "axes": name})

    for flow in judged.cost.flows:
        row = row_of(flow.purpose, flow.axes)
        took = flow.seconds / rates.links + flow.count * rates.latency
        row["formula_GB"] = row.get("formula_GB", 0.0) + flow.received / 1e9
        row["projected_seconds"] = row.get("projected_seconds", 0.0) + took
    for each in found or ():
        row, moved = row_of(each.purpose, each.axes), each.times * each.received / 1e9
        row["scheduled_GB"] = row.get("scheduled_GB", 0.0) + moved
        row["hidden_GB"] = row.get("hidden_GB", 0.0) + each.hidden * moved
        row["times"] = row.get("times", 0) + each.times
    return sorted(
        merged.values(),
        key=lambda row: -max(row.get("formula_GB", 0.0), row.get("scheduled_GB", 0.0)),
    )


def hidden_share(found: list[hlo.Collective]) -> float:
    """Share of the collectives' bytes that the schedule runs beside work."""
    whole = sum(each.times * each.received for each in found)
    beside = sum(each.hidden * each.times * each.received for each in found)
    return beside / whole if whole else 0.0


def time_rows(judged: Candidate, rates: Rates) -> list[Row]:
    """Projected seconds by what they go to, one after another."""
    parts = judged.cost.parts(rates)
    return [{"part": name, "projected_seconds": took} for name, took in parts.items()]


def link_rows(judged: Candidate) -> list[Row]:
    """What the wiring gives each mesh axis."""
    topology, mesh, rows = judged.cost.topology, judged.config.mesh, []
    sizes = abstract_shape(topology, mesh)
    flows: dict[str, float] = defaultdict(float)
    for flow in judged.cost.flows:
        flows["+".join(flow.axes)] += flow.received
    for axis, size in sizes.items():
        if size == 1:
            continue
        row: Row = {"axis": axis, "devices": size}
        row["ring_GB_per_s"] = ring_rate(topology, mesh, (axis,)) / 1e9
        if axis == "expert":
            row["exchange_GB_per_s"] = exchange_rate(topology, mesh) / 1e9
            if topology.chip.dims:
                row["parts_on_fullest_link"] = link_load(topology, mesh)
        row["received_GB"] = flows.get(axis, 0.0) / 1e9
        rows.append(row)
    return rows


def operation_rows(
    judged: Candidate, counted: Products | None, compiled: Compiled | None
) -> list[Row]:
    """Arithmetic of a step: the formula's, the traced program's and the compiler's."""
    cost = judged.cost
    rows: list[Row] = [
        {"count": "model FLOPs, 6·N·T + 12·L·H·dim·S·T", "a_step": cost.model_flops},
        {
            "count": "products of the formula, recomputation included",
            "a_step": cost.products * cost.devices,
        },
    ]
    if counted:
        rows.append(
            {
                "count": "products of the traced program, empty slots included",
                "a_step": counted.total,
            }
        )
    if counted and compiled and compiled.flops:
        ratio = counted.total / counted.once
        rows.append(
            {
                "count": "the compiler's own, times the traced program's trips",
                "a_step": compiled.flops * cost.devices * ratio,
            }
        )
    for row in rows:
        row["a_unit"] = row["a_step"] / cost.units
        row["of_model"] = row["a_step"] / cost.model_flops
    return rows
