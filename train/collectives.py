"""What a program moves between devices, read from the program: no formula of what it should move.

`collectives` walks a traced program, `received` adds up bytes. The trip counts of scans are
multiplied in. How often a `while` turns is not in the program, so what stands inside one is
reported apart, for one turn. Of a `cond` the branch that moves most is taken, but where the
platform chooses (`lax.platform_dependent`), that platform's.

Seen are the collectives of `shard_map`, not those that XLA's partitioner adds, nor what XLA drops
as dead or merges.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, jaxprs_in_params

_Rule = Callable[[int, int, int], float]
"""(bytes put in, bytes that come out, devices) to bytes that one device receives from others."""


def _result(_: int, made: int, devices: int) -> float:
    return made * (devices - 1) / devices


def _operand(given: int, _: int, devices: int) -> float:
    return given * (devices - 1) / devices


def _ring(given: int, _: int, devices: int) -> float:
    # A reduce_scatter and an all_gather: a ring's traffic, which no other way undercuts.
    return 2 * given * (devices - 1) / devices


def _whole(_: int, made: int, devices: int) -> float:
    return made if devices > 1 else 0


RULES: dict[str, _Rule] = {
    "all_to_all": _result,
    "all_gather": _result,
    "all_gather_invariant": _result,
    "all_gather_reduced": _result,
    "reduce_scatter": _operand,
    "unreduced_reduce_scatter": _operand,
    "psum": _ring,
    "psum_invariant": _ring,
    "unreduced_psum": _ring,
    "pmax": _ring,
    "pmin": _ring,
    "unreduced_pmax": _ring,
    "unreduced_pmin": _ring,
    "ppermute": _whole,
    "ragged_all_to_all": _whole,
}
"""Primitive to what a device receives; what it keeps of its own does not count.

Of `ragged_all_to_all` this is the room of its result, an upper bound: how many rows come is data.
"""

_FREE = ("axis_index", "pvary", "preduced", "vary_unreduced_cast_p")
"""Primitives that name an axis and move nothing."""


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program, as each device sees it.

    Attributes:
        kind: its primitive, a key of `RULES`.
        devices: how many take part together.
        shape: of its (first) operand on one device.
        given: bytes of its operands on one device.
        received: bytes that one device receives from others each time.
        times: how often it runs in one turn of all the `while` loops around it.
        loops: how many `while` loops are around it.
    """

    kind: str
    devices: int
    shape: tuple[int, ...]
    given: int
    received: float
    times: int
    loops: int


def collectives(program: ClosedJaxpr, axis: str, platform: str) -> list[Collective]:
    """All collectives of a program over a mesh axis, alone or together with other axes.

    Args:
        program: traced, as `jax.make_jaxpr(f)(...)` or `jax.jit(f).trace(...).jaxpr` give it.
        axis: name of the mesh axis.
        platform: "cpu", "cuda", "rocm" or "tpu": whose branch counts where the platform chooses.

    Raises:
        ValueError: the program has a collective that is not in `RULES`.
    """
    return list(_walk(program.jaxpr, _Place(axis, platform, {})))


def received(found: Iterable[Collective], *, loops: bool = False) -> float:
    """Bytes that one device receives from others.

    Args:
        found: collectives.
        loops: False counts those outside of `while` loops; True those inside, for one turn.
    """
    return sum(each.times * each.received for each in found if bool(each.loops) == loops)


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where the walk stands: the mesh's sizes by axis, and what is multiplied in so far."""

    axis: str
    platform: str
    sizes: Mapping[str, int]
    times: int = 1
    loops: int = 0


def _walk(jaxpr: Jaxpr, place: _Place) -> Iterator[Collective]:
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        if place.axis in _axes(eqn) and name not in _FREE:
            yield _collective(eqn, place)
        elif name == "while":
            turn = dataclasses.replace(place, loops=place.loops + 1)
            # The condition is asked once more than the body runs.
            yield from _walk(params["cond_jaxpr"].jaxpr, place)
            for inner in jaxprs_in_params(params):
                yield from _walk(inner, turn)
        elif name == "cond":
            yield from _branch(eqn, place)
        else:
            there = _enter(eqn, place)
            for inner in jaxprs_in_params(params):
                yield from _walk(inner, there)


def _enter(eqn: JaxprEqn, place: _Place) -> _Place:
    """The place inside an equation that runs its programs once, or a given number of times."""
    if eqn.primitive.name == "scan":
        return dataclasses.replace(place, times=place.times * eqn.params["length"])
    if eqn.primitive.name == "shard_map":
        return dataclasses.replace(place, sizes={**place.sizes, **eqn.params["mesh"].shape})
    return place


def _axes(eqn: JaxprEqn) -> tuple[str, ...]:
    named = eqn.params.get("axes", eqn.params.get("axis_name", ()))
    return tuple(named) if isinstance(named, tuple | list) else (named,)


def _collective(eqn: JaxprEqn, place: _Place) -> Collective:
    kind, axes = eqn.primitive.name, _axes(eqn)
    if kind not in RULES:
        raise ValueError(
            f"the program has a collective {kind!r} over {axes}, of which it is not known what it"
            f" moves; known are {', '.join(RULES)}. Add it to train.collectives.RULES."
        )
    groups = eqn.params.get("axis_index_groups")
    devices = len(groups[0]) if groups else math.prod(place.sizes[axis] for axis in axes)
    # The other operands of ragged_all_to_all are the room of its result, offsets and sizes.
    operands = eqn.invars[:1] if kind == "ragged_all_to_all" else eqn.invars
    given, made = (sum(_bytes(leaf.aval) for leaf in side) for side in (operands, eqn.outvars))
    return Collective(
        kind=kind,
        devices=devices,
        shape=_shaped(eqn.invars[0].aval).shape,
        given=given,
        received=RULES[kind](given, made, devices),
        times=place.times,
        loops=place.loops,
    )


def _bytes(aval: Any) -> int:
    array = _shaped(aval)
    return math.prod(array.shape) * array.dtype.itemsize


def _shaped(aval: Any) -> jax.core.ShapedArray:
    assert isinstance(aval, jax.core.ShapedArray), aval
    return aval


def _branch(eqn: JaxprEqn, place: _Place) -> list[Collective]:
    """The platform's branch of a `cond`, or else the branch that moves most."""
    found = [list(_walk(branch.jaxpr, place)) for branch in eqn.params["branches"]]
    platforms = eqn.params.get("branches_platforms")
    if platforms is None:
        return max(found, key=lambda each: received(each) + received(each, loops=True))
    mine = (i for i, those in enumerate(platforms) if those is None or place.platform in those)
    return found[next(mine)]
