"""Reading the compiler's scheduled program: loops, collectives, and what runs beside them.

Only text is read, as XLA writes it for any platform, so the reader needs no compiler.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)

SMALL = 1 << 16
"""Bytes below which a collective only carries counts, norms or statistics."""

_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "c64": 8, "c128": 16}
_ARRAY = re.compile(r"\b(pred|bf16|c64|c128|[suf]\d+)\[([\d,]*)\]")
_WORK = ("fusion", "convolution", "dot", "custom-call", "while", "call")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
        name: without its sign.
        kind: opcode.
        shape: of the result as text.
        rest: operands and attributes as text.
    """

    name: str
    kind: str
    shape: str
    rest: str

    def attribute(self, name: str) -> str | None:
        """The computation that an attribute such as `body` names."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.rest)
        return found[1] if found else None

    @property
    def scope(self) -> str:
        """Where in the source's scopes it comes from."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the schedule, as each device sees it.

    Attributes:
        kind: one of `KINDS`.
        axes: mesh axes over which devices take part.
        purpose: "exchange", "fsdp gather", "gradients", "tensor", "statistics" or "other".
        size: bytes of the result on one device.
        received: bytes that one device receives from others each time.
        times: how often it runs in a step; 0 in a loop whose trips are data.
        hidden: whether it is split into a start and an end with work between them.
    """

    kind: str
    axes: tuple[str, ...]
    purpose: str
    size: float
    received: float
    times: int
    hidden: bool


def array_bytes(shape: str) -> float:
    """Bytes of all arrays in a shape's text; layouts and padding are not read."""
    total = 0.0
    for kind, dims in _ARRAY.findall(shape):
        width = _BYTES.get(kind) or int(kind[1:]) / 8
        total += width * math.prod(int(size) for size in dims.split(",") if size)
    return total


def computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Instructions by computation, in the order of the schedule; and the entry's name."""
    found: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if line.endswith("{") and line[:1] in ("%", "E"):
            match = re.match(r"(ENTRY )?%?([\w.\-]+)", line)
            assert match is not None
            current = found.setdefault(match[2], [])
            entry = match[2] if match[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (made := _instruction(line)) is not None:
            current.append(made)
    return found, entry


_HEAD = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = ")


def _instruction(line: str) -> Instruction | None:
    head = _HEAD.match(line)
    if head is None:
        return None
    depth, at = 0, head.end()
    while at < len(line) and (depth or line[at] != " "):
        depth += (line[at] in "({[") - (line[at] in ")}]")
        at += 1
    kind, _, rest = line[at + 1 :].partition("(")
    return Instruction(head[1], kind, line[head.end() : at], rest)


def trips(loop: Instruction, program: Mapping[str, Sequence[Instruction]]) -> int:
    """How often a `while` turns; 0 where that is data.

    The compiler says so, or the condition compares the counter, which begins at zero, with the one
    constant in it.
    """
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest)
    if known:
        return int(known[1])
    condition = loop.attribute("condition")
    limits = [
        int(each.rest.partition(")")[0])
        for each in program.get(condition or "", ())
        if each.kind == "constant" and each.shape.startswith("s32[]")
    ]
    return limits[0] if len(limits) == 1 else 0


def collectives(text: str, mesh: Mapping[str, int]) -> list[Collective]:
    """All collectives of a scheduled program.

    Args:
        text: the program.
        mesh: sizes of the mesh axes in their order; device n is the n-th of the mesh.
    """
    program, entry = computations(text)
    return list(_walk(program, entry, 1, dict(mesh)))


def _walk(
    program: Mapping[str, Sequence[Instruction]], name: str, times: int, mesh: Mapping[str, int]
) -> Iterator[Collective]:
    body = program.get(name, ())
    for place, each in enumerate(body):
        kind = each.kind.removesuffix("-start")
        if kind in KINDS:
            hidden = each.kind != kind and _work_before_end(body, place)
            yield _collective(each, kind, times, hidden, mesh)
        elif each.kind == "fusion" and each.attribute("calls") in program:
            # On TPU a scatter of a sum is an all-reduce fused with the slice that a device keeps.
            for found in _walk(program, each.attribute("calls") or "", times, mesh):
                size = array_bytes(each.shape)
                devices = math.prod(mesh[axis] for axis in found.axes)
                received = _received("reduce-scatter", size, devices)
                yield dataclasses.replace(
                    found, kind="reduce-scatter", size=size, received=received
                )
        elif each.kind == "while":
            inner = each.attribute("body")
            yield from _walk(program, inner or "", times * trips(each, program), mesh)
        elif each.kind in ("call", "async-start"):
            inner = each.attribute("to_apply") or each.attribute("calls")
            hidden = each.kind == "async-start" and _work_before_end(body, place)
            for found in _walk(program, inner or "", times, mesh):
                yield dataclasses.replace(found, hidden=found.hidden or hidden)
        elif each.kind == "conditional":
            branches = re.findall(r"(?:branch_computations=\{|_computation=)([^}, ]*)", each.rest)
            for branch in branches:
                yield from _walk(program, branch.strip("%"), times, mesh)


def _work_before_end(body: Sequence[Instruction], place: int) -> bool:
    """Whether something is computed before the instruction that ends an asynchronous one."""
    chain = {body[place].name}
    for each in body[place + 1 :]:
        operands = set(re.findall(r"%([\w.\-]+)", each.rest.partition("metadata=")[0]))
        if chain & operands and each.kind.endswith("-done"):
            return False
        if chain & operands and each.kind.endswith("-update"):
            chain.add(each.name)
        elif each.kind in _WORK and not chain & operands:
            return True
    return False


def _collective(
    each: Instruction, kind: str, times: int, hidden: bool, mesh: Mapping[str, int]
) -> Collective:
    group = _group(each.rest, mesh)
    sizes = tuple(mesh.values())
    places = np.stack(np.unravel_index(group, sizes))
    axes = tuple(
        name for name, line in zip(mesh, places, strict=True) if len(set(line.tolist())) > 1
    )
    devices = max(len(group), 1)
    size = array_bytes(each.shape)
    if each.kind != kind and kind != "all-reduce":
        # Such a start gives operands, then results, then scalars of its own.
        arrays = [found[0] for found in _ARRAY.finditer(each.shape) if not found[0].endswith("[]")]
        size = sum(array_bytes(array) for array in arrays[len(arrays) // 2 :])
    return Collective(
        kind,
        axes,
        _purpose(each, kind, axes, size),
        size,
        _received(kind, size, devices),
        times,
        hidden,
    )


def _received(kind: str, size: float, devices: int) -> float:
    """Bytes from others for a result of `size` bytes, by the rules of `train.collectives`."""
    if devices == 1:
        return 0.0
    share = (devices - 1) / devices
    if kind == "all-reduce":
        return 2 * size * share
    if kind == "reduce-scatter":
        return size * (devices - 1)
    return size if kind in ("collective-permute", "ragged-all-to-all") else size * share


def _group(rest: str, mesh: Mapping[str, int]) -> np.ndarray:
    """The devices of the first group."""
    everyone = np.arange(math.prod(mesh.values()))
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", rest)
    if listed:
        return np.array([int(number) for number in listed[1].split(",")])
    pairs = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", rest)
    if pairs:
        return np.array([int(pairs[1]), int(pairs[2])])
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest)
    if iota:
        dims = [int(size) for size in iota[3].split(",")]
        order = [int(axis) for axis in iota[4].split(",")] if iota[4] else range(len(dims))
        grid = np.arange(math.prod(dims)).reshape(dims).transpose(order)
        return grid.reshape(int(iota[1]), int(iota[2]))[0]
    named = re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", rest)
    if named:
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        over = re.findall(r"'(\w+)'", named[2])
        grid = everyone.reshape(tuple(sizes.values()))
        index = tuple(slice(None) if name in over else 0 for name in sizes)
        return np.asarray(grid[index]).reshape(-1)
    return everyone


def _purpose(each: Instruction, kind: str, axes: tuple[str, ...], size: float) -> str:
    if "expert" in axes and "all-to-all" in kind:
        return "exchange"
    if size < SMALL:
        return "statistics"
    scope = each.scope
    if "expert" in axes and ("exchange" in scope or "return" in scope):
        return "exchange"
    if axes == ("tensor",):
        return "tensor"
    if kind == "all-gather" and "fsdp" in axes:
        return "fsdp gather"
    if kind in ("all-reduce", "reduce-scatter") and {"data", "fsdp", "expert"} & set(axes):
        return "gradients"
    return "other"
