"""Grouped matrix product: consecutive blocks of rows, each times its own expert's matrix.

`grouped_matmul` is one function with a backend per platform: `ragged` is the compiler's own grouped
product, good on TPU. On CUDA and CPU the compiler's does E times the arithmetic, and the product is
ours: `triton` there, `native` and `loops` here.
"""

from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from emoe_jax import devices
from emoe_jax.grouped import loops, native, ragged
from emoe_jax.grouped.products import Product, accumulator
from emoe_jax.sharding import varying_alike

Array = jax.Array

TRITON_DTYPES = ("float32", "bfloat16", "float16")
"""What "triton" multiplies."""

BACKENDS = ("auto", "ragged_dot", "triton", "native", "loops")


def _triton(product: Product, left: Array, right: Array, sizes: Array, dtype: jnp.dtype) -> Array:
    # Imported where it is wanted: Pallas takes a while, and nobody else needs it.
    from emoe_jax.grouped import triton

    return triton.multiply(product, left, right, sizes, dtype)


_MULTIPLY: Mapping[str, Callable[[Product, Array, Array, Array, jnp.dtype], Array]] = {
    "ragged_dot": ragged.multiply,
    "triton": _triton,
    "native": native.multiply,
    "loops": loops.multiply,
}


def resolve_backend(name: str, platform: str | None = None) -> str:
    """Names the kernel that `grouped_matmul(..., backend=name)` runs.

    Args:
        name: one of `BACKENDS`.
        platform: the platform compiled for, in this process ("cpu", "gpu", "cuda", "rocm", "tpu";
            "gpu" is CUDA); None takes JAX's default backend, which is right unless one compiles
            ahead of time for another.

    Returns:
        "ragged_dot", "triton", "native" or "loops".

    Raises:
        ValueError: the name is not a backend, or it is "native" and this machine has none.
    """
    if name not in BACKENDS:
        raise ValueError(
            f"Grouped product backend {name!r} does not exist; choose one of {', '.join(BACKENDS)}."
        )
    if name == "native" and native.missing():
        raise ValueError(f"There are no native grouped products here: {native.missing()}.")
    if name != "auto":
        return name
    platform = platform or devices.platform()
    if platform == "cpu":
        return _on_cpu()
    return _on_cuda() if platform in ("gpu", "cuda") else "ragged_dot"


def is_dense(backend: str, platform: str | None = None) -> bool:
    """Whether a kernel may multiply every row by every expert's matrix: E times the arithmetic.

    XLA knows a grouped product for `ragged_dot` on TPU. On CPU and CUDA it multiplies densely (jax
    0.10); on ROCm it has one for some dtypes on some devices.

    Args:
        backend: what `resolve_backend` returned.
        platform: as there.
    """
    return backend == "ragged_dot" and (platform or devices.platform()) != "tpu"


def prepare(backend: str = "auto") -> None:
    """Begins to compile what a backend needs in this process, if anything, and goes on.

    For programs that know early what they will trace. Without it the first `grouped_matmul` waits.
    """
    if resolve_backend(backend) == "native":
        native.prepare()


def _on_cpu() -> str:
    """What "auto" is where a program is lowered for CPU.

    All branches are traced, also those that are not lowered, and to trace "native" compiles it: in
    a process that computes elsewhere it is not worth that.
    """
    return "native" if devices.platform() == "cpu" and not native.missing() else "loops"


def _on_cuda() -> str:
    """What "auto" is where a program is lowered for CUDA.

    "triton" needs such GPUs, and it is for processes whose default devices they are: JAX 0.11
    cannot lower it elsewhere.
    """
    return "triton" if devices.are_ampere_or_later() else "ragged_dot"


def grouped_matmul(rows: Array, weights: Array, sizes: Array, *, backend: str = "auto") -> Array:
    """Multiplies each block of consecutive rows by the matrix of its group.

    Rows [sum(sizes[:e]), sum(sizes[:e+1])) are multiplied by weights[e]. Products accumulate in
    float32 (float64 for float64 operands) and are rounded once to the operands' dtype. Rows past
    sum(sizes) give exact zeros and get zero gradients, whatever they hold. An empty group's matrix
    gets a zero gradient.

    Weights in float32 for rows of lower precision are rounded to the rows' dtype for the products,
    forward and backward, and get gradients that are not rounded. No rounded copy of them is kept.

    "auto" is "ragged_dot" on TPU and ROCm, "triton" on CUDA, and on a CPU "native", or "loops"
    where `native.missing()` says why. It is decided when the program is lowered
    (`jax.lax.platform_dependent`), not from the process's default backend, because an ahead-of-time
    compile for TPU runs in a CPU process; one for CUDA gets "ragged_dot" there, as GPUs before
    compute capability 8 do. "ragged_dot" is a grouped kernel on TPU and E times the arithmetic
    elsewhere, see `is_dense`: an oracle. "triton" takes float32, bfloat16 and float16 ("auto" has
    "loops" for others), is interpreted on CPU, for tests, and is lowered for CUDA alone, not for
    several platforms at once. "loops" is correct on every platform and meant for one, "native"
    exists on CPU only. "native" computes in float32, low precision too.

    Differentiable in rows and weights (reverse mode), usable under jit, scan, checkpoint and
    shard_map. Under vmap take "native" or "loops", which go through the mapped axis one by one, and
    for `jax.export` "loops": calls into this process, and kernels, cannot be kept.

    Args:
        rows: [M,D], sorted by group.
        weights: [E,D,F], of the rows' dtype or float32.
        sizes: [E] int32, rows in each group, non-negative, sum at most M. The values are not
            checked: they are known only on the device.
        backend: one of `BACKENDS`.

    Returns:
        [M,F] in the rows' dtype.

    Raises:
        ValueError: unknown backend, or one that is not there or not for this dtype, or shapes or
            dtypes that do not fit together.
    """
    resolve_backend(backend)
    _check(rows, weights, sizes)
    if backend == "native" and rows.dtype == jnp.float64:
        raise ValueError('backend "native" takes no float64; choose "loops".')
    if backend == "triton" and rows.dtype.name not in TRITON_DTYPES:
        raise ValueError(
            f'backend "triton" takes {", ".join(TRITON_DTYPES)}, not {rows.dtype}; choose "loops".'
        )
    if rows.size == 0 or weights.size == 0:
        return jnp.zeros_like(rows, shape=(rows.shape[0], weights.shape[2]))
    return _product(backend, *varying_alike(rows, weights, sizes))


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
    wide = accumulator(rows.dtype)
    if not jnp.issubdtype(rows.dtype, jnp.floating) or weights.dtype not in (rows.dtype, wide):
        raise ValueError(
            f"rows are {rows.dtype} and weights {weights.dtype}; cast both to one floating dtype,"
            f" or leave the weights in {wide}."
        )
    if sizes.dtype != jnp.int32:
        raise ValueError(f"sizes are {sizes.dtype}; cast them to int32.")


# --- one custom VJP over three products, each chosen per backend ------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(backend: str, rows: Array, weights: Array, sizes: Array) -> Array:
    return _multiply(backend, Product.MATRIX, rows, weights.astype(rows.dtype), sizes, rows.dtype)


def _product_forward(
    backend: str, rows: Array, weights: Array, sizes: Array
) -> tuple[Array, tuple[Array, Array, Array]]:
    return _product(backend, rows, weights, sizes), (rows, weights, sizes)


def _product_backward(
    backend: str, residuals: tuple[Array, Array, Array], d_out: Array
) -> tuple[Array, Array, None]:
    rows, weights, sizes = residuals
    low = weights.astype(rows.dtype)
    d_rows = _multiply(backend, Product.TRANSPOSE, d_out, low, sizes, rows.dtype)
    d_weights = _multiply(backend, Product.COLUMNS, rows, d_out, sizes, weights.dtype)
    return d_rows, d_weights, None


_product.defvjp(_product_forward, _product_backward)


def _multiply(
    backend: str, product: Product, left: Array, right: Array, sizes: Array, dtype: jnp.dtype
) -> Array:
    if backend != "auto":
        return _run(backend, product, dtype)(left, right, sizes)
    on_cpu = "loops" if left.dtype == jnp.float64 else _on_cpu()
    on_cuda = _on_cuda() if left.dtype.name in TRITON_DTYPES else "loops"
    run = {name: _run(name, product, dtype) for name in (on_cpu, on_cuda, "ragged_dot")}
    return lax.platform_dependent(
        left, right, sizes, cpu=run[on_cpu], cuda=run[on_cuda], default=run["ragged_dot"]
    )


def _run(
    backend: str, product: Product, dtype: jnp.dtype
) -> Callable[[Array, Array, Array], Array]:
    return lambda left, right, sizes: _MULTIPLY[backend](product, left, right, sizes, dtype)
