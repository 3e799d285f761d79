"""Stacked expert MLPs: what runs on groups of rows, knowing nothing of routing."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx

from emoe_jax.config import MoEConfig
from emoe_jax.dispatch.base import Groups
from emoe_jax.grouped import grouped_matmul

Array = jax.Array


class Experts(nnx.Module):
    """E expert MLPs as stacked matrices.

    Normal initial weights with deviation 1/sqrt(fan in), `out_scale` times that for w_down.
    "swiglu": W_down (silu(W_gate x) * W_up x); "gelu": W_down gelu(W_up x), exact GELU.

    Attributes:
        w_gate: [E,D,F], only with "swiglu".
        w_up: [E,D,F].
        w_down: [E,F,D].
        b_gate: [E,F], likewise; biases exist only with `MoEConfig.bias`.
        b_up: [E,F].
        b_down: [E,D].
    """

    def __init__(
        self,
        config: MoEConfig,
        width: int,
        *,
        dtype: str,
        out_scale: float = 1.0,
        rngs: nnx.Rngs,
    ) -> None:
        E, D, F = config.experts, width, config.hidden
        self.dtype = dtype
        self.gated = config.activation == "swiglu"
        if self.gated:
            self.w_gate = _matrices(rngs, (E, D, F))
        self.w_up = _matrices(rngs, (E, D, F))
        self.w_down = _matrices(rngs, (E, F, D), out_scale)
        self.bias = config.bias
        if self.bias:
            if self.gated:
                self.b_gate = nnx.Param(jnp.zeros((E, F), jnp.float32))
            self.b_up = nnx.Param(jnp.zeros((E, F), jnp.float32))
            self.b_down = nnx.Param(jnp.zeros((E, D), jnp.float32))

    def __call__(self, groups: Groups) -> Array:
        """Outputs of the shape of `groups.rows`, in the compute dtype.

        In the [M,D] form, rows beyond the groups give zero.
        """
        rows = groups.rows.astype(self.dtype)

        def product(x: Array, matrix: str, bias: str) -> Array:
            weights = getattr(self, matrix)[...].astype(self.dtype)
            out = grouped_product(x, weights, groups.sizes)
            if not self.bias:
                return out
            return out + row_bias(getattr(self, bias)[...].astype(self.dtype), out, groups.sizes)

        up = product(rows, "w_up", "b_up")
        if self.gated:
            hidden = jax.nn.silu(product(rows, "w_gate", "b_gate")) * up
        else:
            hidden = jax.nn.gelu(up, approximate=False)
        return product(hidden, "w_down", "b_down")


def _matrices(rngs: nnx.Rngs, shape: tuple[int, int, int], scale: float = 1.0) -> nnx.Param[Array]:
    """Normal with deviation scale/sqrt(fan in); at scale 1 it keeps the variance of its input."""
    std = scale / math.sqrt(shape[1])
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32))


def grouped_product(rows: Array, weights: Array, sizes: Array) -> Array:
    """Rows of group e times weights[e]: a batched product where groups are equal.

    Args:
        rows: [E,C,D] or [M,D], see `Groups`.
        weights: [E,D,F].
        sizes: [E] int32, read in the second form.
    """
    if rows.ndim == 3:
        out = jnp.einsum("ecd,edf->ecf", rows, weights, preferred_element_type=jnp.float32)
        return out.astype(rows.dtype)
    return grouped_matmul(rows, weights, sizes)


def row_bias(bias: Array, rows: Array, sizes: Array) -> Array:
    """The bias [E,F] of each row's expert; zero for rows beyond the groups."""
    if rows.ndim == 3:
        return bias[:, None, :]
    ends = jnp.cumsum(sizes, dtype=jnp.int32)
    order = jnp.arange(rows.shape[0], dtype=jnp.int32)
    expert = jnp.searchsorted(ends, order, side="right")
    return bias.at[expert].get(mode="fill", fill_value=0)
