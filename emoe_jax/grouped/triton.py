"""Grouped products on NVIDIA GPUs: Pallas kernels that Triton compiles.

XLA lowers `ragged_dot` on CUDA to a dense product over rows that are zero but for one expert: E
times the arithmetic, and the memory. Here a program of the kernel computes one tile of the result
from the rows and the matrix that the tile needs.
"""

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from emoe_jax.grouped.products import Product

Array = jax.Array
# Part of a reference, `ref.at[...]`: JAX has no public name for its type.
Part = Any

# A tile of the result, and how much of the contracted dimension is in shared memory at a time: what
# the tables that tokamax ships find fastest on an H100 for most shapes. Four stages of it are
# 64 KiB, which every GPU since Ampere has. Tensor cores take no side below 16.
_TILE = 128
_DEPTH_BYTES = 64
_LEAST = 16
_PARAMETERS = plgpu.CompilerParams(num_warps=4, num_stages=4)


def multiply(product: Product, left: Array, right: Array, sizes: Array, dtype: jnp.dtype) -> Array:
    """A grouped product; arguments and result as those of `loops.multiply`.

    For float32, bfloat16 and float16, on NVIDIA GPUs of compute capability 8 or later. float32 is
    multiplied as JAX's other products on these GPUs are, rounded to TF32 unless
    `jax_default_matmul_precision` asks for more. On CPU the kernels are interpreted, a tile at a
    time: for tests, and inside shard_map only where its check_vma is off.
    """
    run = partial(_columns, dtype) if product is Product.COLUMNS else partial(_rows, product, dtype)
    return lax.platform_dependent(
        left,
        right,
        sizes,
        cpu=partial(run, interpret=True),
        default=partial(run, interpret=False),
    )


def _side(length: float, most: int = _TILE) -> int:
    """The side of a tile along a dimension of that length: a power of two, from 16 to `most`."""
    return min(most, max(_LEAST, pl.next_power_of_2(max(1, round(length)))))


def _depth(length: float, dtype: jnp.dtype) -> int:
    return _side(length, _DEPTH_BYTES // dtype.itemsize)


def _ends(sizes: Array, M: int) -> Array:
    """Where each group's rows end: inside the M rows, as a GPU checks no bounds."""
    return jnp.minimum(jnp.cumsum(jnp.clip(sizes, 0, M), dtype=jnp.int32), M)


def _starts(ends: Array) -> Array:
    """Where each group's rows start: where those before it end."""
    return jnp.append(jnp.int32(0), ends[:-1])


def _cdiv(count: Array, size: int) -> Array:
    """Quotient rounded up, in int32 also where JAX's integers have 64 bits."""
    return (count + jnp.int32(size - 1)) // jnp.int32(size)


def _row_tiles(sizes: Array, M: int, block: int) -> tuple[Array, Array, Array]:
    """Cuts M rows into tiles of at most `block` rows of one group.

    The rows past sum(sizes) are a group as well, the last, so that they too are written.

    Returns:
        For each of the most tiles that there can be: its group (E for the rows past the end), its
        first row, and the end of its group's rows, which is no more than the first row where the
        tile is none. Each [tiles] int32.
    """
    ends = jnp.append(_ends(sizes, M), jnp.int32(M))
    starts = _starts(ends)
    tiles = _cdiv(ends - starts, block)
    tile_ends = jnp.cumsum(tiles, dtype=jnp.int32)
    tile = jnp.arange(M // block + min(len(ends), M), dtype=jnp.int32)
    # By comparing with all ends at once: the other methods are loops.
    group = jnp.searchsorted(tile_ends, tile, side="right", method="compare_all")
    group = jnp.minimum(group.astype(jnp.int32), len(ends) - 1)
    within = tile - (tile_ends - tiles)[group]
    return group, starts[group] + within * jnp.int32(block), ends[group]


def _rows(
    product: Product,
    dtype: jnp.dtype,
    rows: Array,
    weights: Array,
    sizes: Array,
    *,
    interpret: bool,
) -> Array:
    """Rows times matrices (or their transposes): [M,D],[E,D,F] -> [M,F], or [M,F] -> [M,D]."""
    M, E = rows.shape[0], weights.shape[0]
    width = weights.shape[2 if product is Product.MATRIX else 1]
    height, side = _side(M / E), _side(width)
    tiles = _row_tiles(sizes, M, height)
    kernel = partial(_rows_kernel, product, E, (height, side, _depth(rows.shape[1], rows.dtype)))
    # Tiles of the same rows are neighbours: they share the rows, and their expert's matrix stays in
    # the second-level cache.
    grid = pl.cdiv(width, side), tiles[0].shape[0]
    shape = jax.ShapeDtypeStruct((M, width), dtype)
    return _call(kernel, grid, shape, (rows, weights, *tiles), interpret=interpret)


def _rows_kernel(
    product: Product,
    E: int,
    blocks: tuple[int, int, int],
    rows: jax.Ref,
    weights: jax.Ref,
    groups: jax.Ref,
    starts: jax.Ref,
    ends: jax.Ref,
    out: jax.Ref,
) -> None:
    """One tile of [M,width]: rows of one expert by columns of its product."""
    height, side, depth = blocks
    tile = pl.program_id(1)
    e, start, end = groups[tile], starts[tile], ends[tile]
    at_rows, at_side = pl.Slice(start, height), pl.Slice(pl.program_id(0) * jnp.int32(side), side)
    in_rows, in_side = _inside(at_rows, end), _inside(at_side, out.shape[1])
    contracted = rows.shape[1]

    def step(i: Array, sum_: Array) -> Array:
        at_depth = pl.Slice(i * jnp.int32(depth), depth)
        in_depth = _inside(at_depth, contracted)
        left = _load(rows.at[at_rows, at_depth], in_rows, in_depth)
        if product is Product.MATRIX:
            right = _load(weights.at[e, at_depth, at_side], in_depth, in_side)
            return _add_product(sum_, left, right, (1, 0))
        right = _load(weights.at[e, at_side, at_depth], in_side, in_depth)
        return _add_product(sum_, left, right, (1, 1))

    # The rows past the end of the groups are no expert's: they stay zero. (Not `where` over
    # Python's integers: Pallas lowers these to booleans for Triton.)
    steps = jnp.int32(pl.cdiv(contracted, depth)) * (e < E).astype(jnp.int32)

    @pl.when(start < end)
    def _() -> None:
        _store(out.at[at_rows, at_side], _sum(steps, step, height, side), in_rows, in_side)


def _columns(
    dtype: jnp.dtype, left: Array, right: Array, sizes: Array, *, interpret: bool
) -> Array:
    """Gradient of the weights: [M,D],[M,F] -> [E,D,F]."""
    M, E = left.shape[0], sizes.shape[0]
    D, F = left.shape[1], right.shape[1]
    height, side = _side(D), _side(F)
    ends = _ends(sizes, M)
    kernel = partial(_columns_kernel, (height, side, _depth(M / E, left.dtype)))
    grid = pl.cdiv(F, side), pl.cdiv(D, height), E
    shape = jax.ShapeDtypeStruct((E, D, F), dtype)
    return _call(kernel, grid, shape, (left, right, _starts(ends), ends), interpret=interpret)


def _columns_kernel(
    blocks: tuple[int, int, int],
    left: jax.Ref,
    right: jax.Ref,
    starts: jax.Ref,
    ends: jax.Ref,
    out: jax.Ref,
) -> None:
    """One tile of [E,D,F]: an expert's rows, contracted."""
    height, side, depth = blocks
    e = pl.program_id(2)
    start, end = starts[e], ends[e]
    at_height = pl.Slice(pl.program_id(1) * jnp.int32(height), height)
    at_side = pl.Slice(pl.program_id(0) * jnp.int32(side), side)
    in_height, in_side = _inside(at_height, out.shape[1]), _inside(at_side, out.shape[2])

    def step(i: Array, sum_: Array) -> Array:
        at_rows = pl.Slice(start + i * jnp.int32(depth), depth)
        in_rows = _inside(at_rows, end)
        # Zeroed on both sides: zero times a NaN of other rows would still be NaN.
        mine = _load(left.at[at_rows, at_height], in_rows, in_height)
        other = _load(right.at[at_rows, at_side], in_rows, in_side)
        return _add_product(sum_, mine, other, (0, 0))

    total = _sum(_cdiv(end - start, depth), step, height, side)
    _store(out.at[e, at_height, at_side], total, in_height, in_side)


def _call(
    kernel: Callable[..., None],
    grid: tuple[int, ...],
    shape: jax.ShapeDtypeStruct,
    operands: tuple[Array, ...],
    *,
    interpret: bool,
) -> Array:
    """Runs a kernel on whole arrays, from which it reads its own parts."""
    # Inside shard_map the result varies over the mesh axes over which the operands do.
    varying = jax.typeof(operands[0]).manual_axis_type
    result = jax.ShapeDtypeStruct(shape.shape, shape.dtype, manual_axis_type=varying)
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * len(operands),
        out_specs=pl.BlockSpec(memory_space=pl.ANY),
        out_shape=result,
        compiler_params=_PARAMETERS,
        interpret=interpret,
    )(*operands)


def _inside(span: pl.Slice, end: int | Array) -> Array | None:
    """Which indices of a span lie before `end`: [span] bool; None where all spans end there."""
    if isinstance(end, int) and end % span.size == 0:
        return None
    return span.start + jnp.arange(span.size, dtype=jnp.int32) < end


def _mask(part: Part, first: Array | None, second: Array | None) -> Array | None:
    """The mask of a part of an array from those of its rows and of its columns."""
    masks = [
        jnp.broadcast_to(jnp.expand_dims(mask, 1 - axis), part.shape)
        for axis, mask in enumerate((first, second))
        if mask is not None
    ]
    return functools.reduce(jnp.logical_and, masks) if masks else None


def _load(part: Part, first: Array | None, second: Array | None) -> Array:
    """A part of an array, zero outside the masks."""
    mask = _mask(part, first, second)
    return plgpu.load(part, mask=mask, other=None if mask is None else 0)


def _store(part: Part, tile: Array, first: Array | None, second: Array | None) -> None:
    plgpu.store(part, tile.astype(part.dtype), mask=_mask(part, first, second))


def _sum(steps: Array, step: Callable[[Array, Array], Array], height: int, side: int) -> Array:
    """The products of a tile, summed in float32."""
    return lax.fori_loop(jnp.int32(0), steps, step, jnp.zeros((height, side), jnp.float32))


def _add_product(sum_: Array, left: Array, right: Array, contracted: tuple[int, int]) -> Array:
    dimensions = ((contracted[:1], contracted[1:]), ((), ()))
    return lax.dot_general(left, right, dimensions, preferred_element_type=jnp.float32) + sum_
