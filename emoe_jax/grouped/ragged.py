"""Grouped products by the compiler's own: one kernel on TPU, elsewhere E times the arithmetic."""

import jax
import jax.numpy as jnp
from jax import lax

from emoe_jax.grouped.products import Product, accumulator

Array = jax.Array

# [M,F] against [E,D,F]: contracted over F, one matrix a group.
_TRANSPOSE = lax.RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), [0], [0])
# [M,D] and [M,F] contracted over the ragged M, one [D,F] a group.
_COLUMNS = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])


def multiply(product: Product, left: Array, right: Array, sizes: Array, dtype: jnp.dtype) -> Array:
    """A grouped product; arguments and result as those of `loops.multiply`."""
    accumulate = accumulator(left.dtype)
    if product is Product.MATRIX:
        out = lax.ragged_dot(left, right, sizes, preferred_element_type=accumulate)
        return _zero_past_end(out.astype(dtype), sizes)
    if product is Product.TRANSPOSE:
        out = lax.ragged_dot_general(
            left, right, sizes, _TRANSPOSE, preferred_element_type=accumulate
        )
        return _zero_past_end(out.astype(dtype), sizes)
    # Zeroed on both sides: zero times a NaN past the end would still be NaN.
    ends = _zero_past_end(left, sizes), _zero_past_end(right, sizes)
    out = lax.ragged_dot_general(*ends, sizes, _COLUMNS, preferred_element_type=accumulate)
    return out.astype(dtype)


def _zero_past_end(array: Array, sizes: Array) -> Array:
    """Zeros rows past sum(sizes): kernels differ in what they leave there."""
    inside = jnp.arange(array.shape[0], dtype=jnp.int32) < jnp.sum(sizes)
    return jnp.where(inside[:, None], array, jnp.zeros((), array.dtype))
