"""The three products of a grouped matrix product and its gradients, by name."""

from __future__ import annotations

import enum

import jax.numpy as jnp


class Product(enum.Enum):
    """A product of rows [M,·] sorted by expert; expert e has the next sizes[e] of them."""

    MATRIX = "matrix"
    """[M,D] times [E,D,F]: [M,F]."""

    TRANSPOSE = "transpose"
    """[M,F] times the transposes of [E,D,F]: [M,D]."""

    COLUMNS = "columns"
    """The transpose of [M,D] times [M,F], an expert's rows for each: [E,D,F]."""


def accumulator(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype in which products of a dtype are summed."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)
