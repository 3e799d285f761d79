"""Arithmetic of a traced program: matrix products, with the trips of its loops multiplied in.

The compiler's own count takes the body of a loop once, and knows nothing of a loop whose trips are
data. `products` counts the traced program either way, so that the two can be compared and the
compiler's be corrected.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, jaxprs_in_params

PLATFORM = "tpu"
"""Whose branch counts where the platform chooses: the mathematics are the same, and this one shows
them as products."""


@dataclasses.dataclass(frozen=True)
class Products:
    """FLOPs of matrix products (two for each multiplication), over all devices.

    Attributes:
        total: with the trips of scans; loops of unknown trips left out.
        once: each loop's body once, those of unknown trips too: what the compiler counts.
    """

    total: float
    once: float


def products(program: ClosedJaxpr) -> Products:
    """Counts a traced program."""
    found = list(_walk(program.jaxpr, 1, 1, True))
    return Products(
        total=sum(flops * times for flops, times, certain in found if certain),
        once=sum(flops for flops, _, _ in found),
    )


def _walk(
    jaxpr: Jaxpr, times: int, devices: int, certain: bool
) -> Iterator[tuple[float, int, bool]]:
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        if name in ("dot_general", "ragged_dot_general", "ragged_dot"):
            yield devices * _flops(eqn), times, certain
            continue
        inner = list(jaxprs_in_params(params))
        if name == "scan":
            times_here, certain_here, devices_here = times * params["length"], certain, devices
        elif name == "while":
            times_here, certain_here, devices_here = times, False, devices
        elif name == "shard_map":
            size = math.prod(params["mesh"].shape.values())
            times_here, certain_here, devices_here = times, certain, size
        else:
            times_here, certain_here, devices_here = times, certain, devices
        if name == "cond":
            inner = [_branch(eqn)]
        for each in inner:
            yield from _walk(each, times_here, devices_here, certain_here)


def _branch(eqn: JaxprEqn) -> Jaxpr:
    """The platform's branch; of a choice by data, the one with most products."""
    branches = [branch.jaxpr for branch in eqn.params["branches"]]
    platforms = eqn.params.get("branches_platforms")
    if platforms is not None:
        mine = (i for i, those in enumerate(platforms) if those is None or PLATFORM in those)
        return branches[next(mine)]
    return max(branches, key=lambda each: sum(flops for flops, _, _ in _walk(each, 1, 1, True)))


def _flops(eqn: JaxprEqn) -> float:
    left, right = (_shape(operand) for operand in eqn.invars[:2])
    out = _shape(eqn.outvars[0])
    if eqn.primitive.name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return 2.0 * math.prod(out) * math.prod(left[axis] for axis in contracted)
    # Grouped: every row with one matrix, [M,D] by [E,D,F]; or columns, [M,D] by [M,F].
    if len(right) == 3:
        return 2.0 * math.prod(out) * left[1]
    return 2.0 * math.prod(left) * right[1]


def _shape(operand: Any) -> tuple[int, ...]:
    shape: tuple[int, ...] = operand.aval.shape
    return shape
