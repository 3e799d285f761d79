"""Grouped products in LLVM IR, as handlers that XLA calls.

The thread that XLA calls works itself and asks threads of XLA's own pool to help. It waits for
units that somebody has begun and never for a helper to begin, so that a pool whose threads are all
callers cannot lock up. A helper that comes too late finds nothing left, and frees what it looked at
if it was the last to look.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from emoe_jax.grouped.llvm import units
from emoe_jax.grouped.llvm.code import F32, I32, I64, POINTER, VOID, Code, integer
from emoe_jax.grouped.llvm.ffi import Call
from emoe_jax.grouped.llvm.gemm import Tile
from emoe_jax.grouped.llvm.units import Kernel, Shape
from emoe_jax.grouped.products import Product

Value = Any

WORK_PER_THREAD = 1 << 20
"""Multiply-adds, some 10 us, below which no further thread is asked for help."""


def declare_kernel(
    module: ir.Module, name: str, product: Product, tile: Tile, block: ir.Function
) -> Kernel:
    """What a handler is made of; declares what it needs of the C library (POSIX)."""

    def declare(symbol: str, returns: ir.Type, *arguments: ir.Type) -> ir.Function:
        known = module.globals.get(symbol)
        return known or ir.Function(module, ir.FunctionType(returns, arguments), symbol)

    malloc, free = declare("malloc", POINTER, I64), declare("free", VOID, POINTER)
    return Kernel(module, name, product, tile, block, malloc, free, declare("sched_yield", I32))


def write_handler(kernel: Kernel) -> None:
    """Writes the handler of one product: a function of XLA's call frame to an error.

    Operands are left and right as in `Product`, both float32, and sizes [E] int32; all are dense,
    the last axis innermost.
    """
    work = units.write_worker(kernel)
    helper = units.write_helper(kernel, work)
    code = Code(kernel.module, kernel.name, [POINTER], POINTER)
    builder = code.builder
    call = Call(code)
    left, right, sizes = (call.operand(i) for i in range(3))
    out = call.result(0)
    right_of = call.extent(right, 1)
    if kernel.product is Product.COLUMNS:
        widths = call.extent(left, 1), right_of
    else:
        widths = right_of, call.extent(right, 2)
    shape = Shape(call.extent(left, 0), call.extent(sizes, 0), *widths)

    none = ir.Constant(POINTER, None)
    scratch = units.allocate_scratch(code, kernel)
    state = units.allocate_state(code, kernel, shape.E)
    for there in (scratch, state):
        with builder.if_then(builder.icmp_unsigned("==", there, none), likely=False):
            builder.call(kernel.free, [scratch])
            builder.call(kernel.free, [state])
            call.fail(f"{kernel.name}: no memory")
    count, rows = units.plan(code, kernel, state, shape, sizes.data)
    if kernel.product is not Product.COLUMNS:
        _clear_rows(code, out.data, rows, shape, kernel.product)
    helpers = _helpers(code, call, count, shape)
    holders = builder.add(helpers, integer(1))
    units.fill(code, state, holders, count, shape, (left.data, right.data, out.data))
    with code.loop(helpers):
        refused = call.schedule(helper, state)
        with builder.if_then(refused, likely=False):
            units.release(code, kernel, state)
    builder.call(work, [state, scratch])
    builder.call(kernel.free, [scratch])
    units.wait(code, kernel, state)
    units.release(code, kernel, state)
    builder.ret(none)


def _clear_rows(code: Code, out: Value, rows: Value, shape: Shape, product: Product) -> None:
    """Zeros the rows that are no expert's."""
    builder = code.builder
    width = shape.F if product is Product.MATRIX else shape.D
    past = code.at(out, (rows, width))
    with code.loop(builder.mul(builder.sub(shape.M, rows), width)) as i:
        builder.store(ir.Constant(F32, 0.0), code.at(past, i))


def _helpers(code: Code, call: Call, count: Value, shape: Shape) -> Value:
    """How many threads beside the caller the product is worth."""
    builder = code.builder
    work = builder.mul(builder.mul(shape.M, shape.D), shape.F)
    worth = builder.sdiv(work, integer(WORK_PER_THREAD))
    threads = code.smaller(call.threads(), code.smaller(count, worth))
    return code.larger(builder.sub(threads, integer(1)), integer(0))
