"""Moving rows by index, with gradients that are gathers too.

Dispatch copies the row of token t to each of the places `places[t,:]`; place m holds token
`sources[m]`. The two maps below are each other's transpose, so each one's gradient is the other,
and no direction needs a scatter of rows, which is slow on CPU and not deterministic on GPU.
An index equal to the number of rows means "nowhere": it reads zeros.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Array = jax.Array


@jax.custom_vjp
def spread_rows(tokens: Array, sources: Array, places: Array) -> Array:
    """Rows [M,D] with row m = tokens[sources[m]].

    Args:
        tokens: [T,D].
        sources: [M] int32 in [0,T]; T reads zeros.
        places: [T,K] int32 in [0,M], the inverse: every place of every token; M means nowhere.
    """
    return _read(tokens, sources)


@jax.custom_vjp
def collect_rows(rows: Array, places: Array, sources: Array) -> Array:
    """Tokens [T,D] with token t = Σ_k rows[places[t,k]], summed in float32.

    Args:
        rows: [M,D].
        places: [T,K] int32 in [0,M]; M reads zeros.
        sources: [M] int32 in [0,T], the inverse.
    """
    return _sum_places(rows, places)


def _read(rows: Array, indices: Array) -> Array:
    """Row `indices[m]` for each m, zeros for "nowhere".

    The barrier keeps index arithmetic out of the gather's loop: XLA on CPU fuses what computes an
    index into it and repeats that for every number of the row, which takes longer than the copy.
    """
    last = rows.shape[0] - 1
    real, indices = lax.optimization_barrier((indices <= last, jnp.minimum(indices, last)))
    read = rows.at[indices].get(mode="promise_in_bounds", wrap_negative_indices=False)
    return jnp.where(real[:, None], read, jnp.zeros((), rows.dtype))


def _sum_places(rows: Array, places: Array) -> Array:
    parts = [_read(rows, places[:, k]).astype(jnp.float32) for k in range(places.shape[1])]
    return sum(parts[1:], parts[0]).astype(rows.dtype)


def _no_gradient(indices: Array) -> Any:
    return np.zeros(indices.shape, jax.dtypes.float0)


def _spread_forward(tokens: Array, sources: Array, places: Array) -> tuple[Array, Any]:
    return _read(tokens, sources), (sources, places)


def _spread_backward(saved: Any, cotangent: Array) -> tuple[Array, Any, Any]:
    sources, places = saved
    return _sum_places(cotangent, places), _no_gradient(sources), _no_gradient(places)


def _collect_forward(rows: Array, places: Array, sources: Array) -> tuple[Array, Any]:
    return _sum_places(rows, places), (places, sources)


def _collect_backward(saved: Any, cotangent: Array) -> tuple[Array, Any, Any]:
    places, sources = saved
    return _read(cotangent, sources), _no_gradient(places), _no_gradient(sources)


spread_rows.defvjp(_spread_forward, _spread_backward)
collect_rows.defvjp(_collect_forward, _collect_backward)
