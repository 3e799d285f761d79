"""A grouped product cut into units, blocks of the result, of which free threads take the next."""

from __future__ import annotations

from typing import Any, NamedTuple

from llvmlite import ir

from emoe_jax.grouped.llvm.code import FLOAT_BYTES, I32, I64, POINTER, Code, integer
from emoe_jax.grouped.llvm.ffi import record_bytes
from emoe_jax.grouped.llvm.gemm import Operand, Tile
from emoe_jax.grouped.products import Product

Value = Any

_STATE = ir.LiteralStructType([I64] * 6 + [POINTER] * 5)
(
    _NEXT,  # the first unit that nobody has taken
    _DONE,  # units that are finished
    _HOLDERS,  # threads that may still look here; the last one frees it
    _UNITS,  # in all
    _D,
    _F,
    _LEFT,
    _RIGHT,
    _OUT,
    _STARTS,  # [E+1], the first row of each expert
    _FIRSTS,  # [E+1], the first unit of each expert
) = range(11)
"""What the threads that work on one product share."""

_CACHE_LINE = 64
_BYTE = ir.IntType(8)


class Kernel(NamedTuple):
    """What is compiled for a product.

    Attributes:
        module: takes its functions.
        name: begins their names.
        product: which one.
        tile: shape of the blocks.
        block: see `gemm.write_block`.
        malloc: of the C library, as the next two.
        free: likewise.
        give_way: sched_yield.
    """

    module: ir.Module
    name: str
    product: Product
    tile: Tile
    block: ir.Function
    malloc: ir.Function
    free: ir.Function
    give_way: ir.Function


class Shape(NamedTuple):
    """M rows, E experts, widths D and F."""

    M: Value
    E: Value
    D: Value
    F: Value


def allocate_state(code: Code, kernel: Kernel, E: Value) -> Value:
    """The shared state with room for its tables; null where there is no memory."""
    builder = code.builder
    table = builder.mul(builder.add(E, integer(1)), integer(8))
    record = integer(record_bytes(_STATE))
    room = code.index(record, table, table)
    state = builder.call(kernel.malloc, [room])
    with builder.if_then(builder.icmp_unsigned("!=", state, ir.Constant(POINTER, None))):
        starts = code.at(state, record, of=_BYTE)
        code.write(state, _STATE, _STARTS, starts)
        code.write(state, _STATE, _FIRSTS, code.at(starts, table, of=_BYTE))
    return state


def allocate_scratch(code: Code, kernel: Kernel) -> Value:
    """What a thread packs its panels into; null where there is no memory."""
    room = kernel.tile.scratch * FLOAT_BYTES + _CACHE_LINE
    return code.builder.call(kernel.malloc, [integer(room)])


def plan(
    code: Code, kernel: Kernel, state: Value, shape: Shape, sizes: Value
) -> tuple[Value, Value]:
    """Fills the tables; how many units and rows there are in all.

    Sizes [E] int32 that are negative count as zero, and what passes the last row is cut off.
    """
    builder, tile = code.builder, kernel.tile
    M, E, D, F = shape
    starts, firsts = code.read(state, _STATE, _STARTS), code.read(state, _STATE, _FIRSTS)
    width = D if kernel.product is Product.TRANSPOSE else F
    across = code.ceiling(width, tile.width)
    row, unit = code.local(I64, integer(0)), code.local(I64, integer(0))
    with code.loop(E) as e:
        start, first = code.load(row, I64), code.load(unit, I64)
        builder.store(start, code.at(starts, e, of=I64))
        builder.store(first, code.at(firsts, e, of=I64))
        size = builder.sext(code.load(code.at(sizes, e, of=I32), I32), I64)
        size = code.larger(code.smaller(size, builder.sub(M, start)), integer(0))
        height = D if kernel.product is Product.COLUMNS else size
        units = builder.mul(code.ceiling(height, tile.height), across)
        builder.store(builder.add(start, size), row)
        builder.store(builder.add(first, units), unit)
    rows, units = code.load(row, I64), code.load(unit, I64)
    builder.store(rows, code.at(starts, E, of=I64))
    builder.store(units, code.at(firsts, E, of=I64))
    return units, rows


def fill(
    code: Code,
    state: Value,
    holders: Value,
    units: Value,
    shape: Shape,
    arrays: tuple[Value, Value, Value],
) -> None:
    """Sets the rest of the state; arrays are left, right and out."""
    zero = integer(0)
    values = (zero, zero, holders, units, shape.D, shape.F, *arrays)
    for number, value in enumerate(values):
        code.write(state, _STATE, number, value)


def wait(code: Code, kernel: Kernel, state: Value) -> None:
    """Waits until the units that somebody has begun are done; nobody has to begin for that."""
    builder = code.builder
    units = code.read(state, _STATE, _UNITS)
    with code.forever() as finished:
        done = builder.load_atomic(code.field(state, _STATE, _DONE), "acquire", 8, typ=I64)
        waiting = builder.append_basic_block("waiting")
        builder.cbranch(builder.icmp_signed("==", done, units), finished, waiting)
        builder.position_at_end(waiting)
        builder.call(kernel.give_way, [])


def release(code: Code, kernel: Kernel, state: Value) -> None:
    """One holder less; the last one frees the state."""
    builder = code.builder
    holders = code.field(state, _STATE, _HOLDERS)
    before = builder.atomic_rmw("sub", holders, integer(1), "acq_rel")
    with builder.if_then(builder.icmp_signed("==", before, integer(1))):
        builder.call(kernel.free, [state])


def write_worker(kernel: Kernel) -> ir.Function:
    """Writes the function work(state, scratch), which takes units until there are none."""
    code = Code(kernel.module, f"{kernel.name}.work", [POINTER, POINTER])
    state, room = code.args
    builder = code.builder
    scratch = _aligned(code, room)
    units = code.read(state, _STATE, _UNITS)
    expert, later = code.local(I64, integer(0)), code.local(I64)
    with code.forever():
        unit = builder.atomic_rmw("add", code.field(state, _STATE, _NEXT), integer(1), "acq_rel")
        with builder.if_then(builder.icmp_signed(">=", unit, units), likely=False):
            builder.ret_void()
        _find_expert(code, state, unit, expert)
        e = code.load(expert, I64)
        block = _locate(code, kernel, state, unit, e)
        # The next that is free now is likely what this thread does next; if not, no harm is done.
        ahead = code.local(POINTER, block.b.data)
        coming = _first_free(code, state)
        with builder.if_then(builder.icmp_signed("<", coming, units)):
            builder.store(e, later)
            _find_expert(code, state, coming, later)
            after = _locate(code, kernel, state, coming, code.load(later, I64))
            builder.store(after.b.data, ahead)
        shape, (c, width) = block.shape, block.c
        rest = (*block.a, *block.b, c, width, scratch, code.load(ahead, POINTER))
        builder.call(kernel.block, [*shape, *rest])
        builder.atomic_rmw("add", code.field(state, _STATE, _DONE), integer(1), "acq_rel")
    builder.unreachable()
    return code.function


def _aligned(code: Code, pointer: Value) -> Value:
    """The first address from a pointer on that begins a cache line."""
    address = code.builder.add(code.builder.ptrtoint(pointer, I64), integer(_CACHE_LINE - 1))
    return code.builder.inttoptr(code.builder.and_(address, integer(-_CACHE_LINE)), POINTER)


def _first_free(code: Code, state: Value) -> Value:
    """The first unit that nobody has taken yet."""
    place = code.field(state, _STATE, _NEXT)
    return code.builder.load_atomic(place, "acquire", 8, typ=I64)


def _find_expert(code: Code, state: Value, unit: Value, expert: Value) -> None:
    """Moves on to the expert of a unit; the units that a thread takes ascend."""
    builder = code.builder
    firsts = code.read(state, _STATE, _FIRSTS)
    with code.forever() as found:
        after = builder.add(code.load(expert, I64), integer(1))
        inside = builder.icmp_signed("<", unit, code.load(code.at(firsts, after, of=I64), I64))
        further = builder.append_basic_block("further")
        builder.cbranch(inside, found, further)
        builder.position_at_end(further)
        builder.store(after, expert)


class _Block(NamedTuple):
    """The operands of `block`: C [M,N], its rows `width` apart, of A [M,K] and B [K,N]."""

    shape: tuple[Value, Value, Value]
    a: Operand
    b: Operand
    c: tuple[Value, Value]


def _locate(code: Code, kernel: Kernel, state: Value, unit: Value, e: Value) -> _Block:
    """Where a unit of expert e lies."""
    builder, tile, product = code.builder, kernel.tile, kernel.product
    one = integer(1)
    D, F = code.read(state, _STATE, _D), code.read(state, _STATE, _F)
    left, right = code.read(state, _STATE, _LEFT), code.read(state, _STATE, _RIGHT)
    out = code.read(state, _STATE, _OUT)
    firsts, starts = code.read(state, _STATE, _FIRSTS), code.read(state, _STATE, _STARTS)
    unit = builder.sub(unit, code.load(code.at(firsts, e, of=I64), I64))
    start = code.load(code.at(starts, e, of=I64), I64)
    size = builder.sub(code.load(code.at(starts, e, one, of=I64), I64), start)
    width = D if product is Product.TRANSPOSE else F
    height = D if product is Product.COLUMNS else size
    across = code.ceiling(width, tile.width)
    i = builder.mul(builder.sdiv(unit, across), integer(tile.height))
    j = builder.mul(builder.srem(unit, across), integer(tile.width))
    m = code.smaller(integer(tile.height), builder.sub(height, i))
    n = code.smaller(integer(tile.width), builder.sub(width, j))
    matrix = builder.mul(e, builder.mul(D, F))
    if product is Product.COLUMNS:
        a = Operand(code.at(left, (start, D), i), one, D)
        b = Operand(code.at(right, (start, F), j), one, F)
        return _Block((m, n, size), a, b, (code.at(out, matrix, (i, F), j), F))
    depth = D if product is Product.MATRIX else F
    row = builder.add(start, i)
    a = Operand(code.at(left, (row, depth)), depth, one)
    if product is Product.MATRIX:
        b = Operand(code.at(right, matrix, j), one, F)
    else:
        b = Operand(code.at(right, matrix, (j, F)), F, one)
    return _Block((m, n, depth), a, b, (code.at(out, (row, width), j), width))


def write_helper(kernel: Kernel, work: ir.Function) -> ir.Function:
    """Writes help(state), for a thread of the pool; too late or without memory it does nothing."""
    code = Code(kernel.module, f"{kernel.name}.help", [POINTER])
    state = code.args[0]
    builder = code.builder
    units = code.read(state, _STATE, _UNITS)
    with builder.if_then(builder.icmp_signed("<", _first_free(code, state), units)):
        scratch = allocate_scratch(code, kernel)
        with builder.if_then(builder.icmp_unsigned("!=", scratch, ir.Constant(POINTER, None))):
            builder.call(work, [state, scratch])
            builder.call(kernel.free, [scratch])
    release(code, kernel, state)
    builder.ret_void()
    return code.function
