"""Grouped products in LLVM IR, as handlers that XLA calls.

A product is cut into units, blocks of the result. Whoever is free takes the next unit: the thread
that XLA calls and helpers from XLA's own pool. The caller waits for units that somebody has begun
and never for a helper to begin, so that a pool whose threads are all callers cannot lock up.

Records are those of XLA's FFI C API, version 0.3 (xla/ffi/api/c_api.h in jaxlib's headers).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from llvmlite import ir

from emoe_jax.grouped.llvm.code import F32, FLOAT_BYTES, I32, I64, POINTER, VOID, Code, integer
from emoe_jax.grouped.llvm.gemm import Operand, Tile
from emoe_jax.grouped.products import Product

Value = Any

API_VERSION = (0, 3)
"""Of XLA's FFI, major and minor, that the records below are those of."""

WORK_PER_HELPER = 1 << 20
"""Multiply-adds, some 10 us, below which no further thread is asked for help."""

_HEAD = (I64, POINTER)  # size of the record; its extensions
_VERSION = ir.LiteralStructType([*_HEAD, I32, I32])
_ARGS = ir.LiteralStructType([*_HEAD, I64, POINTER, POINTER])
_ATTRS = ir.LiteralStructType([*_HEAD, I64, POINTER, POINTER, POINTER])
_FRAME = ir.LiteralStructType([*_HEAD, POINTER, POINTER, I32, _ARGS, _ARGS, _ATTRS, POINTER])
_FRAME_EXTENSIONS, _FRAME_API, _FRAME_CONTEXT, _FRAME_ARGS, _FRAME_RESULTS = 1, 2, 3, 5, 6
_ARGS_VALUES = 4
_BUFFER = ir.LiteralStructType([*_HEAD, I32, POINTER, I64, POINTER])
_BUFFER_DATA, _BUFFER_SHAPE = 3, 5
_EXTENSION = ir.LiteralStructType([I64, I32, POINTER, POINTER])
_EXTENSION_METADATA = 3
_METADATA = ir.LiteralStructType([I64, _VERSION, I32, I64])
_METADATA_VERSION, _METADATA_TRAITS = 1, 2
_VERSION_MAJOR, _VERSION_MINOR = 2, 3
_API = ir.LiteralStructType([*_HEAD, _VERSION, POINTER] + [POINTER] * 13)
_API_ERROR_CREATE, _API_ERROR_DESTROY, _API_SCHEDULE, _API_THREADS = 4, 6, 15, 16
_SCHEDULE = ir.LiteralStructType([*_HEAD, POINTER, POINTER, POINTER])
_THREADS = ir.LiteralStructType([*_HEAD, POINTER, POINTER])
_DESTROY = ir.LiteralStructType([*_HEAD, POINTER])
_CREATE = ir.LiteralStructType([*_HEAD, POINTER, I32])
_RESOURCE_EXHAUSTED = 8

_API_FUNCTION = ir.FunctionType(POINTER, [POINTER]).as_pointer()
"""Of the API's functions: a record of arguments to an error, null for none."""

# What the threads that work on one product share.
_STATE = ir.LiteralStructType([I64] * 7 + [POINTER] * 5)
(
    _NEXT,  # the first unit that nobody has taken
    _DONE,  # units that are finished
    _HOLDERS,  # threads that may still look here; the last one frees it
    _UNITS,  # in all
    _EXPERTS,  # E
    _D,
    _F,
    _LEFT,
    _RIGHT,
    _OUT,
    _STARTS,  # [E+1], the first row of each expert
    _FIRSTS,  # [E+1], the first unit of each expert
) = range(12)
_ALIGNMENT = 64


class Runtime(NamedTuple):
    """Functions of the C library and of this one that handlers call."""

    malloc: ir.Function
    free: ir.Function
    give_way: ir.Function
    block: ir.Function


def declare_runtime(module: ir.Module, block: ir.Function) -> Runtime:
    """Declares what the handlers need of the C library (POSIX)."""

    def declare(name: str, returns: ir.Type, *arguments: ir.Type) -> ir.Function:
        return ir.Function(module, ir.FunctionType(returns, arguments), name)

    return Runtime(
        declare("malloc", POINTER, I64),
        declare("free", VOID, POINTER),
        declare("sched_yield", I32),
        block,
    )


def write_handler(
    module: ir.Module, runtime: Runtime, tile: Tile, product: Product, name: str
) -> None:
    """Writes the handler of one product: a function of XLA's call frame.

    Operands are left and right as in `Product`, both float32, and sizes [E] int32. Sizes that are
    negative count as zero, and what passes the last row is cut off.
    """
    code = Code(module, name, [POINTER], POINTER)
    builder = code.builder
    frame = code.args[0]
    _answer_metadata(code, frame)
    api = code.read(frame, _FRAME, _FRAME_API)
    context = code.read(frame, _FRAME, _FRAME_CONTEXT)
    buffers = [_buffer(code, frame, _FRAME_ARGS, i) for i in range(3)]
    left, right, sizes = (code.read(buffer, _BUFFER, _BUFFER_DATA) for buffer in buffers)
    out = code.read(_buffer(code, frame, _FRAME_RESULTS, 0), _BUFFER, _BUFFER_DATA)
    shapes = [code.read(buffer, _BUFFER, _BUFFER_SHAPE) for buffer in buffers]
    M, E = _extent(code, shapes[0], 0), _extent(code, shapes[2], 0)
    if product is Product.COLUMNS:
        D, F = _extent(code, shapes[0], 1), _extent(code, shapes[1], 1)
    else:
        D, F = _extent(code, shapes[1], 1), _extent(code, shapes[1], 2)

    table = builder.mul(builder.add(E, integer(1)), integer(8))
    record = _round_up(code, integer(_bytes(_STATE)))
    tables = _round_up(code, builder.mul(table, integer(2)))
    room = code.index(record, tables, integer(_scratch_bytes(tile)))
    state = builder.call(runtime.malloc, [room])
    none = ir.Constant(POINTER, None)
    with builder.if_then(builder.icmp_unsigned("==", state, none), likely=False):
        builder.ret(_error(code, module, api, f"{name}: no memory"))
    starts = code.at(state, record, of=ir.IntType(8))
    firsts = code.at(starts, table, of=ir.IntType(8))
    scratch = code.at(starts, tables, of=ir.IntType(8))
    units, rows = _plan(code, tile, product, (M, E, D, F), sizes, starts, firsts)
    if product is not Product.COLUMNS:
        width = F if product is Product.MATRIX else D
        past = code.at(out, (rows, width))
        with code.loop(builder.mul(builder.sub(M, rows), width)) as i:
            builder.store(ir.Constant(F32, 0.0), code.at(past, i))

    work = builder.mul(builder.mul(M, D), F)
    wanted = builder.sdiv(work, integer(WORK_PER_HELPER))
    helpers = code.smaller(_threads(code, api, context), code.smaller(units, wanted))
    helpers = code.larger(builder.sub(helpers, integer(1)), integer(0))
    holders = builder.add(helpers, integer(1))
    zero = integer(0)
    values = (zero, zero, holders, units, E, D, F, left, right, out, starts, firsts)
    for number, value in enumerate(values):
        code.write(state, _STATE, number, value)

    work_on = _write_worker(module, runtime, tile, product, name)
    help_with = _write_helper(module, runtime, tile, work_on, name)
    with code.loop(helpers):
        arguments = _record(code, _SCHEDULE, (context, help_with, state))
        refused = _call_api(code, api, _API_SCHEDULE, arguments)
        with builder.if_then(builder.icmp_unsigned("!=", refused, none), likely=False):
            _call_api(code, api, _API_ERROR_DESTROY, _record(code, _DESTROY, (refused,)))
            _release(code, runtime, state)
    builder.call(work_on, [state, _aligned(code, scratch)])
    with code.forever() as left_loop:
        done = builder.load_atomic(code.field(state, _STATE, _DONE), "acquire", 8, typ=I64)
        waiting = builder.append_basic_block("waiting")
        builder.cbranch(builder.icmp_signed("==", done, units), left_loop, waiting)
        builder.position_at_end(waiting)
        builder.call(runtime.give_way, [])
    _release(code, runtime, state)
    builder.ret(none)


# --- XLA's records --------------------------------------------------------------------------------


def _bytes(record: ir.LiteralStructType) -> int:
    """Size of a record whose fields are at most 8 bytes, on a 64-bit machine."""
    offset = 0
    for field in record.elements:
        size = _bytes(field) if isinstance(field, ir.LiteralStructType) else _field_bytes(field)
        step = min(size, 8)
        offset = -(-offset // step) * step + size
    return -(-offset // 8) * 8


def _field_bytes(field: ir.Type) -> int:
    return field.width // 8 if isinstance(field, ir.IntType) else 8


def _answer_metadata(code: Code, frame: Value) -> None:
    """XLA's first call asks with an extension which version of the API the handler knows."""
    builder = code.builder
    none = ir.Constant(POINTER, None)
    extension = code.read(frame, _FRAME, _FRAME_EXTENSIONS)
    with builder.if_then(builder.icmp_unsigned("!=", extension, none), likely=False):
        # Frames have no other extension in the versions that XLA lets a handler of 0.3 run with.
        metadata = code.read(extension, _EXTENSION, _EXTENSION_METADATA)
        version = code.field(metadata, _METADATA, _METADATA_VERSION)
        major, minor = (ir.Constant(I32, number) for number in API_VERSION)
        code.write(version, _VERSION, _VERSION_MAJOR, major)
        code.write(version, _VERSION, _VERSION_MINOR, minor)
        code.write(metadata, _METADATA, _METADATA_TRAITS, ir.Constant(I32, 0))
        builder.ret(none)


def _buffer(code: Code, frame: Value, which: int, number: int) -> Value:
    values = code.read(code.field(frame, _FRAME, which), _ARGS, _ARGS_VALUES)
    return code.load(code.at(values, integer(number), of=POINTER), POINTER)


def _extent(code: Code, shape: Value, axis: int) -> Value:
    return code.load(code.at(shape, integer(axis), of=I64), I64)


def _record(code: Code, of: ir.LiteralStructType, values: tuple[Value, ...]) -> Value:
    """A record of arguments: its size, no extensions, the values."""
    record = code.local(of)
    for number, value in enumerate((integer(_bytes(of)), ir.Constant(POINTER, None), *values)):
        code.write(record, of, number, value)
    return record


def _call_api(code: Code, api: Value, number: int, arguments: Value) -> Value:
    function = code.load(code.field(api, _API, number), _API_FUNCTION)
    return code.builder.call(function, [arguments])


def _threads(code: Code, api: Value, context: Value) -> Value:
    """Threads of XLA's pool; one where it has none."""
    builder = code.builder
    count = code.local(I64)
    builder.store(integer(1), count)
    refused = _call_api(code, api, _API_THREADS, _record(code, _THREADS, (context, count)))
    with builder.if_then(
        builder.icmp_unsigned("!=", refused, ir.Constant(POINTER, None)), likely=False
    ):
        _call_api(code, api, _API_ERROR_DESTROY, _record(code, _DESTROY, (refused,)))
        builder.store(integer(1), count)
    return code.load(count, I64)


def _error(code: Code, module: ir.Module, api: Value, message: str) -> Value:
    data = bytearray(message.encode() + b"\0")
    text = ir.GlobalVariable(module, ir.ArrayType(ir.IntType(8), len(data)), f"text.{message}")
    text.initializer = ir.Constant(text.value_type, data)
    text.global_constant = True
    arguments = (text, ir.Constant(I32, _RESOURCE_EXHAUSTED))
    return _call_api(code, api, _API_ERROR_CREATE, _record(code, _CREATE, arguments))


# --- memory ---------------------------------------------------------------------------------------


def _round_up(code: Code, count: Value) -> Value:
    more = code.builder.add(count, integer(_ALIGNMENT - 1))
    return code.builder.and_(more, integer(-_ALIGNMENT))


def _aligned(code: Code, pointer: Value) -> Value:
    address = _round_up(code, code.builder.ptrtoint(pointer, I64))
    return code.builder.inttoptr(address, POINTER)


def _scratch_bytes(tile: Tile) -> int:
    return tile.scratch * FLOAT_BYTES + _ALIGNMENT


def _release(code: Code, runtime: Runtime, state: Value) -> None:
    """One holder less; the last one frees the state."""
    builder = code.builder
    holders = code.field(state, _STATE, _HOLDERS)
    before = builder.atomic_rmw("sub", holders, integer(1), "acq_rel")
    with builder.if_then(builder.icmp_signed("==", before, integer(1))):
        builder.call(runtime.free, [state])


# --- units ----------------------------------------------------------------------------------------


def _plan(
    code: Code,
    tile: Tile,
    product: Product,
    shape: tuple[Value, Value, Value, Value],
    sizes: Value,
    starts: Value,
    firsts: Value,
) -> tuple[Value, Value]:
    """Fills the tables of rows and units; how many units and rows there are in all."""
    builder = code.builder
    M, E, D, F = shape
    width = D if product is Product.TRANSPOSE else F
    across = code.ceiling(width, tile.width)
    row, unit = code.local(I64, integer(0)), code.local(I64, integer(0))
    with code.loop(E) as e:
        start, first = code.load(row, I64), code.load(unit, I64)
        builder.store(start, code.at(starts, e, of=I64))
        builder.store(first, code.at(firsts, e, of=I64))
        size = builder.sext(code.load(code.at(sizes, e, of=I32), I32), I64)
        size = code.larger(code.smaller(size, builder.sub(M, start)), integer(0))
        height = D if product is Product.COLUMNS else size
        units = builder.mul(code.ceiling(height, tile.height), across)
        builder.store(builder.add(start, size), row)
        builder.store(builder.add(first, units), unit)
    rows, units = code.load(row, I64), code.load(unit, I64)
    builder.store(rows, code.at(starts, E, of=I64))
    builder.store(units, code.at(firsts, E, of=I64))
    return units, rows


def _write_worker(
    module: ir.Module, runtime: Runtime, tile: Tile, product: Product, name: str
) -> ir.Function:
    """work(state, scratch): takes units until there are none."""
    code = Code(module, f"{name}.work", [POINTER, POINTER])
    state, scratch = code.args
    builder = code.builder
    units = code.read(state, _STATE, _UNITS)
    next_unit, next_expert = code.local(I64), code.local(I64, integer(0))
    builder.store(_claim(code, state), next_unit)
    with code.forever():
        unit = code.load(next_unit, I64)
        with builder.if_then(builder.icmp_signed(">=", unit, units), likely=False):
            builder.ret_void()
        _find_expert(code, state, unit, next_expert)
        block = _locate(code, tile, product, state, unit, code.load(next_expert, I64))
        # One unit ahead, so that it is known what to fetch; the last fetches its own again.
        coming = _claim(code, state)
        builder.store(coming, next_unit)
        ahead = code.local(POINTER, block.b.data)
        with builder.if_then(builder.icmp_signed("<", coming, units)):
            _find_expert(code, state, coming, next_expert)
            after = _locate(code, tile, product, state, coming, code.load(next_expert, I64))
            builder.store(after.b.data, ahead)
        shape, (c, width) = block.shape, block.c
        rest = (*block.a, *block.b, c, width, scratch, code.load(ahead, POINTER))
        builder.call(runtime.block, [*shape, *rest])
        builder.atomic_rmw("add", code.field(state, _STATE, _DONE), integer(1), "acq_rel")
    builder.unreachable()
    return code.function


def _claim(code: Code, state: Value) -> Value:
    """The next unit that nobody has taken."""
    place = code.field(state, _STATE, _NEXT)
    return code.builder.atomic_rmw("add", place, integer(1), "acq_rel")


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


def _locate(
    code: Code, tile: Tile, product: Product, state: Value, unit: Value, e: Value
) -> _Block:
    """Where a unit of expert e lies."""
    builder = code.builder
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


def _write_helper(
    module: ir.Module, runtime: Runtime, tile: Tile, work: ir.Function, name: str
) -> ir.Function:
    """help(state): what a thread of the pool does; without memory of its own it does nothing."""
    code = Code(module, f"{name}.help", [POINTER])
    state = code.args[0]
    builder = code.builder
    scratch = builder.call(runtime.malloc, [integer(_scratch_bytes(tile))])
    there = builder.icmp_unsigned("!=", scratch, ir.Constant(POINTER, None))
    with builder.if_then(there):
        builder.call(work, [state, _aligned(code, scratch)])
        builder.call(runtime.free, [scratch])
    _release(code, runtime, state)
    builder.ret_void()
    return code.function
