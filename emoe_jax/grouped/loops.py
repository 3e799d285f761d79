"""Grouped products on CPU by XLA's plain products: the fallback of `native`.

XLA lowers `ragged_dot` on CPU to every expert on every row, E times the arithmetic. Here sequential
loops walk over the experts, so that one expert's matrix is sliced once, and its rows go through
plain matrix products of a few static sizes.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from emoe_jax.grouped.products import Product, accumulator

Array = jax.Array

# Products come in _TAILS static row counts, multiples of a step; the largest is the block that is
# repeated. Six steps make a mean load: a balanced random load then fits one block of 1.33 means,
# and half a step, 8 % of the rows, is wasted. More sizes measured no faster and compile slower.
_TAILS = 8
_STEPS_PER_MEAN = 6
# Below this mean load the product is no longer what takes the time: half, one and two means do, and
# compile in a third of the time.
_SMALL_MEAN = 64
# A step is whole vector registers. Where rows are written, blocks of more than 512 rows leave the
# cache between the slice, the product and the write. A weight's gradient is read and written again
# for each block after the first, so its blocks may be four times as long (both measured at D=512,
# F=1024).
_STEP_MULTIPLE = 8
_ROWS_STEP_LIMIT = 64
_WEIGHTS_STEP_LIMIT = 256

_DIMENSIONS = {
    Product.MATRIX: (((1,), (0,)), ((), ())),
    Product.TRANSPOSE: (((1,), (1,)), ((), ())),
    Product.COLUMNS: (((0,), (0,)), ((), ())),
}


def multiply(product: Product, left: Array, right: Array, sizes: Array, dtype: jnp.dtype) -> Array:
    """A grouped product on any platform, meant for CPU.

    Args:
        product: which one.
        left: [M,D] or [M,F], rows sorted by expert.
        right: [E,D,F] or, for `Product.COLUMNS`, [M,F].
        sizes: [E] int32.
        dtype: of the result, to which its sums are rounded once.

    Returns:
        Of the shape that `product` says. Rows that are no expert's are zero in a product of rows
        and count for nothing in one of columns.
    """
    if product is Product.COLUMNS:
        return _columns(left, right, sizes).astype(dtype)
    return _rows(left, right, sizes, product).astype(dtype)


def _block_sizes(M: int, E: int, step_limit: int) -> tuple[int, ...]:
    """Static row counts of the products, rising; the last is the block that is repeated.

    Few sizes keep compilation short; a size near the mean load keeps one product an expert, so
    that each matrix is packed for the product once.
    """
    mean = -(-M // E)
    if mean < _SMALL_MEAN:
        step = -(-mean // (2 * _STEP_MULTIPLE)) * _STEP_MULTIPLE
        return tuple(sorted({min(step * i, M) for i in (1, 2, 4)}))
    step = -(-mean // (_STEPS_PER_MEAN * _STEP_MULTIPLE)) * _STEP_MULTIPLE
    step = min(step, step_limit)
    return tuple(sorted({min(step * i, M) for i in range(1, _TAILS + 1)}))


def _split(end: Array, size: Array, blocks: tuple[int, ...]) -> tuple[Array, Array, Array]:
    """Cuts an expert's rows: its first row, how many full blocks, and which size holds the rest.

    The last is 1 + the index of the smallest block that holds the rest, or 0 for no rest.
    """
    full = size // blocks[-1]
    rest = size - full * blocks[-1]
    tail = jnp.sum(rest > jnp.asarray((0, *blocks[:-1]), jnp.int32), dtype=jnp.int32)
    return end - size, full, tail


def _reach(tail: Array, blocks: tuple[int, ...]) -> Array:
    return jnp.asarray((0, *blocks), jnp.int32)[tail]


def _repeat(times: Array, out: Array, run: Callable[..., Array], *operands: Array) -> Array:
    """Runs `run(i, out, *operands)` so many times; a condition runs it once or never.

    Not `lax.switch`: XLA on CPU copies the whole of `out` around a conditional, at each expert,
    and updates a loop's carry in place. `run` must use `i`: work that does not depend on the
    iteration is moved in front of the loop and done even where the loop runs zero times.
    """
    return lax.fori_loop(0, times.astype(jnp.int32), lambda i, out: run(i, out, *operands), out)


def _matrix_shape(weights: Array, product: Product) -> tuple[int, int]:
    """E, and the width of the product's rows."""
    return weights.shape[0], weights.shape[2 if product is Product.MATRIX else 1]


def _write_rows(out: Array, block: Array, start: Array) -> Array:
    return lax.dynamic_update_slice(out, block.astype(out.dtype), (start, jnp.zeros_like(start)))


def _write_matrix(out: Array, matrix: Array, e: Array) -> Array:
    zero = jnp.zeros_like(e)
    return lax.dynamic_update_slice(out, matrix[None], (e, zero, zero))


def _slice_rows(array: Array, start: Array, count: int) -> Array:
    # lax's dynamic_slice clamps the start so that the block stays inside the array.
    block = lax.dynamic_slice(array, (start, jnp.zeros_like(start)), (count, array.shape[1]))
    return block.astype(accumulator(array.dtype))


def _slice_matrix(weights: Array, e: Array) -> Array:
    zero = jnp.zeros_like(e)
    matrix = lax.dynamic_slice(weights, (e, zero, zero), (1, *weights.shape[1:]))
    return matrix[0].astype(accumulator(weights.dtype))


def _keep_between(block: Array, first: Array, start: Array, end: Array) -> Array:
    """Zeros the rows of a block, whose first row is row `first`, outside [start, end)."""
    index = first + jnp.arange(block.shape[0], dtype=jnp.int32)
    inside = (index >= start) & (index < end)
    return jnp.where(inside[:, None], block, jnp.zeros((), block.dtype))


def _rows(rows: Array, weights: Array, sizes: Array, product: Product) -> Array:
    """Rows times matrices (or their transposes): [M,D],[E,D,F] -> [M,F], or [M,F] -> [M,D].

    Experts are taken in order. A block may reach past its expert's rows: what it writes there is
    overwritten by the experts after it, or zeroed at the end.
    """
    M, E, width = rows.shape[0], *_matrix_shape(weights, product)
    blocks = _block_sizes(M, E, _ROWS_STEP_LIMIT)
    ends = jnp.cumsum(sizes, dtype=jnp.int32)

    def block_product(i: Array, out: Array, matrix: Array, start: Array, *, count: int) -> Array:
        start = start + i * count
        block = lax.dot_general(_slice_rows(rows, start, count), matrix, _DIMENSIONS[product])
        return _write_rows(out, block, start)

    def last_product(i: Array, out: Array, matrix: Array, start: Array) -> Array:
        # A block that would pass the array's end is moved up; the rows before `start` that it then
        # covers are done already and must stay.
        count = blocks[-1]
        start = start + i * count
        first = jnp.minimum(start, M - count)
        block = lax.dot_general(_slice_rows(rows, first, count), matrix, _DIMENSIONS[product])
        old = lax.dynamic_slice(out, (first, jnp.zeros_like(first)), (count, width))
        done = first + jnp.arange(count, dtype=jnp.int32) < start
        return _write_rows(out, jnp.where(done[:, None], old, block.astype(out.dtype)), first)

    def expert(e: Array, out: Array) -> Array:
        matrix = _slice_matrix(weights, e)
        start, full, tail = _split(ends[e], sizes[e], blocks)
        out = _repeat(full, out, partial(block_product, count=blocks[-1]), matrix, start)
        start = start + full * blocks[-1]
        inside = start + _reach(tail, blocks) <= M
        for i, count in enumerate(blocks):
            run = partial(block_product, count=count)
            out = _repeat((tail == i + 1) & inside, out, run, matrix, start)
        return _repeat((tail > 0) & ~inside, out, last_product, matrix, start)

    out = lax.fori_loop(0, E, expert, jnp.zeros_like(rows, shape=(M, width)))
    # The last expert with rows wrote at most one block past the end of the groups.
    first = jnp.minimum(ends[-1], M - blocks[-1])
    spilt = lax.dynamic_slice(out, (first, jnp.zeros_like(first)), (blocks[-1], width))
    return _write_rows(out, _keep_between(spilt, first, jnp.zeros_like(first), ends[-1]), first)


def _columns(rows: Array, d_out: Array, sizes: Array) -> Array:
    """Gradient of the weights: [M,D],[M,F] -> [E,D,F], each matrix written once if it fits a block.

    The tail is written first, then full blocks are added: a balanced expert has only a tail. Low
    precision is summed over blocks in float32.
    """
    M, D, F, E = rows.shape[0], rows.shape[1], d_out.shape[1], sizes.shape[0]
    blocks = _block_sizes(M, E, _WEIGHTS_STEP_LIMIT)
    ends = jnp.cumsum(sizes, dtype=jnp.int32)

    def tail_product(i: Array, out: Array, e: Array, start: Array, *, count: int) -> Array:
        start = start + i * count
        first = jnp.minimum(start, M - count)
        left = _keep_between(_slice_rows(rows, first, count), first, start, ends[e])
        right = _keep_between(_slice_rows(d_out, first, count), first, start, ends[e])
        return _write_matrix(out, lax.dot_general(left, right, _DIMENSIONS[Product.COLUMNS]), e)

    def full_product(i: Array, out: Array, e: Array, start: Array) -> Array:
        start = start + i * blocks[-1]
        left = _slice_rows(rows, start, blocks[-1])
        right = _slice_rows(d_out, start, blocks[-1])
        matrix = _slice_matrix(out, e) + lax.dot_general(left, right, _DIMENSIONS[Product.COLUMNS])
        return _write_matrix(out, matrix, e)

    def expert(e: Array, out: Array) -> Array:
        start, full, tail = _split(ends[e], sizes[e], blocks)
        for i, count in enumerate(blocks):
            run = partial(tail_product, count=count)
            out = _repeat(tail == i + 1, out, run, e, start + full * blocks[-1])
        return _repeat(full, out, full_product, e, start)

    out = jnp.zeros_like(rows, shape=(E, D, F), dtype=accumulator(rows.dtype))
    return lax.fori_loop(0, E, expert, out)
