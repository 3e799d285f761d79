"""Moving rows by index, with gradients that are gathers too.

A `Layout` says which row holds which of the K assignments of each token. Tokens are spread to rows
and rows are collected to tokens; each of the two is the other's transpose, so each one's gradient
is the other, and no direction needs a scatter of rows, which is slow on CPU and not deterministic
on GPU. An index equal to the number of what it counts means "nowhere": it reads zeros.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Array = jax.Array


class Layout(NamedTuple):
    """Which of M rows hold which of T·K assignments; each array is the other's inverse.

    Attributes:
        places: [T,K] int32 in [0,M], the row of each assignment; M for none.
        assignments: [M] int32 in [0,T·K], the assignment t·K+k of each row; T·K for none.
    """

    places: Array
    assignments: Array

    @property
    def sources(self) -> Array:
        """[M] int32 in [0,T], the token of each row; T for none."""
        return self.assignments // self.places.shape[1]


@jax.custom_vjp
def spread_rows(tokens: Array, layout: Layout) -> Array:
    """Rows [M,D], each the token [T,D] that the layout names."""
    return _read(tokens, layout.sources)


@jax.custom_vjp
def collect_rows(rows: Array, layout: Layout) -> Array:
    """Tokens [T,D], each the sum of its rows [M,D], summed in float32."""
    return _sum_places(rows, layout.places)


@jax.custom_vjp
def combine_rows(rows: Array, gates: Array, layout: Layout) -> Array:
    """Tokens [T,D] float32, each the sum of its rows weighed by their gates.

    Its backward pass keeps the rows in their own dtype, and no product of rows and gates.

    Args:
        rows: [M,D].
        gates: [T,K] float32.
        layout: of T·K assignments in M rows.
    """
    parts = _parts(rows, layout.places)
    return sum((gates[:, k, None] * part for k, part in enumerate(parts)), jnp.float32(0))


def _read(rows: Array, indices: Array) -> Array:
    """Row `indices[m]` for each m, zeros for "nowhere".

    The barrier keeps index arithmetic out of the gather's loop: XLA on CPU fuses what computes an
    index into it and repeats that for every number of the row, which takes longer than the copy.
    """
    last = rows.shape[0] - 1
    real, indices = lax.optimization_barrier((indices <= last, jnp.minimum(indices, last)))
    read = rows.at[indices].get(mode="promise_in_bounds", wrap_negative_indices=False)
    return jnp.where(real[:, None], read, jnp.zeros((), rows.dtype))


def _parts(rows: Array, places: Array) -> list[Array]:
    """K times [T,D] float32: the rows of the tokens' k-th assignments."""
    return [_read(rows, places[:, k]).astype(jnp.float32) for k in range(places.shape[1])]


def _sum_places(rows: Array, places: Array) -> Array:
    parts = _parts(rows, places)
    return sum(parts[1:], parts[0]).astype(rows.dtype)


def no_gradient(tree: Any) -> Any:
    """The cotangents of a tree of indices."""
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, jax.dtypes.float0), tree)


def _spread_forward(tokens: Array, layout: Layout) -> tuple[Array, Layout]:
    return spread_rows(tokens, layout), layout


def _spread_backward(layout: Layout, cotangent: Array) -> tuple[Array, Any]:
    return _sum_places(cotangent, layout.places), no_gradient(layout)


def _collect_forward(rows: Array, layout: Layout) -> tuple[Array, Layout]:
    return collect_rows(rows, layout), layout


def _collect_backward(layout: Layout, cotangent: Array) -> tuple[Array, Any]:
    return _read(cotangent, layout.sources), no_gradient(layout)


def _combine_forward(rows: Array, gates: Array, layout: Layout) -> tuple[Array, Any]:
    return combine_rows(rows, gates, layout), (rows, gates, layout)


def _combine_backward(saved: Any, cotangent: Array) -> tuple[Array, Array, Any]:
    rows, gates, layout = saved
    gate = gates.reshape(-1).at[layout.assignments].get(mode="fill", fill_value=0)
    weighed = (gate[:, None] * _read(cotangent, layout.sources)).astype(rows.dtype)
    products = [jnp.sum(cotangent * part, axis=1) for part in _parts(rows, layout.places)]
    return weighed, jnp.stack(products, axis=1), no_gradient(layout)


spread_rows.defvjp(_spread_forward, _spread_backward)
collect_rows.defvjp(_collect_forward, _collect_backward)
combine_rows.defvjp(_combine_forward, _combine_backward)
