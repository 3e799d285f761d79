"""Stacked expert MLPs: what runs on groups of rows, knowing nothing of routing."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx

from emoe_jax.config import MoEConfig
from emoe_jax.dispatch.base import Groups
from emoe_jax.grouped import grouped_matmul
from emoe_jax.layers import gelu, row_product, swiglu

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
        gated = config.activation == "swiglu"
        if gated:
            self.w_gate = _matrices(rngs, (E, D, F))
        self.w_up = _matrices(rngs, (E, D, F))
        self.w_down = _matrices(rngs, (E, F, D), out_scale)
        if config.bias:
            if gated:
                self.b_gate = nnx.Param(jnp.zeros((E, F), jnp.float32))
            self.b_up = nnx.Param(jnp.zeros((E, F), jnp.float32))
            self.b_down = nnx.Param(jnp.zeros((E, D), jnp.float32))

    def __call__(self, groups: Groups) -> Array:
        """Outputs of the shape of `groups.rows`, in the compute dtype.

        In the [M,D] form, rows beyond the groups give zero.
        """
        return apply_experts(self.weights(), groups.rows.astype(self.dtype), groups.sizes)

    def weights(self) -> dict[str, Array]:
        """The arrays by name, float32."""
        names = ("w_gate", "w_up", "w_down", "b_gate", "b_up", "b_down")
        return {name: getattr(self, name)[...] for name in names if hasattr(self, name)}


def apply_experts(weights: dict[str, Array], rows: Array, sizes: Array) -> Array:
    """The experts as a function of their arrays; SwiGLU where there is a `w_gate`.

    Args:
        weights: see `Experts.weights`; of any number of experts, in float32 or the rows' dtype.
        rows: [E,C,D] or [M,D] in the compute dtype, see `Groups`.
        sizes: [E] int32.
    """

    def product(x: Array, name: str) -> Array:
        out = grouped_product(x, weights[f"w_{name}"], sizes)
        bias = weights.get(f"b_{name}")
        return out if bias is None else out + row_bias(bias, out, sizes).astype(out.dtype)

    up = product(rows, "up")
    hidden = swiglu(product(rows, "gate"), up) if "w_gate" in weights else gelu(up)
    return product(hidden, "down")


def _matrices(rngs: nnx.Rngs, shape: tuple[int, int, int], scale: float = 1.0) -> nnx.Param[Array]:
    """Normal with deviation scale/sqrt(fan in); at scale 1 it keeps the variance of its input."""
    std = scale / math.sqrt(shape[1])
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32))


def grouped_product(rows: Array, weights: Array, sizes: Array) -> Array:
    """Rows of group e times weights[e]: a batched product where groups are equal.

    Args:
        rows: [E,C,D] or [M,D], see `Groups`.
        weights: [E,D,F], of the rows' dtype or float32, see `grouped_matmul`.
        sizes: [E] int32, read in the second form.
    """
    if rows.ndim == 3:
        return jax.vmap(row_product)(rows, weights).astype(rows.dtype)
    return grouped_matmul(rows, weights, sizes)


def row_bias(bias: Array, rows: Array, sizes: Array) -> Array:
    """The bias [E,F] of each row's expert; zero for rows beyond the groups."""
    if rows.ndim == 3:
        return bias[:, None, :]
    ends = jnp.cumsum(sizes, dtype=jnp.int32)
    order = jnp.arange(rows.shape[0], dtype=jnp.int32)
    expert = jnp.searchsorted(ends, order, side="right")
    return bias.at[expert].get(mode="fill", fill_value=0)
