"""A matrix product in LLVM IR: packed panels, a tile of registers.

The classic scheme (Goto and van de Geijn, "Anatomy of high-performance matrix multiplication", ACM
TOMS 34, 2008): a panel of B that stays in the first-level cache, panels of A that stream past it
from the second, and a tile of C in registers. Both operands are copied into panels first, k by k;
where an operand's k is its contiguous axis the copy transposes squares in registers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from llvmlite import ir

from emoe_jax.grouped.llvm.code import F32, FLOAT_BYTES, I1, I64, POINTER, Code, integer

Value = Any

_ROWS_AT_A_TIME = 8
_AHEAD = 2
_LINE = 16
"""Float32 numbers in a cache line."""


class Tile(NamedTuple):
    """Shape of the product's blocks.

    Attributes:
        lanes: float32 numbers in a vector register.
        rows: of the tile of C in registers, a power of two or a multiple of 8.
        vectors: of a row of that tile.
        depth: k that are packed at a time.
        height: rows of A that are packed at a time, a multiple of `rows`.
        width: columns of B that are packed at a time, a multiple of `columns`.
    """

    lanes: int
    rows: int
    vectors: int
    depth: int = 256
    height: int = 256
    width: int = 512

    @property
    def columns(self) -> int:
        """Of the tile of C."""
        return self.lanes * self.vectors

    @property
    def scratch(self) -> int:
        """Float32 numbers that `block` needs for its panels."""
        return self.depth * (self.height + self.width) + self.rows * self.columns


def tile_for(features: dict[str, bool], machine: str) -> Tile:
    """The tile for a processor: registers hold it, a vector of B's panel and one number of A's.

    Args:
        features: of the processor, by LLVM's names.
        machine: `platform.machine()`.
    """
    if features.get("avx512f"):
        return Tile(lanes=16, rows=8, vectors=2)
    if machine in ("aarch64", "arm64"):
        return Tile(lanes=4, rows=8, vectors=2)
    if features.get("avx2"):
        return Tile(lanes=8, rows=4, vectors=2)
    return Tile(lanes=4, rows=4, vectors=2)


class Operand(NamedTuple):
    """A matrix in memory.

    Attributes:
        data: pointer to its first number.
        outer: numbers from one row of A, or column of B, to the next.
        inner: numbers from one k to the next. One of the two is 1.
    """

    data: Value
    outer: Value
    inner: Value


def write_block(module: ir.Module, tile: Tile) -> ir.Function:
    """Writes the function block(M, N, K, a, b, c, ldc, scratch, ahead), a and b as of `Operand`.

    It sets C [M,N], rows `ldc` apart, to A [M,K] times B [K,N]. M is at most `tile.height` and N
    `tile.width`; with K = 0 all is zero. `scratch` has room for `tile.scratch` numbers, aligned to
    a cache line. `ahead` points to the B of the block that the thread does next: while it computes,
    what it packs next is on its way from memory.

    Raises:
        ValueError: the tile does not divide the block, or cannot be transposed in squares.
    """
    for size in (tile.rows, tile.columns):
        if size % 8 and size not in (1, 2, 4):
            raise ValueError(f"a side of {size} in {tile} is no power of two nor multiple of 8")
    if tile.height % tile.rows or tile.width % tile.columns:
        raise ValueError(
            f"{tile} packs {tile.height} rows and {tile.width} columns, which tiles of {tile.rows}"
            f" and {tile.columns} do not divide"
        )
    kernel = _write_kernel(module, tile)
    pack_a = _write_pack(module, "pack_a", tile.rows, tile.depth)
    pack_b = _write_pack(module, "pack_b", tile.columns, tile.depth)
    edge = _write_edge(module, tile)

    code = Code(
        module, "block", [I64] * 3 + [POINTER, I64, I64] * 2 + [POINTER, I64, POINTER] + [POINTER]
    )
    M, N, K, *rest = code.args
    a, b, (c, ldc, scratch, ahead) = Operand(*rest[:3]), Operand(*rest[3:6]), rest[6:]
    builder = code.builder
    panels_a = scratch
    panels_b = code.at(panels_a, integer(tile.depth * tile.height))
    corner = code.at(panels_b, integer(tile.depth * tile.width))
    with builder.if_then(builder.icmp_signed("==", K, integer(0))), code.loop(M) as i:
        _fill_zero(code, code.at(c, (i, ldc)), N)
    # From one contiguous run of B to the next.
    run = code.larger(b.outer, b.inner)
    with code.loop(K, tile.depth) as k:
        depth = code.smaller(integer(tile.depth), builder.sub(K, k))
        more = builder.icmp_signed(">", k, integer(0))
        for pack, x, count, panels in ((pack_a, a, M, panels_a), (pack_b, b, N, panels_b)):
            source = code.at(x.data, (k, x.inner))
            builder.call(pack, [source, x.outer, x.inner, count, depth, panels])
        last = builder.icmp_signed("==", code.index(k, depth), K)
        coming = builder.select(last, ahead, code.at(b.data, (code.index(k, depth), b.inner)))
        tiles = code.local(I64, integer(0))
        with code.loop(N, tile.columns) as j, code.loop(M, tile.rows) as i:
            number = code.load(tiles, I64)
            builder.store(code.index(number, integer(1)), tiles)
            fetched = code.at(coming, (number, run))
            panel_a = code.at(panels_a, (i, integer(tile.depth)))
            panel_b = code.at(panels_b, (j, integer(tile.depth)))
            rows = code.smaller(integer(tile.rows), builder.sub(M, i))
            columns = code.smaller(integer(tile.columns), builder.sub(N, j))
            target = code.at(c, (i, ldc), j)
            whole = builder.and_(
                builder.icmp_signed("==", rows, integer(tile.rows)),
                builder.icmp_signed("==", columns, integer(tile.columns)),
            )
            with builder.if_else(whole) as (inside, at_edge):
                with inside:
                    builder.call(kernel, [depth, panel_a, panel_b, target, ldc, more, fetched])
                with at_edge:
                    room = integer(tile.columns)
                    none = ir.Constant(I1, 0)
                    builder.call(kernel, [depth, panel_a, panel_b, corner, room, none, fetched])
                    builder.call(edge, [corner, target, ldc, rows, columns, more])
    builder.ret_void()
    return code.function


def _fill_zero(code: Code, data: Value, count: Value) -> None:
    with code.loop(count) as i:
        code.builder.store(ir.Constant(F32, 0.0), code.at(data, i))


def _write_kernel(module: ir.Module, tile: Tile) -> ir.Function:
    """kernel(depth, a, b, c, ldc, more, ahead): a tile of C from two panels, added to it if `more`.

    What `ahead` points to is fetched meanwhile, `_AHEAD` numbers for each k.
    """
    arguments = [I64, POINTER, POINTER, POINTER, I64, I1, POINTER]
    code = Code(module, "kernel", arguments)
    depth, a, b, c, ldc, more, ahead = code.args
    vector = ir.VectorType(F32, tile.lanes)
    cells = [(i, v) for i in range(tile.rows) for v in range(tile.vectors)]
    sums = {cell: code.local(vector, ir.Constant(vector, None)) for cell in cells}
    for i in range(tile.rows):
        for v in range(0, tile.columns, _LINE):
            code.prefetch(code.at(c, (integer(i), ldc), integer(v)), write=True)
    with code.loop(depth) as k:
        code.prefetch(code.at(ahead, (k, integer(_AHEAD))))
        left = code.at(a, (k, integer(tile.rows)))
        right = code.at(b, (k, integer(tile.columns)))
        row = [
            code.load(code.at(right, integer(v * tile.lanes)), vector, align=FLOAT_BYTES)
            for v in range(tile.vectors)
        ]
        for i in range(tile.rows):
            number = code.splat(code.load(code.at(left, integer(i)), F32), tile.lanes)
            for v in range(tile.vectors):
                total = code.multiply_add(number, row[v], code.load(sums[i, v], vector))
                code.builder.store(total, sums[i, v])
    places = {(i, v): code.at(c, (integer(i), ldc), integer(v * tile.lanes)) for i, v in cells}
    with code.builder.if_else(more) as (adding, setting):
        with adding:
            for cell, place in places.items():
                old = code.load(place, vector, align=FLOAT_BYTES)
                total = code.builder.fadd(old, code.load(sums[cell], vector))
                code.builder.store(total, place, align=FLOAT_BYTES)
        with setting:
            for cell, place in places.items():
                code.builder.store(code.load(sums[cell], vector), place, align=FLOAT_BYTES)
    code.builder.ret_void()
    return code.function


def _write_edge(module: ir.Module, tile: Tile) -> ir.Function:
    """edge(corner, c, ldc, rows, columns, more): the part of a whole tile that C has room for."""
    code = Code(module, "edge", [POINTER, POINTER, I64, I64, I64, I1])
    corner, c, ldc, rows, columns, more = code.args
    with code.loop(rows) as i, code.loop(columns) as j:
        place = code.at(c, (i, ldc), j)
        new = code.load(code.at(corner, (i, integer(tile.columns)), j), F32)
        with code.builder.if_else(more) as (adding, setting):
            with adding:
                code.builder.store(code.builder.fadd(code.load(place, F32), new), place)
            with setting:
                code.builder.store(new, place)
    code.builder.ret_void()
    return code.function


def _write_pack(module: ir.Module, name: str, width: int, room: int) -> ir.Function:
    """pack(source, outer, inner, count, depth, panels): source[i·outer + k·inner], i up to `count`.

    Panel p holds i from p·width on, number (k, i) at k·width + i; zeros where i passes `count`. A
    panel has room for `room` k. One of the strides is 1.
    """
    code = Code(module, name, [POINTER, I64, I64, I64, I64, POINTER])
    source, outer, inner, count, depth, panels = code.args
    builder = code.builder
    whole = builder.mul(builder.sdiv(count, integer(width)), integer(width))
    with builder.if_else(builder.icmp_signed("==", outer, integer(1))) as (in_rows, in_columns):
        with in_rows:
            _copy_rows(code, source, inner, whole, depth, panels, width, room)
        with in_columns, code.loop(whole, width) as i:
            panel = code.at(panels, (i, integer(room)))
            _transpose(code, code.at(source, (i, outer)), outer, depth, panel, width)
    with builder.if_then(builder.icmp_signed("<", whole, count)):
        first, panel = code.at(source, (whole, outer)), code.at(panels, (whole, integer(room)))
        rest = builder.sub(count, whole)
        with code.loop(depth) as k, code.loop(integer(width)) as i:
            place = code.at(panel, (k, integer(width)), i)
            with builder.if_else(builder.icmp_signed("<", i, rest)) as (there, beyond):
                with there:
                    number = code.load(code.at(first, (i, outer), (k, inner)), F32)
                    builder.store(number, place)
                with beyond:
                    builder.store(ir.Constant(F32, 0.0), place)
    builder.ret_void()
    return code.function


def _copy_rows(
    code: Code,
    source: Value,
    inner: Value,
    count: Value,
    depth: Value,
    panels: Value,
    width: int,
    room: int,
) -> None:
    """Panels of rows that are contiguous, a few rows at a time: long reads, and short of a page."""
    row = ir.VectorType(F32, width)
    with code.loop(depth, _ROWS_AT_A_TIME) as k, code.loop(count, width) as i:
        last = code.smaller(depth, code.index(k, integer(_ROWS_AT_A_TIME)))
        panel = code.at(panels, (i, integer(room)))
        with code.loop(last, start=k) as r:
            numbers = code.load(code.at(source, (r, inner), i), row, align=FLOAT_BYTES)
            code.builder.store(numbers, code.at(panel, (r, integer(width))), align=FLOAT_BYTES)


def _transpose(
    code: Code, source: Value, outer: Value, depth: Value, panel: Value, width: int
) -> None:
    side = min(8, width)
    vector = ir.VectorType(F32, side)
    squares = code.builder.mul(code.builder.sdiv(depth, integer(side)), integer(side))
    for i in range(0, width, side):
        with code.loop(squares, side) as k:
            places = [code.at(source, (integer(i + r), outer), k) for r in range(side)]
            square = [code.load(place, vector, align=FLOAT_BYTES) for place in places]
            for r, column in enumerate(_transposed(code, square)):
                place = code.at(panel, (k, integer(width)), integer(r * width + i))
                code.builder.store(column, place, align=FLOAT_BYTES)
        with code.loop(depth, start=squares) as k, code.loop(integer(side)) as r:
            number = code.load(code.at(source, (r, outer), (integer(i), outer), k), F32)
            code.builder.store(number, code.at(panel, (k, integer(width)), r, integer(i)))


def _transposed(code: Code, square: list[Value]) -> list[Value]:
    """The columns of a square of as many vectors as lanes, a power of two.

    At each turn the rows are the lanes of one more bit: row r and row r + half are interleaved.
    """
    side = len(square)
    half = side // 2
    turns = side.bit_length() - 1
    low = [lane for i in range(half) for lane in (i, side + i)]
    high = [lane + half for lane in low]
    for _ in range(turns):
        pairs = [(square[i], square[i + half]) for i in range(half)]
        square = [code.shuffle(*pair, lanes) for pair in pairs for lanes in (low, high)]
    return square
