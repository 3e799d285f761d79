"""Grouped matrix product: consecutive blocks of rows, each times its own expert's matrix.

`grouped_matmul` is one function with a backend per platform. `ragged_dot` is the compiler's own
grouped product. `cpu` is ours: XLA lowers `ragged_dot` on CPU to every expert on every row, E times
the arithmetic. Ours walks over the experts with sequential loops, so that one expert's matrix is
sliced once, and its rows go through plain matrix products of a few static sizes.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array

BACKENDS = ("auto", "ragged_dot", "cpu")

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

_ROWS_BY_MATRIX = (((1,), (0,)), ((), ()))
_ROWS_BY_TRANSPOSE = (((1,), (1,)), ((), ()))
_COLUMNS_BY_COLUMNS = (((0,), (0,)), ((), ()))
# [M,D] and [M,F] contracted over the ragged M, one [D,F] a group: the gradient of the weights.
_RAGGED_WEIGHTS = lax.RaggedDotDimensionNumbers(_COLUMNS_BY_COLUMNS, [0], [])
_RAGGED_TRANSPOSE = lax.RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), [0], [0])


def resolve_backend(name: str, platform: str | None = None) -> str:
    """Names the kernel that `grouped_matmul(..., backend=name)` runs.

    Args:
        name: "auto", "ragged_dot" or "cpu".
        platform: the platform compiled for ("cpu", "gpu", "cuda", "rocm", "tpu"); None takes JAX's
            default backend, which is right unless one compiles ahead of time for another.

    Returns:
        "ragged_dot" or "cpu".

    Raises:
        ValueError: the name is not a backend.
    """
    if name not in BACKENDS:
        raise ValueError(
            f"Grouped product backend {name!r} does not exist; choose one of {', '.join(BACKENDS)}."
        )
    if name != "auto":
        return name
    return "cpu" if (platform or jax.default_backend()) == "cpu" else "ragged_dot"


def grouped_matmul(rows: Array, weights: Array, sizes: Array, *, backend: str = "auto") -> Array:
    """Multiplies each block of consecutive rows by the matrix of its group.

    Rows [sum(sizes[:e]), sum(sizes[:e+1])) are multiplied by weights[e]. Products accumulate in
    float32 (float64 for float64 operands) and are rounded once to the operands' dtype. Rows past
    sum(sizes) give exact zeros and get zero gradients, whatever they hold. An empty group's matrix
    gets a zero gradient.

    "auto" is "cpu" on a CPU and "ragged_dot" elsewhere. It is decided when the program is lowered
    (`jax.lax.platform_dependent`), not from the process's default backend, because an
    ahead-of-time compile for TPU runs in a CPU process. On TPU `ragged_dot` is a native grouped
    kernel. On GPU it is what XLA offers, which may be dense: E times the arithmetic; "auto" does
    not know, so time it there (`python -m train.bench grouped`). On CPU "ragged_dot" is always
    dense: an oracle. "cpu" is correct on every platform and meant for one.

    Differentiable in rows and weights (reverse mode), usable under jit, scan, checkpoint and
    shard_map; not under vmap with an efficient result, and not in forward mode.

    Args:
        rows: [M,D], sorted by group.
        weights: [E,D,F], of the rows' dtype.
        sizes: [E] int32, rows in each group, non-negative, sum at most M. The values are not
            checked: they are known only on the device.
        backend: "auto", "ragged_dot" or "cpu".

    Returns:
        [M,F] in the rows' dtype.

    Raises:
        ValueError: unknown backend, or shapes or dtypes that do not fit together.
    """
    resolve_backend(backend)
    _check(rows, weights, sizes)
    if rows.size == 0 or weights.size == 0:
        return jnp.zeros_like(rows, shape=(rows.shape[0], weights.shape[2]))
    return _product(backend, *_varying_alike(rows, weights, sizes))


def _varying_alike(*arrays: Array) -> list[Array]:
    """The arrays, each varying over every mesh axis over which one of them varies.

    Inside shard_map operands may vary over different axes (sharded rows, replicated weights). The
    cast makes the types equal here, where JAX transposes it into the right sum over devices. What
    needs no cast stays the same array: it is the backward pass that keeps it, and a copy of the
    weights would be kept beside the weights.
    """
    varying = [jax.typeof(array).manual_axis_type.varying for array in arrays]
    everywhere = frozenset().union(*varying)
    return [
        lax.pcast(array, tuple(sorted(everywhere - own)), to="varying")
        if own < everywhere
        else array
        for array, own in zip(arrays, varying, strict=True)
    ]


def _check(rows: Array, weights: Array, sizes: Array) -> None:
    if rows.ndim != 2 or weights.ndim != 3 or sizes.ndim != 1:
        raise ValueError(
            "grouped_matmul takes rows [M,D], weights [E,D,F] and sizes [E]; got shapes "
            f"{rows.shape}, {weights.shape} and {sizes.shape}."
        )
    if rows.shape[1] != weights.shape[1]:
        raise ValueError(
            f"rows are {rows.shape[1]} wide and weights take {weights.shape[1]}; "
            "both must be the model width D."
        )
    if sizes.shape[0] != weights.shape[0]:
        raise ValueError(
            f"sizes counts {sizes.shape[0]} groups and weights hold {weights.shape[0]}; "
            "give one size for each expert."
        )
    if rows.dtype != weights.dtype or not jnp.issubdtype(rows.dtype, jnp.floating):
        raise ValueError(
            f"rows are {rows.dtype} and weights {weights.dtype}; cast both to one floating dtype."
        )
    if sizes.dtype != jnp.int32:
        raise ValueError(f"sizes are {sizes.dtype}; cast them to int32.")


# --- one custom VJP over three products, each chosen per backend ------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(backend: str, rows: Array, weights: Array, sizes: Array) -> Array:
    return _choose(
        backend,
        partial(_cpu_rows, dimensions=_ROWS_BY_MATRIX),
        _ragged_rows,
        (rows, weights, sizes),
    )


def _product_forward(
    backend: str, rows: Array, weights: Array, sizes: Array
) -> tuple[Array, tuple[Array, Array, Array]]:
    return _product(backend, rows, weights, sizes), (rows, weights, sizes)


def _product_backward(
    backend: str, residuals: tuple[Array, Array, Array], d_out: Array
) -> tuple[Array, Array, None]:
    rows, weights, sizes = residuals
    d_rows = _choose(
        backend,
        partial(_cpu_rows, dimensions=_ROWS_BY_TRANSPOSE),
        _ragged_rows_transposed,
        (d_out, weights, sizes),
    )
    d_weights = _choose(backend, _cpu_weights, _ragged_weights, (rows, d_out, sizes))
    return d_rows, d_weights, None


_product.defvjp(_product_forward, _product_backward)


def _choose(
    backend: str,
    cpu: Callable[..., Array],
    ragged: Callable[..., Array],
    operands: tuple[Array, Array, Array],
) -> Array:
    if backend == "auto":
        return lax.platform_dependent(*operands, cpu=cpu, default=ragged)
    return (cpu if backend == "cpu" else ragged)(*operands)


def _accumulator(dtype: jnp.dtype) -> jnp.dtype:
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


# --- backend "ragged_dot" ---------------------------------------------------------------------


def _zero_past_end(array: Array, sizes: Array) -> Array:
    """Zeros rows past sum(sizes): kernels differ in what they leave there."""
    inside = jnp.arange(array.shape[0], dtype=jnp.int32) < jnp.sum(sizes)
    return jnp.where(inside[:, None], array, jnp.zeros((), array.dtype))


def _ragged_rows(rows: Array, weights: Array, sizes: Array) -> Array:
    out = lax.ragged_dot(rows, weights, sizes, preferred_element_type=_accumulator(rows.dtype))
    return _zero_past_end(out.astype(rows.dtype), sizes)


def _ragged_rows_transposed(d_out: Array, weights: Array, sizes: Array) -> Array:
    d_rows = lax.ragged_dot_general(
        d_out,
        weights,
        sizes,
        _RAGGED_TRANSPOSE,
        preferred_element_type=_accumulator(d_out.dtype),
    )
    return _zero_past_end(d_rows.astype(d_out.dtype), sizes)


def _ragged_weights(rows: Array, d_out: Array, sizes: Array) -> Array:
    # Zeroed on both sides: zero times a NaN past the end would still be NaN.
    d_weights = lax.ragged_dot_general(
        _zero_past_end(rows, sizes),
        _zero_past_end(d_out, sizes),
        sizes,
        _RAGGED_WEIGHTS,
        preferred_element_type=_accumulator(rows.dtype),
    )
    return d_weights.astype(rows.dtype)


# --- backend "cpu" ----------------------------------------------------------------------------


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


def _matrix_shape(weights: Array, dimensions: lax.DotDimensionNumbers) -> tuple[int, int]:
    """E, and the width of the product's rows."""
    return weights.shape[0], weights.shape[2 if dimensions == _ROWS_BY_MATRIX else 1]


def _write_rows(out: Array, block: Array, start: Array) -> Array:
    return lax.dynamic_update_slice(out, block.astype(out.dtype), (start, jnp.zeros_like(start)))


def _write_matrix(out: Array, matrix: Array, e: Array) -> Array:
    zero = jnp.zeros_like(e)
    return lax.dynamic_update_slice(out, matrix[None], (e, zero, zero))


def _slice_rows(array: Array, start: Array, count: int) -> Array:
    # lax's dynamic_slice clamps the start so that the block stays inside the array.
    block = lax.dynamic_slice(array, (start, jnp.zeros_like(start)), (count, array.shape[1]))
    return block.astype(_accumulator(array.dtype))


def _slice_matrix(weights: Array, e: Array) -> Array:
    zero = jnp.zeros_like(e)
    matrix = lax.dynamic_slice(weights, (e, zero, zero), (1, *weights.shape[1:]))
    return matrix[0].astype(_accumulator(weights.dtype))


def _keep_between(block: Array, first: Array, start: Array, end: Array) -> Array:
    """Zeros the rows of a block, whose first row is row `first`, outside [start, end)."""
    index = first + jnp.arange(block.shape[0], dtype=jnp.int32)
    inside = (index >= start) & (index < end)
    return jnp.where(inside[:, None], block, jnp.zeros((), block.dtype))


def _cpu_rows(
    rows: Array, weights: Array, sizes: Array, *, dimensions: lax.DotDimensionNumbers
) -> Array:
    """Rows times matrices (or their transposes): [M,D],[E,D,F] -> [M,F], or [M,F] -> [M,D].

    Experts are taken in order. A block may reach past its expert's rows: what it writes there is
    overwritten by the experts after it, or zeroed at the end.
    """
    M, E, width = rows.shape[0], *_matrix_shape(weights, dimensions)
    blocks = _block_sizes(M, E, _ROWS_STEP_LIMIT)
    ends = jnp.cumsum(sizes, dtype=jnp.int32)

    def block_product(i: Array, out: Array, matrix: Array, start: Array, *, count: int) -> Array:
        start = start + i * count
        block = lax.dot_general(_slice_rows(rows, start, count), matrix, dimensions)
        return _write_rows(out, block, start)

    def last_product(i: Array, out: Array, matrix: Array, start: Array) -> Array:
        # A block that would pass the array's end is moved up; the rows before `start` that it then
        # covers are done already and must stay.
        count = blocks[-1]
        start = start + i * count
        first = jnp.minimum(start, M - count)
        block = lax.dot_general(_slice_rows(rows, first, count), matrix, dimensions)
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


def _cpu_weights(rows: Array, d_out: Array, sizes: Array) -> Array:
    """Gradient of the weights: [M,D],[M,F] -> [E,D,F], each matrix written once if it fits a block.

    The tail is written first, then full blocks are added: a balanced expert has only a tail.
    """
    M, D, F, E = rows.shape[0], rows.shape[1], d_out.shape[1], sizes.shape[0]
    blocks = _block_sizes(M, E, _WEIGHTS_STEP_LIMIT)
    ends = jnp.cumsum(sizes, dtype=jnp.int32)

    def tail_product(i: Array, out: Array, e: Array, start: Array, *, count: int) -> Array:
        start = start + i * count
        first = jnp.minimum(start, M - count)
        left = _keep_between(_slice_rows(rows, first, count), first, start, ends[e])
        right = _keep_between(_slice_rows(d_out, first, count), first, start, ends[e])
        return _write_matrix(out, lax.dot_general(left, right, _COLUMNS_BY_COLUMNS), e)

    def full_product(i: Array, out: Array, e: Array, start: Array) -> Array:
        start = start + i * blocks[-1]
        left = _slice_rows(rows, start, blocks[-1])
        right = _slice_rows(d_out, start, blocks[-1])
        matrix = _slice_matrix(out, e) + lax.dot_general(left, right, _COLUMNS_BY_COLUMNS)
        return _write_matrix(out, matrix, e)

    def expert(e: Array, out: Array) -> Array:
        start, full, tail = _split(ends[e], sizes[e], blocks)
        for i, count in enumerate(blocks):
            run = partial(tail_product, count=count)
            out = _repeat(tail == i + 1, out, run, e, start + full * blocks[-1])
        return _repeat(full, out, full_product, e, start)

    # Low-precision gradients are summed over blocks in float32 and rounded once.
    out = jnp.zeros_like(rows, shape=(E, D, F), dtype=_accumulator(rows.dtype))
    return lax.fori_loop(0, E, expert, out).astype(rows.dtype)
